"""Runs with a mirror: a blank machine continues them with the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from stepctl.config.model import Config
from stepctl.hooks.base import Hook
from stepctl.mirror import fetch
from stepctl.mirror.claimed import pulled_run
from stepctl.mirror.store import open_store
from stepctl.programs.base import Metrics
from stepctl.reports.mirror import verify_mirror
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.state.train_state import TrainState
from tests.support.runs import (
    content,
    make_config,
    resume,
    rows,
    silent,
    train,
)

pytestmark = pytest.mark.training


class Killed(BaseException):
    """The process ends here; unlike after an error, nothing is saved."""


class Kill(Hook):
    """Ends the process, so to speak, after a step."""

    name = "kill"

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self._step:
            raise Killed


def mirrored(folder: Path, **sections: Any) -> Config:
    """Return the config of a run with a mirror in the folder."""
    section = {"url": f"file://{folder}/store", "wait_at_stop": 20}
    section |= sections.pop("mirror", {})
    return make_config(**{"checkpoint": {"every": 5}, **sections}, mirror=section)


def newest(folder: Path) -> Any:
    """Return the newest commit of the mirror in a folder."""
    return fetch.read_mirror(open_store(f"file://{folder}/store"))


def resume_fetched(folder: Path, path: Path, say: Any = silent, **options: Any) -> TrainState:
    """Fetch the run of the mirror into a new directory, and resume it."""
    url = f"file://{folder}/store"
    with pulled_run(url, RunDirectory(path), say, take_over=False) as claimed:
        assert claimed is not None
        return resume(path, say=say, claimed=claimed, **options)


def test_a_blank_machine_continues_with_the_same_bits(tmp_path: Path) -> None:
    train(make_config(checkpoint={"every": 5}), tmp_path / "once")
    config = mirrored(tmp_path, stop={"last_step": 23})
    train(config, tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    resume_fetched(tmp_path, tmp_path / "there", last_step=40)
    there = content(tmp_path / "there" / "checkpoints" / "step-00000040.h5")
    once = content(tmp_path / "once" / "checkpoints" / "step-00000040.h5")
    for found in (there, once):
        del found["config"], found["@run"]
    assert there == once
    assert rows(tmp_path / "there") == rows(tmp_path / "once")
    _, problems = verify(str(tmp_path / "there"))
    assert problems == []
    commits, damaged = verify_mirror(open_store(f"file://{tmp_path}/store"))
    assert damaged == []
    assert commits[0]["step"] == newest(tmp_path).step == 40
    assert len(commits) == 3
