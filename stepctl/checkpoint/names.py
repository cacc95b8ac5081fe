"""What a checkpoint's file is called: step-%08d.h5."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FILE_NAME = re.compile(r"step-([0-9]{8,19})\.h5")


def file_name(step: int) -> str:
    """Return the file name of the checkpoint of a global step."""
    return f"step-{step:08d}.h5"


def step_of(name: str) -> int | None:
    """Return the step that a file name says, None if it is not one of a checkpoint."""
    match = _FILE_NAME.fullmatch(name)
    return int(match[1]) if match and file_name(int(match[1])) == name else None


def steps(names: Iterable[str]) -> list[int]:
    """Return the steps of those file names that are a checkpoint's, rising."""
    return sorted(step for name in names if (step := step_of(name)) is not None)
