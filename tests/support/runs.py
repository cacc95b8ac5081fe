"""A small config, training without the command line, and readers of a run's files."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py

from stepctl.checkpoint import codec, user_block
from stepctl.config import yaml
from stepctl.config.model import Config, StopConfig, parse_config
from stepctl.hooks.base import Hook
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.fork import Forked, ForkOptions, fork
from stepctl.runs.open import create_run, resume_run
from stepctl.runs.records import read_records
from stepctl.state.train_state import TrainState
from stepctl.training.trainer import Trainer

RUN_ID = "0123456789abcdef" * 2

BASE: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "digits", "batch_size": 48, "validation_fraction": 0.9},
    "model": {"name": "mlp", "hidden": [16], "dropout": 0.2},
    "task": {"name": "classification"},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
    "stop": {"last_step": 40},
    "log": {"every": 7},
    "evaluate": {"every": 15},
    "checkpoint": {"every": 1000},
    "numerics": {"threads": 1},
}


def make_config(**sections: Any) -> Config:
    """Return BASE with whole sections replaced, checked."""
    return parse_config(yaml.Document({**BASE, **sections}))


def silent(message: str) -> None:
    """Take a message and say nothing."""


def train(config: Config, path: Path, hooks: tuple[Hook, ...] = ()) -> TrainState:
    """Train a fresh run to its target; return the state that it ended with."""
    with create_run(config, RunDirectory(path), hooks=hooks) as segment:
        segment.train()
        return segment.state


def resume_options(path: Path, assignments: Iterable[str] = (), **options: Any) -> ResumeOptions:
    """Return the options of a resume with KEY=VALUE changes of the run's config."""
    document = None
    if assignments:
        document = RunDirectory(path).newest_config().with_assignments(assignments)
    return ResumeOptions(document=document, assignments=tuple(assignments), **options)


def resume(
    path: Path,
    *,
    last_step: int | None = None,
    hooks: tuple[Hook, ...] = (),
    say: Any = silent,
    **options: Any,
) -> TrainState:
    """Resume a run; return the state that it ended with."""
    stop = StopConfig(last_step=last_step) if last_step is not None else None
    with resume_run(
        RunDirectory(path), resume_options(path, stop=stop, **options), say, hooks
    ) as segment:
        if segment.nothing_to_do is None:
            segment.train()
        return segment.state


def file_bytes(image: codec.Image) -> bytes:
    """Return a whole checkpoint file, user block first."""
    body = b"".join(image)
    return user_block.make(hashlib.sha256(body).hexdigest(), len(body)) + body


def content(path: Path) -> dict[str, Any]:
    """Return the datasets' bytes and the root attributes of a checkpoint, without the run's id."""
    found: dict[str, Any] = {}

    def add(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.shape, item.dtype.str, item[()].tobytes())

    with h5py.File(path, "r") as file:
        file.visititems(add)
        attributes = {f"@{name}": value for name, value in file.attrs.items() if name != "run_id"}
    return found | attributes


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the metrics rows of a run without the time they took."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [
        {key: item for key, item in json.loads(line).items() if key != "samples_per_second"}
        for line in lines
    ]


def most_allocated(trainer: Trainer, *, steps: int) -> int:
    """Return the most bytes that one of the next steps had beside what was there before it."""
    most = 0
    tracemalloc.start()
    try:
        for _ in range(steps):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            trainer.step()
            most = max(most, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return most


def forked(
    parent: Path, child: Path, at: int | None = None, *assignments: str, say: Any = silent
) -> Forked:
    """Fork a run, with KEY=VALUE changes of its config."""
    directory = RunDirectory(parent)
    with directory.lock(say):
        records = read_records(directory)
        document = records.document.with_assignments(assignments) if assignments else None
        return fork(records, RunDirectory(child), ForkOptions(at, document), say)
