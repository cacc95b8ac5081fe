"""The files of a run's series, and the check that holds after every fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def contents(run: Path) -> dict[str, bytes]:
    """Return the bytes of the files of series, by file name."""
    return {path.name: path.read_bytes() for path in sorted((run / "series").glob("[!.]*"))}


def rows_to(run: Path, step: int) -> dict[str, bytes]:
    """Return the whole records up to a step, by the name of the series."""
    kept = {}
    for path in sorted((run / "series").glob("*.bin")):
        kind = json.loads(path.with_suffix(".json").read_text())
        record = np.dtype([("step", "<i8"), ("value", kind["dtype"], tuple(kind["shape"]))])
        content = path.read_bytes()
        records = np.frombuffer(content, record, len(content) // record.itemsize)
        n_rows = np.count_nonzero(np.logical_and.accumulate(_is_row(records["step"], step)))
        kept[path.stem] = records[:n_rows].tobytes()
    return kept


def _is_row(steps: np.ndarray, last: int) -> np.ndarray:
    """Tell for each record whether it is a row up to a step: its own is above the one before."""
    return (steps > np.concatenate([[0], steps[:-1]])) & (steps <= last)


def faults(run: Path, unbroken: Path, durable: int) -> list[str]:
    """Return the series of a stopped run that lack a row up to the step `durable`, or have others.

    What follows is cut by a resume; after a power cut it may be anything.
    """
    found = rows_to(run, durable)
    return [
        f"series {name}: rows up to step {durable} are lost or altered"
        for name, expected in rows_to(unbroken, durable).items()
        if found.get(name, b"") != expected
    ]


def is_beginning(run: Path, unbroken: Path) -> bool:
    """Tell whether the series of a run begin as the unbroken run's do, but for a torn record."""
    expected = contents(unbroken)
    for name, content in contents(run).items():
        whole = expected.get(name, b"")[: len(content)]
        if content != whole:
            return False
    return True
