"""Background saves write the state as it was at the save, and report every error to the training thread."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.checkpoint import codec
from stepctl.checkpoint.background import Background
from stepctl.checkpoint.store import Store
from stepctl.config.model import CheckpointConfig
from stepctl.errors import StepctlError
from stepctl.hooks import save
from stepctl.hooks.base import Hook
from stepctl.hooks.save import Save
from stepctl.programs.base import Metrics
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.messages import Messages, silent
from stepctl.runs.open import create_run
from stepctl.state.arena import Arena
from stepctl.state.counters import Counters
from stepctl.state.train_state import SavedHook, TrainState
from stepctl.stopping.rules import TimeLimit
from tests.support.run_files import events
from tests.support.runs import RUN_ID, make_config, resume, rows, train

ALL = {"every": 1, "keep_last": None}


class Gate:
    """Stands in front of every publish, in the background: the writer waits there until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, open_until: int = 0) -> None:
        monkeypatch.setattr(save, "AT_ONCE_BYTES", -1)
        self.opened, self.waiting, self.calls = threading.Event(), threading.Event(), 0
        real = Store.publish

        def publish(store: Store, step: int, *arguments: Any) -> str:
            self.calls += 1
            if self.calls > open_until:
                self.waiting.set()
                assert self.opened.wait(30)
            return real(store, step, *arguments)

        monkeypatch.setattr(Store, "publish", publish)


class Watch(Hook):
    """Calls a function after each step, on the training thread."""

    name = "watch"

    def __init__(self, look: Callable[[int], object]) -> None:
        self.look = look

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.look(state.counters.global_step)


# --- arenas


def state_arena(shapes: dict[str, tuple[int, ...]], value: float = 0) -> Arena:
    """Return an arena such as a state has."""
    arena = Arena(shapes, "float32")
    for view in arena.values():
        view.fill(value)
    return arena.to_read_only(copy=False)


def overwrite(arena: Arena, value: float) -> None:
    """Make an update that sets all values."""
    new = arena.like()
    for view in new.values():
        view.fill(value)
    arena.copy_from(new)


def test_a_snapshot_keeps_its_values_through_one_update() -> None:
    arena = state_arena({"a": (3,), "b": ()}, 1)
    handed = arena.snapshot()
    assert np.shares_memory(handed.flat, arena.flat), "nothing is copied"
    overwrite(arena, 2)
    assert (arena["a"].tolist(), float(arena["b"])) == ([2, 2, 2], 2)
    assert (handed["a"].tolist(), float(handed["b"])) == ([1, 1, 1], 1)
    place = arena.flat.ctypes.data
    overwrite(arena, 3)
    assert (arena["a"].tolist(), arena.flat.ctypes.data) == ([3, 3, 3], place), "in place again"


def test_two_buffers_change_places_and_no_third_is_made() -> None:
    arena = state_arena({"a": (4,)})
    places = []
    for value in range(5):
        arena.snapshot()
        overwrite(arena, value)
        places.append(arena.flat.ctypes.data)
    assert places[0] == places[2] == places[4] != places[1] == places[3]


def test_a_state_handed_over_is_not_changed_by_anything_that_training_does() -> None:
    hook = SavedHook("best", {"loss": np.ones(2)})
    params, slots, buffers = (state_arena({name: (2,)}, 1) for name in ("w", "w", "mean"))
    state = TrainState(
        Counters({"global_step": 3, "samples_seen": 9}),
        {"params": params, "optimizers/m/v": slots},
        buffers,
        [hook],
    )
    handed = state.snapshot()
    before = {path: array.copy() for path, array in handed.arrays().items()}
    for arena in (params, slots, buffers):
        overwrite(arena, 7)
    hook.arrays["loss"][:] = 7
    state.counters.advance({"global_step": 1})
    assert all((array == 7).all() for array in state.arrays().values())
    assert handed.counters.global_step == 3
    assert all((array == before[path]).all() for path, array in handed.arrays().items())


# --- training goes on meanwhile


@pytest.mark.training
def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, seen = Gate(monkeypatch, open_until=1), []

    def look(step: int) -> None:
        seen.append((step, len(events(tmp_path / "run", "checkpoint"))))
        if step == 19:
            gate.opened.set()

    config = make_config(stop={"last_step": 20}, checkpoint={"every": 10, "keep_last": None})
    state = train(config, tmp_path / "run", (Watch(look),))
    assert seen[:19] == [(step, 1) for step in range(1, 20)], (
        "that of step 10 was in flight all the time"
    )
    reference = train(make_config(stop={"last_step": 20}), tmp_path / "quiet")
    assert state.same_bits(reference)
    ten = train(make_config(stop={"last_step": 10}), tmp_path / "ten")
    with codec.Reader(tmp_path / "run" / "checkpoints" / "step-00000010.h5") as reader:
        for path, array in ten.arrays().items():
            found = np.empty_like(array)
            reader.read_into(path, found)
            assert found.tobytes() == array.tobytes(), "the state of step 10, not of any later one"


@pytest.mark.training
@pytest.mark.parametrize("at_once_bytes", [-1, save.AT_ONCE_BYTES])
def test_every_checkpoint_of_every_step_holds_that_step(
    at_once_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "AT_ONCE_BYTES", at_once_bytes)
    train(make_config(stop={"last_step": 12}, checkpoint=ALL), tmp_path / "run")
    for step in range(13):
        expected = train(make_config(stop={"last_step": step}), tmp_path / str(step))
        with codec.Reader(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.h5") as reader:
            for path, array in expected.arrays().items():
                assert np.concatenate([*reader.parts(path)]).tobytes() == array.tobytes(), (
                    step,
                    path,
                )


@pytest.mark.training
def test_a_wait_is_counted_reported_once_and_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, said = Gate(monkeypatch, open_until=1), []
    with create_run(
        make_config(stop={"last_step": 6}, checkpoint=ALL), RunDirectory(tmp_path / "run")
    ) as segment:
        real = Background.finish

        def finish(background: Background) -> None:
            gate.opened.set()
            real(background)

        monkeypatch.setattr(Background, "finish", finish)
        outcome = segment.train(messages=Messages(silent, note=said.append))
    assert outcome.waits >= 1
    assert outcome.wait_seconds > 0
    (said_once,) = said
    assert "waits for the previous checkpoint" in said_once
    (end,) = events(tmp_path / "run", "end")
    assert (end["waits"], end["wait_seconds"]) == (outcome.waits, round(outcome.wait_seconds, 3))


def test_the_file_is_streamed(tmp_path: Path) -> None:
    """No part of it is a copy of a large array."""
    params = Arena({"w": (3 << 20,)}, "float32")
    state = TrainState(Counters({"global_step": 0, "samples_seen": 0}), {"params": params})
    image = codec.encode(state, run="moon", run_id=RUN_ID, config="seed: 0\n", numerics="{}")
    large = [chunk for chunk in image if len(chunk) > 1 << 20]
    assert sum(map(len, large)) == params.n_bytes
    assert all(np.shares_memory(np.frombuffer(chunk, np.uint8), params.flat) for chunk in large)


# --- errors


def failing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the publish of these steps fail."""
    real = Store.publish

    def publish(store: Store, step: int, *arguments: Any) -> str:
        if step in steps:
            raise StepctlError(f"step {step}: no room")
        return real(store, step, *arguments)

    monkeypatch.setattr(Store, "publish", publish)


@pytest.mark.training
def test_a_writers_error_stops_the_run_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 10)
    last: list[int] = []

    def look(step: int) -> None:
        last.append(step)

    monkeypatch.setattr(Background, "check", Background.finish)  # it is looked at when it has ended
    config = make_config(stop={"last_step": 40}, checkpoint={"every": 5, "keep_last": None})
    with pytest.raises(StepctlError, match="step 10: no room"):
        train(config, tmp_path / "run", (Watch(look),))
    assert last[-1] == 11
    assert [row["step"] for row in events(tmp_path / "run", "checkpoint")] == [
        0,
        5,
        11,
    ]  # tried again at the end
    monkeypatch.undo()
    state = resume(tmp_path / "run")
    expected = train(make_config(), tmp_path / "unbroken")
    assert state.same_bits(expected)
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


@pytest.mark.training
def test_with_on_error_continue_the_next_save_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 10, 15, 30)
    said: list[str] = []
    keep = {"every": 5, "keep_last": None, "on_error": "continue"}
    with create_run(
        make_config(checkpoint=keep), RunDirectory(tmp_path / "run"), said.append
    ) as segment:
        segment.train()
    assert [row["step"] for row in events(tmp_path / "run", "checkpoint")] == [0, 5, 20, 25, 35, 40]
    assert [line.partition(";")[0] for line in said] == [
        f"warning: step {step}: no room" for step in (10, 15, 30)
    ]


@pytest.mark.process
def test_a_line_that_the_ledger_had_no_room_for_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not run into the next, and the file that it is for, which is good, is not forgotten."""
    real, path = RunDirectory.append_ledger, tmp_path / "run"
    full = {10, 15}

    def append(directory: RunDirectory, event: str, **facts: Any) -> None:
        if event == "checkpoint" and facts["step"] in full:
            full.remove(facts["step"])
            with open(directory.ledger, "a") as file:
                file.write('{"event": "checkp')
            raise StepctlError(f"step {facts['step']}: no room")
        real(directory, event, **facts)

    monkeypatch.setattr(RunDirectory, "append_ledger", append)
    with create_run(
        make_config(checkpoint=ALL | {"every": 5, "on_error": "continue"}), RunDirectory(path)
    ) as segment:
        segment.train()
    assert [row["step"] for row in events(path, "checkpoint")] == list(range(0, 41, 5))
    assert len((path / "ledger.jsonl").read_text().splitlines()) == 2 + 9
    assert verify(str(path))[1] == []


@pytest.mark.training
def test_the_last_save_must_succeed_for_any_on_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 40)
    with pytest.raises(StepctlError, match="step 40: no room"):
        train(make_config(checkpoint={"every": 5, "on_error": "continue"}), tmp_path / "run")
    monkeypatch.undo()
    assert resume(tmp_path / "run").same_bits(train(make_config(), tmp_path / "unbroken"))


@pytest.mark.training
@pytest.mark.parametrize("at", [1, 7, 8, 23])
def test_on_an_exception_the_last_completed_step_is_saved(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepctl.data.batches import TrainingBatches

    real, said = TrainingBatches.batch, []

    def batch(batches: TrainingBatches, samples_seen: int) -> Any:
        if samples_seen == at * 48:
            raise RuntimeError("the data went away")
        return real(batches, samples_seen)

    with create_run(make_config(), RunDirectory(tmp_path / "run"), said.append) as segment:
        monkeypatch.setattr(TrainingBatches, "batch", batch)
        with pytest.raises(RuntimeError, match="went away"):
            segment.train()
    monkeypatch.undo()
    assert events(tmp_path / "run", "checkpoint")[-1]["step"] == at
    assert said == [f"{tmp_path / 'run'}: the state of global step {at} is saved"]
    assert events(tmp_path / "run", "end")[0]["reason"] == "RuntimeError: the data went away"
    assert resume(tmp_path / "run").same_bits(train(make_config(), tmp_path / "unbroken"))
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


@pytest.mark.training
def test_an_update_that_failed_half_way_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepctl.optimizers.adam import Adam

    calls, real = itertools.count(), Adam.update_block

    def update_block(self: Adam, block: Any, *coefficients: Any) -> None:
        if block.params.size > 100 and next(calls) == 6:
            block.new_params[:] = 0
            raise RuntimeError("halfway")
        real(self, block, *coefficients)

    monkeypatch.setattr(Adam, "update_block", update_block)
    with pytest.raises(StepctlError, match="in the middle of an update"):
        train(make_config(), tmp_path / "run")
    monkeypatch.undo()
    assert [row["step"] for row in events(tmp_path / "run", "checkpoint")] == [0]
    assert resume(tmp_path / "run").same_bits(train(make_config(), tmp_path / "unbroken"))


@pytest.mark.training
def test_a_failed_update_out_of_place_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a hand-over the old values are whole, so they can be saved."""
    from stepctl.optimizers.adam import Adam

    calls, real = itertools.count(), Adam.update_block

    def update_block(self: Adam, block: Any, *coefficients: Any) -> None:
        if block.params.size > 100 and next(calls) == 5:
            block.new_params[:] = 0
            raise RuntimeError("halfway")
        real(self, block, *coefficients)

    monkeypatch.setattr(Adam, "update_block", update_block)
    with pytest.raises(RuntimeError, match="halfway"):
        train(make_config(checkpoint=ALL), tmp_path / "run")
    monkeypatch.undo()
    assert events(tmp_path / "run", "checkpoint")[-1]["step"] == 5
    assert resume(tmp_path / "run").same_bits(train(make_config(), tmp_path / "unbroken"))


# --- when


def saved_by(config: CheckpointConfig, times: list[float]) -> list[int]:
    """Return the steps saved by a hook whose clock shows these times, one a step."""
    published: list[int] = []
    state = TrainState(Counters({"global_step": 0, "samples_seen": 0}), {})
    hook = Save(
        config,
        lambda state: published.append(state.counters.global_step),
        background=Background(),
        flush=lambda: None,
        report=lambda: None,
        requested=lambda: False,
        say=pytest.fail,
        note=lambda message: None,
        saved_step=0,
        target=10**6,
        clock=lambda: times[state.counters.global_step],
    )
    for _ in times[1:]:
        state.counters.advance({"global_step": 1})
        hook.after_step(state, {})
        hook._background.finish()
    return published


def test_seconds_and_steps_both_make_a_save_due() -> None:
    times = [0.0, 1, 2, 9, 10, 11, 12, 30, 31, 32, 33]
    assert saved_by(CheckpointConfig(every=None, every_seconds=10), times) == [4, 7]
    assert saved_by(CheckpointConfig(every=5), times) == [5, 10]
    assert saved_by(CheckpointConfig(every=5, every_seconds=10), times) == [4, 5, 7, 10]
    assert saved_by(CheckpointConfig(every=None), times) == []


def test_a_time_limit_counts_from_when_the_command_began() -> None:
    now = [100.0]
    limit = TimeLimit(60, 95.0, lambda: now[0])
    counters = Counters({"global_step": 3, "samples_seen": 0})
    assert limit.reason(counters) is None
    counters.advance({"global_step": 1})
    assert limit.reason(counters) is None
    now[0] = 155.0
    reason = limit.reason(counters)
    assert reason is not None
    assert (reason.text, reason.done) == ("max_time 60 s", False)


@pytest.mark.training
def test_a_time_limit_ends_a_segment_with_a_checkpoint(tmp_path: Path) -> None:
    ticks = itertools.count()
    with create_run(make_config(), RunDirectory(tmp_path / "run")) as segment:
        outcome = segment.train(stop=[TimeLimit(7, 0, lambda: next(ticks))])
    assert not outcome.reason.done
    assert outcome.step == 7
    assert events(tmp_path / "run", "checkpoint")[-1]["step"] == 7
    assert resume(tmp_path / "run").same_bits(train(make_config(), tmp_path / "unbroken"))


def test_nothing_is_left_of_a_publish_that_was_given_up(tmp_path: Path) -> None:
    from stepctl.checkpoint.store import Abandoned

    store = Store(tmp_path)
    with pytest.raises(Abandoned):
        store.publish(3, [b"x"], lambda: True)
    assert os.listdir(tmp_path) == []
    assert store.steps() == []
