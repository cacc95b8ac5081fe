"""A resume of a finished run builds nothing, and imports nothing of the user's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import parse_config
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run
from tests.support.runs import make_config

pytestmark = pytest.mark.training

PROGRAM = """
import numpy as np
import stepctl


class Counter(stepctl.Program):
    def initial_state(self, rng):
        return {"n": 0}

    def step(self, state, step, rng):
        state["n"] += 1
        return {"n": state["n"]}

    def evaluate(self, state, rng):
        return {"flat": 1.0}
"""
BASE: dict[str, Any] = {
    "program": {"name": "counter:Counter"},
    "stop": {"last_step": 6},
    "checkpoint": {"every": 2},
    "evaluate": {"every": 1},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "counter.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "counter", raising=False)
    return tmp_path


def train(**sections: Any) -> None:
    config = parse_config(yaml.Document({**BASE, **sections}))
    with create_run(config, RunDirectory("run")) as segment:
        segment.train()


def resume_without_program(folder: Path, *options: str) -> tuple[int, str]:
    """Resume the run where the import of its program fails."""
    (folder / "counter.py").write_text("raise RuntimeError('imported')\n")
    sys.modules.pop("counter", None)
    done = CliRunner().invoke(cli, ["resume", "run", *options])
    return done.exit_code, done.stderr.strip()


STOPS = {
    "at its target": ({"last_step": 6}, "at global step 6, target 6: nothing to do"),
    "by a metric": (
        {"last_step": 6, "when": {"metric": "n", "above": 3}},
        "at global step 4, target 6: nothing to do (n 4 is above 3;",
    ),
    "early": (
        {"last_step": 6, "early_stopping": {"patience": 2, "metric": "flat", "mode": "min"}},
        "at global step 3, target 6: nothing to do (early stopping:",
    ),
}


@pytest.mark.parametrize(("stop", "said"), STOPS.values(), ids=STOPS.keys())
def test_a_finished_run_is_recognised_without_its_program(
    folder: Path, stop: dict[str, Any], said: str
) -> None:
    train(stop=stop)
    before = Path("run/ledger.jsonl").read_text()
    code, message = resume_without_program(folder)
    assert code == 0
    assert message.startswith(f"run: {said}")
    assert Path("run/ledger.jsonl").read_text() == before


@pytest.mark.parametrize("options", [("--num-steps", "1"), ("--set", "stop.last_step=9")])
def test_a_run_that_continues_needs_its_program(folder: Path, options: tuple[str, ...]) -> None:
    train()
    code, message = resume_without_program(folder, *options)
    assert code == 2
    assert "imported (counter.py:1)" in message


def test_a_run_whose_newest_checkpoint_is_lost_continues(folder: Path) -> None:
    train()
    Path("run/checkpoints/step-00000006.h5").unlink()
    done = CliRunner().invoke(cli, ["resume", "run"])
    assert done.exit_code == 0
    assert "step-00000006.h5" in done.stderr
    assert "run: done at global step 6 (local 2)" in done.stderr


@pytest.fixture
def finished_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of a task whose training file is gone."""
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("0.1,0.2,0\n0.3,0.1,1\n" * 10)
    train_task = make_config(
        data={"name": "csv", "path": "rows.csv", "batch_size": 4},
        model={"name": "mlp", "hidden": [3]},
        task={"name": "classification"},
        stop={"last_step": 6},
        checkpoint={"every": 2},
        evaluate={},
    )
    with create_run(train_task, RunDirectory("run")) as segment:
        segment.train()
    Path("rows.csv").unlink()
    return tmp_path / "run"


def test_a_finished_task_needs_no_data(finished_task: Path) -> None:
    before = {path: path.read_bytes() for path in finished_task.rglob("*") if path.is_file()}
    done = CliRunner().invoke(cli, ["resume", "run"])
    assert (done.exit_code, done.stderr.strip()) == (
        0,
        "run: at global step 6, target 6: nothing to do (more: --num-steps N)",
    )
    assert before == {
        path: path.read_bytes() for path in finished_task.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("options", [("--num-steps", "1"), ("--from-step", "4")])
def test_a_task_that_continues_needs_its_data(
    finished_task: Path, options: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(cli, ["resume", "run", *options])
    assert done.exit_code == 2
    assert "rows.csv" in done.stderr


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_task_whose_newest_checkpoint_is_lost_needs_its_data(
    finished_task: Path, damage: str
) -> None:
    newest = finished_task / "checkpoints" / "step-00000006.h5"
    content = bytearray(newest.read_bytes())
    newest.unlink()
    if damage == "changed":
        content[-1] ^= 1
        newest.write_bytes(content)
    done = CliRunner().invoke(cli, ["resume", "run"])
    assert done.exit_code == 2
    assert "rows.csv" in done.stderr


@pytest.mark.usefixtures("folder")
def test_a_change_of_a_finished_run_is_not_dropped_without_a_word() -> None:
    train()
    before = Path("run/ledger.jsonl").read_text()
    done = CliRunner().invoke(cli, ["resume", "run", "--set", "log.every=2"])
    assert done.exit_code == 0
    first, second = done.stderr.strip().splitlines()
    assert first == "note: the run is finished, so --set changes nothing"
    assert second.startswith("run: at global step 6, target 6: nothing to do")
    assert Path("run/ledger.jsonl").read_text() == before
