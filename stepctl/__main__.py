"""The entry of the command line; a Ctrl-C that comes while it is being loaded ends in silence."""

import sys


def main() -> None:
    """Load the command line and run it."""
    try:
        from stepctl.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
