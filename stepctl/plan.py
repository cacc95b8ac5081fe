"""What people want to know about a run before it starts."""

from __future__ import annotations

import json
from typing import Any

from stepctl import yamlio
from stepctl.assembly import Assembly
from stepctl.checkpoint import codec, userblock
from stepctl.config import Cadence
from stepctl.rundir import RunDirectory

_SHOWN = 8  # steps listed of a cadence before the rest is left out


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
        "log": [step for step in steps if step in (first + 1, last) or _fires(config.log, step)],
        "evaluate": [step for step in steps if assembly.validation and (step == last or _fires(config.evaluate, step))],
        "save": [first, *(step for step in steps if step == last or _fires(config.checkpoint, step))],
    }


def _fires(cadence: Cadence, step: int) -> bool:
    return cadence.every is not None and step % cadence.every == cadence.offset


def abbreviate(steps: list[int]) -> str:
    """Return steps in few words: "1, 10, 20, ..., 100 (12 times)"."""
    if len(steps) <= _SHOWN:
        return ", ".join(map(str, steps)) or "never"
    return f"{', '.join(map(str, steps[: _SHOWN - 2]))}, ..., {steps[-1]} ({len(steps)} times)"
