"""Standard output: readers that leave early, encodings without the letters, terminals without a cursor."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

import click


class _MayEnd(io.FileIO):
    """A pipe that takes what is written to it, be there a reader or not."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return memoryview(data).nbytes
        except OSError as error:
            error.filename = "<stdout>"
            raise


def prepare_stdout() -> None:
    """Let a command end with the exit code of its answer although the reader left early, as in `... | head -1`.

    A letter that the stream's encoding lacks is written as its escape, as Python does on stderr.
    """
    old = sys.stdout
    if old is None:  # the shell's >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if not isinstance(old, io.TextIOWrapper) or old is not sys.__stdout__:
        return
    old.flush()
    pipe = io.BufferedWriter(_MayEnd(old.fileno(), "wb", closefd=False))
    errors = "backslashreplace" if old.errors == "strict" else old.errors
    sys.stdout = io.TextIOWrapper(pipe, old.encoding, errors, line_buffering=old.isatty())


def echo(text: object = "", *, nl: bool = True, color: bool | None = None) -> None:
    """Print to stdout in its own encoding; click alone would write UTF-8 to a stream of ASCII."""
    click.echo(text, file=sys.stdout, nl=nl, color=color)


def can_show(letters: str) -> bool:
    """Tell whether the encoding of stdout has all of these letters."""
    try:
        letters.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a stream is a terminal that can move its cursor and show colors."""
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return stream is not None and stream.isatty() and not dumb
