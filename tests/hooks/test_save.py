"""Whether a checkpoint is written on the training thread or in the background."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import stepctl
from stepctl.checkpoint.background import Background
from stepctl.hooks import save
from stepctl.state.arena import Arena
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from tests.support.runs import make_config, train
from tests.support.saves import make_save

SMALL = 100  # float32 numbers
LARGE = save.AT_ONCE_BYTES


class Clock:
    """A clock that an expensive write advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def at_once(n_numbers: int, seconds: list[float]) -> list[bool]:
    """Save after each step, each save taking as long; return which were made on this thread."""
    params = Arena({"w": (n_numbers,)}, "float32").to_read_only(copy=False)
    state = TrainState(Counters({"global_step": 0, "samples_seen": 0}), {"params": params})
    clock = Clock()
    remaining = iter(seconds)
    threads: list[threading.Thread] = []

    def publish(snapshot: TrainState) -> None:
        threads.append(threading.current_thread())
        clock.now += next(remaining)

    background = Background()
    hook = make_save(publish, background, clock, every=1)
    for _ in seconds:
        state.counters.advance({"global_step": 1})
        hook.after_step(state, {})
        hook.wait()
    background.close()
    return [thread is threading.main_thread() for thread in threads]


def test_a_small_state_is_written_at_once() -> None:
    assert at_once(SMALL, [0.003] * 30) == [True] * 30


def test_a_large_state_is_written_in_the_background() -> None:
    assert at_once(LARGE, [0.003] * 3) == [False] * 3


def test_after_a_slow_write_ten_are_made_in_the_background() -> None:
    assert at_once(SMALL, [0.003, 0.1] + [0.1] * 10 + [0.003] * 2) == (
        [True, True] + [False] * 10 + [True] * 2
    )


def test_an_interrupt_ends_a_write_at_once() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    background = Background()
    with pytest.raises(KeyboardInterrupt):
        background.run(interrupted)
    background.close()


@pytest.mark.training
def test_both_ways_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(checkpoint={"every": 7, "keep_last": None})
    train(config, tmp_path / "at once")
    monkeypatch.setattr(save, "AT_ONCE_BYTES", -1)
    train(config, tmp_path / "background")
    files = sorted((tmp_path / "background" / "checkpoints").iterdir())
    assert len(files) > 5
    for file in files:
        one = stepctl.load_checkpoint(tmp_path / "at once" / "checkpoints" / file.name)
        other = stepctl.load_checkpoint(file)
        assert one.arrays.keys() == other.arrays.keys()
        for path, array in one.arrays.items():
            assert np.array_equal(array, other.arrays[path], equal_nan=True), path
