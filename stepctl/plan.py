"""What people want to know about a run before it starts."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from stepctl import yamlio
from stepctl.assembly import Assembly
from stepctl.checkpoint import codec, userblock
from stepctl.config import Cadence
from stepctl.rundir import RunDirectory
from stepctl.state import crosses

_SHOWN = 8  # steps listed of a cadence before the rest is left out


def plan(assembly: Assembly, directory: RunDirectory) -> dict[str, Any]:
    """Return what a fresh run would do, without doing it: shapes, sizes in bytes, and the steps of each event."""
    config, state = assembly.config, assembly.state
    first, last = config.initial_step, config.target(config.initial_step)
    arenas = {path: arena for path, arena in state.arenas.items() if f"{path}/".startswith("params/")}
    parameters = {
        f"{path}/{name}".removeprefix("params/"): list(shape)
        for path, arena in arenas.items()
        for name, shape in arena.shapes.items()
    }
    image = codec.encode(
        state, run=directory.name, config=yamlio.dumps(config.plain()), numerics=json.dumps(assembly.numerics)
    )
    n_sums = config.data.shards.bit_length()
    steps, fires = range(first + 1, last + 1), partial(_fires, assembly)
    return {
        "run_dir": str(directory.path),
        "samples": {
            "training": assembly.training.part.n,
            "validation": assembly.validation.part.n if assembly.validation else 0,
            "shape": list(assembly.sources[0].sample_shape),
        },
        "parameters": parameters,
        "n_parameters": sum(arena.n_elements for arena in arenas.values()),
        "bytes": {
            "state": state.n_bytes,
            "gradients": sum(arena.n_bytes for arena in arenas.values()) * n_sums,
            "checkpoint": userblock.SIZE + image.n_bytes,
        },
        "steps": [first, last],
        "log": [step for step in steps if step in (first + 1, last) or fires(config.log, step)],
        "evaluate": [step for step in steps if assembly.validation and (step == last or fires(config.evaluate, step))],
        "save": [first, *(step for step in steps if step == last or fires(config.checkpoint, step))],
    }


def _fires(assembly: Assembly, cadence: Cadence, step: int) -> bool:
    before, after = (assembly.count_at(cadence.counter, at) for at in (step - 1, step))
    return cadence.every is not None and crosses(before, after, cadence.every, cadence.offset)


def abbreviate(steps: list[int]) -> str:
    """Return steps in few words: "1, 10, 20, ..., 100 (12 times)"."""
    if len(steps) <= _SHOWN:
        return ", ".join(map(str, steps)) or "never"
    return f"{', '.join(map(str, steps[: _SHOWN - 2]))}, ..., {steps[-1]} ({len(steps)} times)"
