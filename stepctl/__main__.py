"""The entry of the command line; a Ctrl-C that comes while it is being loaded ends in silence."""

import sys

from stepctl import interrupt
from stepctl.errors import UnsupportedSystemError, check_system


def main() -> None:
    """Load the command line and run it."""
    interrupt.watch()
    try:
        check_system()
        from stepctl.cli.main import main as run
    except BaseException as error:
        if interrupt.received() or isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        if isinstance(error, UnsupportedSystemError):
            sys.exit(f"stepctl: {error}")  # exit code 1
        raise
    run()


if __name__ == "__main__":
    main()
