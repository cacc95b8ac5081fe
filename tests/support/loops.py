"""A random walk with a state of every shape, as a script makes it with `stepctl.loop`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import stepctl
from stepctl.runs.loop import Loop
from tests.support.program_states import Emulator

Body = Callable[[Loop, dict[str, Any], int], None]


def new_state() -> dict[str, Any]:
    """The state of the walk before its first step."""
    return {
        "x": np.zeros(3),
        "chain": np.zeros((0, 3)),  # another shape at each step
        "columns": np.asfortranarray(np.zeros((2, 3))),
        "norms": [],
        "seen": {"largest": 0.0},
        "rng": np.random.default_rng(5),
        "emulator": Emulator(),
        "accepted": 0,
    }


def advance(run: Loop, state: dict[str, Any], step: int) -> None:
    """One step of the walk."""
    state["x"] += run.rng("proposal").standard_normal(3) + state["rng"].random(3)
    state["chain"] = np.concatenate([state["chain"], state["x"][np.newaxis]])
    state["columns"] *= 0.5
    state["columns"] += run.rng("columns").random((2, 3))
    norm = float(np.linalg.norm(state["x"]))
    state["norms"].append(norm)
    state["seen"]["largest"] = max(state["seen"]["largest"], norm)
    state["emulator"].names.append(f"step {step}")
    state["emulator"].memory[step % 4] += 1
    state["accepted"] += int(run.rng("accept").random() < 0.5)
    run.log(norm=norm)
    run.log({"accepted": state["accepted"]})


def walk(
    path: Path, last_step: int = 10, *, body: Body = advance, state: Any = None, **arguments: Any
) -> dict[str, Any]:
    """Run the loop to its end; return the state."""
    state = new_state() if state is None else state
    with stepctl.loop(path, state, last_step=last_step, **arguments) as run:
        for step in run:
            body(run, state, step)
    return dict(state)


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the metrics rows without the rate."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for row in found:
        row.pop("steps_per_second", None)
    return found


def saved(path: Path) -> list[int]:
    """Return the steps of the checkpoint files."""
    return sorted(int(file.stem.removeprefix("step-")) for file in (path / "checkpoints").iterdir())
