"""Functions that receive the messages of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Say = Callable[[str], None]


def silent(message: str) -> None:
    """Discard a message."""


class Messages(NamedTuple):
    """Receivers of a segment's warnings, its notes, and a line for each saved checkpoint."""

    say: Say
    note: Say = silent
    report_saved: Say = silent
