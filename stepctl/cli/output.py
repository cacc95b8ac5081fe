"""Output of the commands to stdout, which is for data."""

import io
import os
import sys
from typing import Any

import click


def echo(text: object = "", *, nl: bool = True, color: bool | None = None) -> None:
    """Print to stdout in its own encoding; click alone would write UTF-8 to an ASCII stream."""
    click.echo(text, file=sys.stdout, nl=nl, color=color)


def echo_json(value: object) -> None:
    """Print a value as JSON to stdout."""
    import json

    echo(json.dumps(value, indent=2))


def can_show(characters: str) -> bool:
    """Tell whether the encoding of stdout has all of these characters."""
    try:
        characters.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def prepare_stdout() -> None:
    """Keep the exit code of a command whose reader leaves early, as in `... | head -1`.

    A character that the stream's encoding lacks is escaped, as Python does on stderr.
    """
    old = sys.stdout
    if old is None:  # the shell's >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if not isinstance(old, io.TextIOWrapper) or old is not sys.__stdout__:
        return
    old.flush()
    binary = io.BufferedWriter(_StdoutFile(old.fileno(), "wb", closefd=False))
    errors = "backslashreplace" if old.errors == "strict" else old.errors
    sys.stdout = io.TextIOWrapper(binary, old.encoding, errors, line_buffering=old.isatty())


class _StdoutFile(io.FileIO):
    """Discards output after the reader of the pipe has closed it; other errors name <stdout>."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            redirect_to_null(self.fileno())
            return memoryview(data).nbytes
        except OSError as error:
            error.filename = "<stdout>"
            raise


def redirect_to_null(descriptor: int) -> None:
    """Discard all further output to a descriptor."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
