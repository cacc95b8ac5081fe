"""Buffered metrics rows are written before checkpoints, messages, errors and manual steps.

The fixture `held` stops the writing of rows because of the time, except for a run's first."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import stepctl
from stepctl.checkpoint.store import Store
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import LogConfig
from stepctl.errors import StepctlError, StoppedAtOnce
from stepctl.hooks.base import Hook
from stepctl.hooks.log import Log
from stepctl.programs.base import Metrics
from stepctl.programs.supervised import Supervised
from stepctl.reports.verify import verify
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.writers.base import MetricsRow, Writer
from stepctl.writers.row_buffer import HOLD_SECONDS, RowBuffer
from tests.support.runs import BASE, make_config, resume, rows, train
from tests.training.test_non_finite import spoiled

EACH_STEP: dict[str, Any] = {"log": {"every": 1}, "evaluate": {"every": None}}


class Kept(Writer):
    """Keeps what it is given, together as it came; from `fails` on it fails, with the row half written."""

    def __init__(self, fails: float = math.inf, error: BaseException | None = None) -> None:
        self.steps: list[list[int]] = []
        self.rows: list[MetricsRow] = []
        self._fails, self._error = fails, error or StepctlError("no room")

    def write(self, rows: Sequence[MetricsRow]) -> None:
        self.steps.append([row["step"] for row in rows])
        self.rows += rows
        if rows[-1]["step"] >= self._fails:
            raise self._error

    def sync(self) -> None:
        return None

    def close(self) -> None:
        return None


class At(Hook):
    """Does something after one step."""

    name = "at"

    def __init__(self, step: int, act: Any) -> None:
        self._step, self._act = step, act

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self._step:
            self._act()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepctl.writers.row_buffer.HOLD_SECONDS", math.inf)


@pytest.fixture
def in_the_foreground(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save on the training thread: nothing else changes a run that is copied between two steps."""
    monkeypatch.setattr(ThreadPoolExecutor, "submit", finished)


def finished(_: ThreadPoolExecutor, function: Any, *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future


def steps(path: Path) -> list[int]:
    """Return the steps that metrics.jsonl has."""
    file = path / "metrics.jsonl"
    return [row["step"] for row in rows(path)] if file.exists() else []


def row(step: int, kind: str = "train") -> MetricsRow:
    return {"step": step, "kind": kind}


# --- when a row waits


def test_rows_that_come_soon_after_others_are_written_with_the_first_that_does_not() -> None:
    now, kept = [0.0], Kept()
    rows = RowBuffer(lambda: now[0])
    rows.open([kept])
    for step, seconds in enumerate(
        [5.0, 5.0, 5.0 + HOLD_SECONDS / 2, 5.0 + 2 * HOLD_SECONDS, 9.0, 9.0]
    ):
        now[0] = seconds
        rows.hold(partial(row, step))
    assert kept.steps == [[0], [1, 2, 3], [4]]
    rows.add(row(6, "eval"))
    assert kept.steps[3:] == [[5, 6]]
    rows.hold(partial(row, 7))
    rows.close()
    assert kept.steps[4:] == [[7]]


def test_a_held_row_has_the_metrics_of_its_own_step() -> None:
    rows, kept = RowBuffer(lambda: 0.0), Kept()
    rows.open([kept])
    log = Log(LogConfig(every=1), rows, ["loss"], first_step=1, n_samples=None)
    state = TrainState(Counters({"global_step": 0, "samples_seen": 0}), {})
    metrics = {"loss": 0.0}  # the same dict at each step
    log.start(state)
    for step in (1, 2, 3):
        state.counters.advance({"global_step": 1})
        metrics["loss"] = float(step)
        log.after_step(state, metrics)
    rows.flush()
    assert [(row["step"], row["loss"]) for row in kept.rows] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("error", [StepctlError("no room"), KeyboardInterrupt()])
def test_a_partly_written_row_is_never_continued(error: BaseException) -> None:
    rows, kept = RowBuffer(), Kept(fails=1, error=error)
    rows.open([kept])
    with pytest.raises(type(error)):
        rows.add(row(1))
    for _ in range(2):
        with pytest.raises(StepctlError, match=r"no room|was interrupted; close this run"):
            rows.flush()
    rows.close()
    assert kept.steps == [[1]]
    rows.open([other := Kept()])
    rows.add(row(1))
    assert other.steps == [[1]], "another segment begins anew"


# --- what never overtakes them


@pytest.mark.training
@pytest.mark.usefixtures("held")
def test_every_row_up_to_a_checkpoint_is_there_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[int]] = {}
    real = Store.publish

    def publish(store: Store, step: int, *arguments: Any) -> str:
        seen[step] = steps(tmp_path / "run")
        return real(store, step, *arguments)

    monkeypatch.setattr(Store, "publish", publish)
    train(
        make_config(**EACH_STEP, checkpoint={"every": 6}, stop={"last_step": 20}), tmp_path / "run"
    )
    assert list(seen) == [0, 6, 12, 18, 20]
    for step, there in seen.items():
        assert there[:step] == list(range(1, step + 1))


@pytest.mark.training
@pytest.mark.usefixtures("held")
def test_buffered_rows_are_written_before_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = Supervised.evaluate

    def evaluate(self: Supervised, state: TrainState, *arguments: Any, **options: Any) -> Metrics:
        seen.append(max(steps(tmp_path / "run"), default=0))
        return real(self, state, *arguments, **options)

    monkeypatch.setattr(Supervised, "evaluate", evaluate)
    train(
        make_config(log={"every": 1}, evaluate={"every": 8}, stop={"last_step": 20}),
        tmp_path / "run",
    )
    assert seen == [8, 16, 20]


@pytest.mark.usefixtures("held")
def test_messages_and_rows_are_printed_in_order(tmp_path: Path) -> None:
    config = spoiled(
        tmp_path, 17, on_nonfinite="skip", checkpoint={"every": 8}, stop={"last_step": 16}
    )
    (tmp_path / "c.yaml").write_text(yaml.dumps(config.plain()))
    words = ["train", "--config", tmp_path / "c.yaml", "--run-dir", tmp_path / "run", "-v"]
    said = CliRunner().invoke(cli, [*map(str, words)]).stderr.splitlines()
    at = {
        line.split("/")[0]: number
        for number, line in enumerate(said)
        if re.match(r"step \d+/16 ", line)
    }
    assert list(at) == [f"step {step}" for step in range(1, 17)]
    ((number, skipped),) = (
        (number, line) for number, line in enumerate(said) if "this batch is skipped" in line
    )
    step = int(re.findall(r"step (\d+):", skipped)[0])  # the one that it would have been
    assert step not in (1, 9), "where nothing waits"
    assert at[f"step {step - 1}"] < number < at[f"step {step}"]
    found = {
        int(line[11:19]): number for number, line in enumerate(said) if line.startswith("saved ")
    }
    assert set(found) == {0, 8, 16}
    assert all(number > at[f"step {step}"] for step, number in found.items() if step)


@pytest.mark.training
@pytest.mark.usefixtures("held")
def test_stepping_by_hand_every_row_is_there_when_a_call_returns(tmp_path: Path) -> None:
    with stepctl.create(
        {**BASE, **EACH_STEP, "stop": {"last_step": 9}}, tmp_path / "run", say=lambda _: None
    ) as run:
        run.step()
        assert steps(tmp_path / "run") == [1]
        run.step(4)
        assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
        run.train()
        assert steps(tmp_path / "run") == list(range(1, 10))


# --- what ends a run


@pytest.mark.training
@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("error", [RuntimeError("of a hook"), KeyboardInterrupt()])
def test_no_row_is_lost_at_an_error(error: BaseException, tmp_path: Path) -> None:
    def act() -> None:
        raise error

    with pytest.raises(StoppedAtOnce if isinstance(error, KeyboardInterrupt) else type(error)):
        train(make_config(**EACH_STEP), tmp_path / "run", (At(17, act),))
    assert steps(tmp_path / "run") == list(range(1, 18))


@pytest.mark.training
@pytest.mark.usefixtures("held", "in_the_foreground")
@pytest.mark.parametrize("step", [3, 7, 8, 14, 15])
def test_killed_with_rows_that_wait_and_resumed_a_run_has_each_once(
    step: int, tmp_path: Path
) -> None:
    left = tmp_path / "killed"
    config = make_config(
        log={"every": 1, "csv": True}, evaluate={"every": 5}, checkpoint={"every": 7}
    )
    copy = At(step, lambda: shutil.copytree(tmp_path / "run", left))  # what a kill would leave
    state = train(config, tmp_path / "run", (copy,))
    resumed = resume(left, hooks=(At(-1, None),))
    assert resumed.same_bits(state)
    assert rows(left) == rows(tmp_path / "run")
    assert (left / "metrics.csv").read_text().count("\n") == 1 + len(rows(left))
    assert not verify(str(left))[1]


@pytest.mark.training
@pytest.mark.usefixtures("held")
def test_no_checkpoint_follows_rows_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"

    def full(descriptor: int, chunk: bytes) -> None:
        raise OSError(28, "No space left on device")

    run = stepctl.create({**BASE, **EACH_STEP}, path, say=lambda _: None)
    run.step(3)
    with monkeypatch.context() as patch:
        patch.setattr("stepctl.writers.base.write_all", full)
        with pytest.raises(StepctlError, match=r"metrics.jsonl: .*No space left"):
            run.step(2)
    for go_on in (run.save, run.step, run.close):
        with pytest.raises(StepctlError, match=r"metrics.jsonl: .*No space left"):
            go_on()
    ledger = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in ledger if line["event"] == "checkpoint"] == [0]
    assert not verify(str(path))[1]
    resume(path)
    assert steps(path) == [*range(1, 41), 40]  # and an evaluation
