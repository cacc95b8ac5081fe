"""A file STOP in the run directory saves and ends the run, which resumes once it is gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stepctl.checkpoint.store import Store
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import Config
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import create_run, resume_run
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from stepctl.stopping.rules import StopAtStep, StopFile
from tests.support.runs import make_config, resume, rows, silent, train

COUNTERS = Counters({"global_step": 5, "samples_seen": 0})


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of 12 steps, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    np.savez("a.npz", x=generator.normal(size=(60, 4)), y=generator.integers(0, 3, 60))
    data = {"name": "arrays", "path": "a.npz", "batch_size": 8, "validation_fraction": 0.5}
    config = make_config(
        data=data, model={"name": "mlp", "hidden": [3]}, stop={"last_step": 12}, log={"every": 1}
    )
    Path("c.yaml").write_text(yaml.dumps(config.plain()))
    return config


def call(*arguments: str) -> tuple[int, str]:
    """Run the command line; return its exit code and its last message."""
    result = CliRunner().invoke(cli, arguments)
    return result.exit_code, result.stderr.splitlines()[-1]


class Touch(Hook):
    """Makes the file after a step."""

    name = "touch"

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self.step:
            Path("run/STOP").touch()


def test_the_file_is_looked_for_at_once_and_then_once_a_second(tmp_path: Path) -> None:
    now = [100.0]
    rule = StopFile(tmp_path / "STOP", clock=lambda: now[0])
    reason = StopReason("file STOP", done=True, remedy=f"remove {tmp_path / 'STOP'} to continue")

    def at(time: float) -> StopReason | None:
        now[0] = time
        return rule.reason(COUNTERS)

    assert at(100) is None
    (tmp_path / "STOP").touch()
    assert [at(100.5), at(100.99), at(101), at(101.5)] == [None, None, reason, reason]
    (tmp_path / "STOP").unlink()
    assert [at(101.9), at(102)] == [reason, None]
    (tmp_path / "STOP").touch()
    assert StopFile(tmp_path / "STOP", clock=lambda: now[0]).reason(COUNTERS) == reason


@pytest.mark.process
def test_a_run_that_finds_the_file_saves_and_resumes_to_the_same_bits(config: Config) -> None:
    whole = train(config, Path("whole"))
    with create_run(config, RunDirectory("run"), hooks=[Touch(5)]) as segment:
        segment.rules = [
            StopAtStep(12),
            StopFile(Path("run/STOP"), clock=iter(range(100)).__next__),
        ]
        outcome = segment.train()
    assert (outcome.reason.text, outcome.reason.done, outcome.step) == ("file STOP", True, 5)
    assert Store(Path("run/checkpoints")).steps() == [0, 5]
    Path("run/STOP").unlink()
    assert resume(Path("run")).same_bits(whole)
    assert rows(Path("run")) == rows(Path("whole"))
    assert verify("run")[1] == []


@pytest.mark.training
def test_the_command_says_how_to_continue_the_run_and_exits_with_0(config: Config) -> None:
    assert call("train", "--config", "c.yaml", "--run-dir", "run", "--last-step", "3")[0] == 0
    before = Path("run/ledger.jsonl").read_text()
    Path("run/STOP").touch()
    nothing = (
        "run: at global step 3, target 9: nothing to do (file STOP; remove run/STOP to continue)"
    )
    for line in (
        ["resume", "run", "--last-step", "9"],
        ["resume", "run", "--last-step", "9", "-q"],
    ):
        assert call(*line) == (0, nothing)
    assert Path("run/ledger.jsonl").read_text() == before
    Path("run/STOP").unlink()
    with resume_run(RunDirectory("run"), ResumeOptions(), silent) as segment:
        assert segment.nothing_to_do == (
            "at global step 3, target 3: nothing to do (more: --num-steps N)"
        )
    assert call("resume", "run", "--last-step", "9") == (0, "run: done at global step 9 (local 6)")


def test_a_fresh_run_that_finds_it_has_its_first_checkpoint(config: Config) -> None:
    assert call("train", "--config", "c.yaml", "--run-dir", "run", "--max-time", "1h")[0] == 0
    for path in Path("run").glob("checkpoints/*"):
        path.unlink()
    for name in ("ledger.jsonl", "metrics.jsonl"):
        Path("run", name).unlink()
    Path("run/STOP").touch()  # beside what a start that was killed early leaves
    line = "run: stopped at global step 0 (file STOP); remove run/STOP to continue"
    assert call("train", "--config", "c.yaml", "--run-dir", "run", "-q") == (0, line)
    assert Store(Path("run/checkpoints")).steps() == [0]
    Path("run/STOP").unlink()
    assert call("resume", "run") == (0, "run: done at global step 12")


@pytest.mark.process
def test_going_back_sets_nothing_aside_while_the_stop_file_exists(config: Config) -> None:
    train(make_config(**{**config.plain(), "checkpoint": {"every": 4}}), Path("run"))
    Path("run/STOP").touch()
    nothing = (
        "run: at global step 4, target 12: nothing to do (file STOP; remove run/STOP to continue)"
    )
    assert call("resume", "run", "--from-step", "4") == (0, nothing)
    assert Store(Path("run/checkpoints")).steps() == [4, 8, 12]
    assert verify("run")[1] == []


@pytest.mark.process
def test_the_stop_rules_are_evaluated_once_for_all_callers(config: Config) -> None:
    train(make_config(**{**config.plain(), "checkpoint": {"every": 4}}), Path("run"))
    with resume_run(RunDirectory("run"), ResumeOptions(from_step=4), silent) as segment:
        Path("run/STOP").touch()
        segment.rules = [StopAtStep(12), StopFile(Path("run/STOP"))]
        said = segment.nothing_to_do
        assert said == (
            "at global step 4, target 12: nothing to do (file STOP; remove run/STOP to continue)"
        )
        Path("run/STOP").unlink()
        assert segment.nothing_to_do == said
    assert not list(Path("run").rglob("*.aside-*")), (
        "nothing is set aside by a segment that does not begin"
    )
    assert verify("run")[1] == []
