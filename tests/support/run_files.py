"""The files of a run as another process sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py


def file_contents(folder: Path, *without: str) -> dict[str, bytes]:
    """Return the content of every file below a folder by its path, except for some names."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in without]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a run's file; the line that is being written does not count."""
    path = run / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def events(run: Path, event: str) -> list[dict[str, Any]]:
    return [row for row in rows(run, "ledger.jsonl") if row["event"] == event]


def saved(run: Path) -> int:
    return max((row["step"] for row in events(run, "checkpoint")), default=0)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [
        {key: row[key] for key in row if key != "samples_per_second"}
        for row in rows(run, "metrics.jsonl")
    ]


def arrays(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return the type, shape and bytes of all that a checkpoint holds."""
    found = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype.str, item.shape, item[()].tobytes())

    with h5py.File(path) as file:
        file.visititems(visit)
    return found
