"""The state of hooks is saved, copied and restored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.checkpoint.store import Store
from stepctl.errors import ConfigError
from stepctl.hooks import save
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState
from tests.support.runs import make_config, resume, rows, train

pytestmark = pytest.mark.training


LAST = 12


def config(last: int = LAST, every: int = 1) -> Any:
    return make_config(
        stop={"last_step": last}, evaluate={}, checkpoint={"every": every, "keep_last": None}
    )


class Remembering(stepctl.Hook):
    """A smoothed loss; `seen` has what it was after each step."""

    name = "smooth"

    def __init__(self) -> None:
        self.m: Any = np.zeros(3)
        self.seen: dict[int, float] = {}

    def state(self) -> Mapping[str, Array]:
        return {"m": self.m}

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.take(metrics["loss"])
        self.seen[state.counters.global_step] = float(np.ravel(self.m)[0])

    def take(self, loss: float) -> None:
        self.m = 0.9 * self.m + 0.1 * loss


class Scalar(Remembering):
    """A 0-d array, which NumPy's arithmetic turns into a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.m = np.zeros(())


class InPlace(Remembering):
    """An array that is changed where it is."""

    def take(self, loss: float) -> None:
        self.m *= 0.9
        self.m += 0.1 * loss


class Strided(InPlace):
    """An array that does not lie in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.m = np.zeros((3, 2), order="F")[::2, 1:]


class Number(Remembering):
    """A float, restored by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.m = 0.0

    def state(self) -> Mapping[str, Array]:
        return {"m": np.array(self.m), "steps": np.array(len(self.seen))}

    def load_state(self, state: Mapping[str, Array]) -> None:
        self.m = float(state["m"])
        self.seen = dict.fromkeys(range(int(state["steps"])), 0.0)


class Keeps(Remembering):
    """Goes on with the very arrays that it is given."""

    def load_state(self, state: Mapping[str, Array]) -> None:
        self.m = state["m"]


KINDS = [Remembering, Scalar, InPlace, Strided, Number, Keeps]


@pytest.mark.parametrize("kind", KINDS)
def test_each_checkpoint_holds_the_state_of_the_hook_at_its_step(
    kind: type[Remembering], tmp_path: Path
) -> None:
    hook = kind()
    train(config(), tmp_path / "run", (hook,))
    for step in range(1, LAST + 1):
        found = stepctl.load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.h5")
        assert found.arrays["hooks/smooth/m"].ravel()[0] == hook.seen[step] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_hook_continues_from_its_saved_state(
    kind: type[Remembering], tmp_path: Path
) -> None:
    unbroken = kind()
    state = train(config(every=100), tmp_path / "unbroken", (unbroken,))
    train(config(5), tmp_path / "run", (kind(),))
    resumed = kind()
    assert resume(tmp_path / "run", last_step=LAST, hooks=(resumed,)).same_bits(state)
    assert np.array_equal(resumed.m, unbroken.m)
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


def test_the_saved_state_of_a_hook_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = threading.Event()
    publish = Store.publish

    def held(store: Store, step: int, *arguments: Any) -> str:
        assert step != 5 or made.wait(30)
        return publish(store, step, *arguments)

    class Opens(InPlace):
        def after_step(self, state: TrainState, metrics: Metrics) -> None:
            super().after_step(state, metrics)
            if state.counters.global_step == 7:
                made.set()

    monkeypatch.setattr(save, "AT_ONCE_BYTES", -1)
    monkeypatch.setattr(Store, "publish", held)
    hook = Opens()
    train(config(8, every=5), tmp_path / "run", (hook,))
    found = stepctl.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000005.h5")
    assert found.arrays["hooks/smooth/m"][0] == hook.seen[5] != hook.seen[7]


class Returns(stepctl.Hook):
    """Remembers what a test asks for."""

    name = "mine"

    def __init__(self, state: Callable[[int], Any], *, loads: bool = False) -> None:
        self._state, self._step = state, 0

    def state(self) -> Any:
        return self._state(self._step)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self._step = state.counters.global_step


KEPT = np.zeros(2)
REFUSED: dict[str, Callable[[int], Any]] = {
    "a float": lambda step: {"worst": 0.5},
    "an int": lambda step: {"worst": 1},
    "a list": lambda step: {"worst": [0.5]},
    "nothing": lambda step: None,
    "an array": lambda step: KEPT,
    "objects": lambda step: {"worst": np.array([None])},
    "text": lambda step: {"worst": np.array("a")},
    "a number as a name": lambda step: {1: KEPT},
    "a new array at each call": lambda step: {"worst": np.array(0.5)},
    "a scalar": lambda step: {"worst": np.float64(0.5)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hook_state_that_cannot_be_saved_is_refused_before_training(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ConfigError, match=r"^hook mine: ") as caught:
        train(config(), tmp_path / "run", (Returns(REFUSED[case]),))
    assert str(caught.value) == snapshot
    assert not (tmp_path / "run").exists()


CHANGES: dict[str, Callable[[int], Any]] = {
    "a shape": lambda step: {"worst": KEPT if step < 5 else np.zeros(3)},
    "a dtype": lambda step: {"worst": KEPT if step < 5 else KEPT.astype("float32")},
    "one more": lambda step: {"worst": KEPT} if step < 5 else {"worst": KEPT, "best": KEPT},
    "none any more": lambda step: {"worst": KEPT} if step < 5 else {},
    "a list": lambda step: {"worst": KEPT if step < 5 else [0.0, 0.0]},
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_hook_state_that_changes_its_type_is_refused_at_the_save(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ConfigError, match=r"^hook mine: ") as caught:
        train(config(every=5), tmp_path / "run", (Returns(CHANGES[case]),))
    assert str(caught.value) == snapshot
    files = (tmp_path / "run" / "checkpoints").iterdir()
    assert [path.name for path in files] == ["step-00000000.h5"]


class NoHook:
    """Something else."""

    name = "other"


class Nameless(stepctl.Hook):
    """A hook without a name."""


@pytest.mark.parametrize("kind", [NoHook, Nameless])
def test_an_object_that_is_not_a_hook_or_has_no_name_is_refused(
    kind: type[Any], tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(config(), tmp_path / "run", (kind(),))
    assert str(caught.value) == snapshot
