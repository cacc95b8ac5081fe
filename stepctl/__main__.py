"""The entry point of the command line; a Ctrl-C during its imports exits without a message."""

import sys

from stepctl.system import interrupt


def main() -> None:
    """Import the command line and run it."""
    interrupt.install_handler()
    try:
        from stepctl.errors import UnsupportedSystemError, check_system

        try:
            check_system()
        except UnsupportedSystemError as error:
            sys.exit(f"stepctl: {error}")  # exit code 1
        from stepctl.cli.main import main as run
    except BaseException as error:
        if interrupt.was_received() or isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        raise
    run()


if __name__ == "__main__":
    main()
