"""What people want to know about a checkpoint, and about a run before it starts."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stepctl import yamlio
from stepctl.arena import Array
from stepctl.assembly import Assembly
from stepctl.checkpoint import codec, userblock
from stepctl.checkpoint.store import Store
from stepctl.errors import CheckpointError
from stepctl.rundir import RunDirectory

_SLICE = 1 << 20  # elements read at a time
_SHOWN = 8  # steps listed of a cadence before the rest is left out


def open_path(path: Path, report: Callable[[str], None]) -> codec.Reader:
    """Open a checkpoint, or a run's newest good one."""
    if not path.is_dir():
        return codec.Reader(path)
    directory = RunDirectory(path)
    if not directory.checkpoints.is_dir():
        raise CheckpointError("none", f"{path}: neither a checkpoint nor a run (no checkpoints/ in it)")
    return Store(directory.checkpoints).newest(report)


def inspect(reader: codec.Reader, pattern: str = "*") -> dict[str, Any]:
    """Return all that a checkpoint holds: header, counters, config, numerics, and figures of the arrays.

    `pattern` (fnmatch) chooses arrays by path, such as "params/*" or "*/weight".
    """
    header, shapes = reader.header, reader.array_shapes()
    n_parameters = sum(math.prod(shape) for path, (shape, _) in shapes.items() if path.startswith("params/"))
    return {
        "file": reader.name,
        "global_step": header.global_step,
        "created_by": header.created_by,
        "run": header.run,
        "sha256": header.sha256,
        "counters": header.counters,
        "parameters": n_parameters,
        "arrays": [
            {"path": path, "shape": list(shape), "dtype": dtype, **figures(reader, path)}
            for path, (shape, dtype) in shapes.items()
            if fnmatch.fnmatchcase(path, pattern)
        ],
        "config": yamlio.loads(header.config, f"{reader.name}:/config").value,
        "numerics": json.loads(header.numerics),
    }


def figures(reader: codec.Reader, path: str) -> dict[str, Any]:
    """Return count, min, max, mean, std (of the finite values, in float64) and the number of non-finite ones."""
    (shape, dtype), n_finite = reader.array_shapes()[path], 0
    low, high, total, squares = math.inf, -math.inf, 0.0, 0.0
    values = np.empty(shape, dtype)
    reader.read_into(path, values)
    flat = values.reshape(-1)
    shift = 0.0
    for start in range(0, flat.size, _SLICE):
        part = _finite(flat[start : start + _SLICE])
        if part.size:
            shift = float(part[0]) if not n_finite else shift
            low, high = min(low, float(part.min())), max(high, float(part.max()))
            total += float((part - shift).sum())
            squares += float(np.square(part - shift).sum())
            n_finite += part.size
    count = int(flat.size)
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


def plan(assembly: Assembly, directory: RunDirectory) -> dict[str, Any]:
    """Return what a fresh run would do, without doing it: shapes, sizes in bytes, and the steps of each event."""
    config, state = assembly.config, assembly.state
    first, last = config.initial_step, config.target(config.initial_step)
    image = codec.encode(
        state, run=directory.name, config=yamlio.dumps(config.plain()), numerics=json.dumps(assembly.numerics)
    )
    n_sums = config.data.shards.bit_length()
    steps = range(first + 1, last + 1)
    return {
        "run_dir": str(directory.path),
        "samples": {
            "training": assembly.training.part.n,
            "validation": assembly.validation.part.n if assembly.validation else 0,
            "shape": list(assembly.sources[0].sample_shape),
        },
        "parameters": {name: list(shape) for name, shape in state.params.shapes.items()},
        "n_parameters": state.params.n_elements,
        "bytes": {
            "state": state.n_bytes,
            "gradients": state.params.n_bytes * n_sums,
            "checkpoint": userblock.SIZE + image.n_bytes,
        },
        "steps": [first, last],
        "log": [step for step in steps if step in (first + 1, last) or config.log.fires(step)],
        "evaluate": [step for step in steps if assembly.validation and (step == last or config.evaluate.fires(step))],
        "save": [first, *(step for step in steps if step == last or config.checkpoint.fires(step))],
    }


def abbreviate(steps: list[int]) -> str:
    """Return steps in few words: "1, 10, 20, ..., 100 (12 times)"."""
    if len(steps) <= _SHOWN:
        return ", ".join(map(str, steps)) or "never"
    return f"{', '.join(map(str, steps[: _SHOWN - 2]))}, ..., {steps[-1]} ({len(steps)} times)"
