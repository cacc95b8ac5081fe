"""Messages on stderr, and what the terminal can show."""

import contextlib
import os
import sys
from typing import TextIO

from stepctl.errors import printable


def say(message: str) -> None:
    """Print a message to stderr; errors of the stream are ignored, so that training continues."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write("".join(f"{printable(line)}\n" for line in message.split("\n")))


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a stream is a terminal that can move its cursor and show colors."""
    if stream is None or not stream.isatty():
        return False
    return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def is_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules
