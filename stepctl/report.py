"""What people want to know about a checkpoint."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from stepctl import files, registry, tasks, yamlio
from stepctl.arena import Array
from stepctl.checkpoint import codec
from stepctl.checkpoint.expected import missing_checkpoints, newer_missing
from stepctl.checkpoint.store import Store
from stepctl.errors import CheckpointError, StepctlError
from stepctl.rundir import RunDirectory
from stepctl.state import GLOBAL_STEP


def open_path(path: str, report: Callable[[str], None]) -> codec.Reader:
    """Open a checkpoint, or a run's newest good one."""
    if not files.is_directory(path):
        return codec.Reader(path)
    directory = RunDirectory(path)
    if not files.is_directory(directory.checkpoints):
        raise CheckpointError("none", f"{path}: neither a checkpoint nor a run (no checkpoints/ in it)")
    store = Store(directory.checkpoint_folder, directory.records)
    reader = store.newest(report)
    missing = missing_checkpoints(directory.read_ledger, store.steps)
    if (message := newer_missing(missing, reader.header.global_step)) is not None:
        report(message)
    return reader


def inspect_path(path: str, pattern: str) -> dict[str, Any]:
    """Return "facts", what `inspect` says of a checkpoint or a run's newest good one, and "said", what it skipped.

    Of a run the facts have "segment" and "parent" too, see there.
    """
    said: list[str] = []
    with open_path(path, said.append) as reader:
        facts = inspect(reader, pattern)
    if files.is_directory(path):
        ledger = RunDirectory(path).read_ledger()
        facts |= {"segment": segment(ledger), "parent": parent(ledger)}
    return {"facts": facts, "said": said}


def segment(ledger: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the newest segment: "number", "target", the steps "from" and "to", times, and why it ended.

    Without a line of its end ("ended" and "reason" are None) it runs or was killed, and "to" is its newest
    checkpoint's step. None if the run was never trained.
    """
    starts = [index for index, row in enumerate(ledger) if row["event"] == "start"]
    if not starts:
        return None
    start, *rest = ledger[starts[-1] :]
    end = next((row for row in rest if row["event"] == "end"), None)
    saved = [row["step"] for row in rest if row["event"] == "checkpoint"]
    return {
        "number": start["segment"],
        "from": start["step"],
        "to": end["step"] if end else max(saved, default=start["step"]),
        "target": start["target"],
        "started": _text(start.get("time")),
        "ended": _text(end.get("time")) if end else None,
        "reason": end["reason"] if end else None,
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else "?"


def parent(ledger: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return where a run was forked from, {"run", "step", "sha256", "changes"}; None if it began by itself."""
    for row in ledger:
        if row["event"] == "fork" and isinstance(row.get("parent"), str):
            given = row.get("changes")
            changes = [change for change in given if isinstance(change, dict)] if isinstance(given, list) else []
            return {"run": row["parent"], "step": row["step"], "sha256": row["sha256"], "changes": changes}
    return None


def inspect(reader: codec.Reader, pattern: str = "*") -> dict[str, Any]:
    """Return all that a checkpoint holds: header, counters, config, numerics, and figures of the arrays.

    `pattern` (fnmatch) chooses arrays by path, such as "params/*" or "*/weight".
    """
    header, shapes = reader.header, reader.array_shapes()
    config = yamlio.loads(header.config, f"{reader.name}:/config").value
    n_parameters = sum(math.prod(shape) for path, (shape, _) in shapes.items() if path.startswith("params/"))
    return {
        "file": reader.name,
        "global_step": header.global_step,
        "created_by": header.created_by,
        "run": header.run,
        "run_id": header.run_id,
        "sha256": header.sha256,
        "counters": header.counters,
        "relations": relations(header.counters, config),
        "parameters": n_parameters,
        "arrays": [
            {"path": path, "shape": list(shape), "dtype": dtype, **figures(reader.parts(path))}
            for path, (shape, dtype) in shapes.items()
            if fnmatch.fnmatchcase(path, pattern)
        ],
        "config": config,
        "numerics": json.loads(header.numerics),
    }


def relations(counters: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, bool] | None:
    """Return for each optimizer's counter whether it is what so many global steps of its task make.

    None if the task is not one of stepctl's own: a checkpoint never has anything imported.
    """
    spec, start = config.get("task"), config.get("initial_step")
    if not isinstance(spec, dict) or spec.get("name") not in tasks.NAMES or not isinstance(start, int):
        return None
    try:
        task = registry.build("tasks", spec, seed=0, dtype="float32", shards=1)
        expected = task.counts(counters[GLOBAL_STEP] - start)
    except (StepctlError, LookupError, ValueError, TypeError, ArithmeticError):
        return None
    return {name: counters.get(name) == count for name, count in expected.items()}


def figures(parts: Iterable[Array]) -> dict[str, Any]:
    """Return count, min, max, mean, std (of the finite values, in float64) and the number of non-finite ones."""
    low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
    count = n_finite = 0
    shift = 0.0
    for values in parts:
        count += values.size
        part = _finite(values)
        if part.size:
            shift = float(part[0]) if not n_finite else shift
            low, high = min(low, float(part.min())), max(high, float(part.max()))
            total += float((part - shift).sum())
            squares += float(np.square(part - shift).sum())
            n_finite += part.size
    if not n_finite:
        return {"count": count, "min": None, "max": None, "mean": None, "std": None, "non_finite": count}
    mean = total / n_finite
    spread = math.sqrt(max(squares / n_finite - mean * mean, 0.0))
    return {
        "count": count,
        "min": low,
        "max": high,
        "mean": mean + shift,
        "std": spread,
        "non_finite": count - n_finite,
    }


def _finite(values: Array) -> Array:
    wide = values.astype(np.float64)
    return wide[np.isfinite(wide)]
