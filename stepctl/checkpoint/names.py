"""The file name of a checkpoint: step-%08d.h5."""

import re
from collections.abc import Iterable

_FILE_NAME = re.compile(r"step-([0-9]{8,19})\.h5")


def file_name(step: int) -> str:
    """Return the file name of a global step's checkpoint."""
    return f"step-{step:08d}.h5"


def step_of(name: str) -> int | None:
    """Return the step in a checkpoint's file name; None for any other name."""
    match = _FILE_NAME.fullmatch(name)
    if match is None or file_name(int(match[1])) != name:  # more leading zeros than 8 digits
        return None
    return int(match[1])


def steps(names: Iterable[str]) -> list[int]:
    """Return the steps of the file names that are a checkpoint's, in ascending order."""
    found = [step_of(name) for name in names]
    return sorted(step for step in found if step is not None)
