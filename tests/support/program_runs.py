"""Runs of the programs in tests/program_examples/, in all forms, and readers of what they leave."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import stepctl
from stepctl.state.program_state import ProgramState
from tests.support import runs
from tests.support.program_examples import Example, LossExample
from tests.support.run_checks import checkpoints

FORMS = ("program", "script")
LOSS = "loss"  # the form of a LossExample
AnyExample = Example | LossExample
CADENCES = {"log_every": 3, "checkpoint_every": 7, "keep_last": 100}
_WALL_CLOCK = {"steps_per_second", "samples_per_second"}


def config(example: AnyExample, *, last_step: int, **cadences: int) -> dict[str, Any]:
    """Return the config of an example."""
    cadences = CADENCES | cadences
    stop: dict[str, Any] = {"last_step": last_step}
    if example.when:
        stop["when"] = example.when
    return {
        "seed": 0,
        **example.sections(),
        "stop": stop,
        "log": {"every": cadences["log_every"]},
        "checkpoint": {
            "every": cadences["checkpoint_every"],
            "keep_last": cadences["keep_last"],
        },
        "numerics": {"threads": 1},
    }


def train(
    example: AnyExample, form: str, run_dir: Path, last_step: int | None = None, **cadences: int
) -> Mapping[str, Any]:
    """Start or continue a run in this process; return the state, or the parameters, that it ended with."""
    target = example.last_step if last_step is None else last_step
    if form == "script":
        assert isinstance(example, Example)
        variables = run_script(
            example.file("script"), run_dir, last_step=target, **CADENCES | cadences
        )
        state: dict[str, Any] = variables["state"]
        return state
    if checkpoints(run_dir):
        run = stepctl.resume(run_dir, last_step=target, say=runs.silent)
    else:
        settings = config(example, last_step=target, **cadences)
        run = stepctl.create(settings, run_dir, say=runs.silent)
    with run:
        run.train()
    program = run.state.program
    if program is None:
        return run.state.params
    assert isinstance(program, ProgramState)
    return program.live


def run_script(path: Path, run_dir: Path, **settings: Any) -> dict[str, Any]:
    """Run a script with another run directory and other arguments of `stepctl.loop`; return its variables."""
    loop: Callable[..., Any] = stepctl.loop

    def replaced(_: str, state: dict[str, Any], **arguments: Any) -> Any:
        return loop(run_dir, state, **arguments | settings)

    with mock.patch.object(stepctl, "loop", replaced):
        return runpy.run_path(str(path))


def script_process() -> None:
    """Run a script in a process of `processes.start(..., call=script_process)`: file, run directory, settings."""
    file, run_dir, settings = sys.argv[1:]
    run_script(Path(file), Path(run_dir), **json.loads(settings))


def saved_state(run_dir: Path, step: int | None = None) -> dict[str, Any]:
    """Return counters, arrays and values of a checkpoint, of the newest one by default."""
    files = checkpoints(run_dir)
    path = files[max(files) if step is None else step]
    content = runs.content(path)
    state = ("counters/", "state/", "params/", "optimizers/", "ema/", "buffers/", "hooks/")
    found = {
        name: item
        for name, item in content.items()
        if name.startswith(state) or name in ("values", "@global_step")
    }
    assert "values" in found or any(name.startswith("params/") for name in found)
    return found


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics rows of a run without the columns that depend on the time."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in _WALL_CLOCK}
        for line in lines
    ]
