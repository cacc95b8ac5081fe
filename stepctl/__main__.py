"""The entry of the command line; a Ctrl-C that comes while it is being loaded ends in silence."""

import sys

from stepctl import interrupt


def main() -> None:
    """Load the command line and run it."""
    interrupt.watch()
    try:
        from stepctl.errors import UnsupportedSystemError, check_system

        try:
            check_system()
        except UnsupportedSystemError as error:
            sys.exit(f"stepctl: {error}")  # exit code 1
        from stepctl.cli.main import main as run
    except BaseException as error:
        if interrupt.received() or isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        raise
    run()


if __name__ == "__main__":
    main()
