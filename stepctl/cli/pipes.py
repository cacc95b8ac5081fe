"""What becomes of an answer that nobody reads to its end, as in `stepctl inspect RUN | head -1`."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


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


def let_stdout_end() -> None:
    """Let a command whose reader has gone come to its end, and to the exit code of its answer."""
    old = sys.stdout
    if old is None:  # the shell's >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if not isinstance(old, io.TextIOWrapper) or old is not sys.__stdout__:
        return
    old.flush()
    pipe = io.BufferedWriter(_MayEnd(old.fileno(), "wb", closefd=False))
    sys.stdout = io.TextIOWrapper(pipe, old.encoding, old.errors, line_buffering=old.isatty())
