"""The entry of the command line; a Ctrl-C that comes while it is being loaded ends in silence."""

import sys

from stepctl import interrupt


def main() -> None:
    """Load the command line and run it."""
    interrupt.watch()
    try:
        from stepctl.cli.main import main as run
    except BaseException as error:
        if interrupt.received() or isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        raise
    run()


if __name__ == "__main__":
    main()
