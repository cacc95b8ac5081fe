"""Views handed to user code are read-only, and a view kept by it cannot change a checkpoint."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.checkpoint.store import Store
from stepctl.config import yaml
from stepctl.errors import ConfigError, StepctlError
from stepctl.hooks import save
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.arena import Arena, Array
from stepctl.state.train_state import TrainState
from tests.support import kept_views
from tests.support.kept_views import WAYS, KeepsInHook
from tests.support.messages import without_paths
from tests.support.mpi_jobs import job
from tests.support.runs import make_config, resume, train

LAST = 6


def sections(shards: int = 1, every: int = 1, **others: Any) -> dict[str, Any]:
    return {
        "dtype": "float64",
        "data": {"name": "tests.support.kept_views:rows", "batch_size": 8, "shards": shards},
        "model": {"name": "tests.support.kept_views:Wide"},
        "task": {"name": "regression"},
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
        "ema": {"decay": 0.9},
        "stop": {"last_step": LAST},
        "evaluate": {},
        "checkpoint": {"every": every, "keep_last": None},
        **others,
    }


class Oracle(Hook):
    """Copies the state after each step. Holds each checkpoint back until the update after its step is made."""

    name = "oracle"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int = LAST) -> None:
        self.copies: dict[int, dict[str, Array]] = {}
        self._made = [threading.Event() for _ in range(last + 1)]
        publish = Store.publish

        def held(store: Store, step: int, *arguments: Any) -> str:
            if 0 < step < last:
                assert self._made[step + 1].wait(30)
            return publish(store, step, *arguments)

        monkeypatch.setattr(save, "AT_ONCE_BYTES", -1)
        monkeypatch.setattr(Store, "publish", held)

    def start(self, state: TrainState) -> None:
        self._copy(state)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self._copy(state)

    def _copy(self, state: TrainState) -> None:
        step = state.counters.global_step
        self.copies[step] = {path: array.copy() for path, array in state.arrays().items()}
        self._made[step].set()

    def compare(self, run: Path) -> list[int]:
        """Compare each checkpoint with the copy of its step; return the steps that have one."""
        steps = []
        for file in sorted((run / "checkpoints").glob("step-*.h5")):
            found = stepctl.load_checkpoint(file)
            steps.append(found.global_step)
            expected = self.copies[found.global_step]
            assert found.arrays.keys() == expected.keys()
            assert [
                path
                for path in expected
                if found.arrays[path].tobytes() != expected[path].tobytes()
            ] == [], file
        return steps


KEEPERS: dict[str, dict[str, Any]] = {
    "model": {"model": {"name": "tests.support.kept_views:Wide", "keeps": True}},
    "optimizer": {
        "optimizer": {
            "name": "tests.support.kept_views:KeepsBlocks",
            "learning_rate": 0.1,
            "momentum": 0.9,
        }
    },
    "task": {"task": {"name": "tests.support.kept_views:KeepsState"}},
    "hook": {},
    "source": {"data": {"name": "tests.support.kept_views:rows", "batch_size": 8, "keeps": True}},
}


@pytest.mark.training
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("who", KEEPERS)
def test_a_kept_view_changes_no_checkpoint_and_no_state(
    who: str, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**{**sections(shards), **KEEPERS[who]})
    oracle = Oracle(monkeypatch)
    hooks = (KeepsInHook(), oracle) if who == "hook" else (oracle,)
    state = train(config, tmp_path / "run", hooks)
    assert oracle.compare(tmp_path / "run") == list(range(LAST + 1))
    monkeypatch.undo()
    plain = sections(shards if who != "source" else 1, every=10)
    assert state.same_bits(train(make_config(**plain), tmp_path / "plain"))
    if who == "hook":
        assert hooks[0].intruder.writes == 0


@pytest.mark.training
def test_writable_arenas_of_a_task_are_saved_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**sections(task={"name": "tests.support.kept_views:OwnArrays"}))
    oracle = Oracle(monkeypatch)
    state = train(config, tmp_path / "run", (oracle,))
    assert oracle.compare(tmp_path / "run") == list(range(LAST + 1))
    assert state.arrays()["optimizers/task/own/trace"].any()
    monkeypatch.undo()
    short = sections(task={"name": "tests.support.kept_views:OwnArrays"}, stop={"last_step": 3})
    train(make_config(**short), tmp_path / "stopped")
    again = resume(tmp_path / "stopped", last_step=LAST)
    assert again.same_bits(state)


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_writing_into_a_state_works(way: str) -> None:
    arena = Arena({"a": (3, 4), "b": (), "empty": (0,)}, "float64")
    arena["a"][...] = np.arange(12, 0, -1).reshape(3, 4)
    sealed = arena.to_read_only(copy=True)
    before = sealed.flat.copy()
    handed = sealed.snapshot()
    for one in (sealed, handed):
        for array in (one["a"], one.flat, one["a"][1], one["a"].T, np.asarray(one["a"])):
            with pytest.raises((ValueError, AttributeError)):
                WAYS[way](array)
    with pytest.raises(ValueError, match="'a' is read-only"):
        sealed["a"] = 1
    arena["a"] = 5  # what it was made from is another's
    assert np.array_equal(sealed.flat, before)


# what a task may try at a step
WRITES: dict[str, Callable[[TrainState, Any], object]] = {
    "a variable": lambda state, batch: in_place(state.params["w"]),
    "a slot": lambda state, batch: in_place(state.arenas["optimizers/model/momentum"]["w"]),
    "a buffer": lambda state, batch: in_place(state.buffers["seen"]),
    "an average": lambda state, batch: in_place(state.arenas["ema"]["w"]),
    "the batch": lambda state, batch: in_place(batch.x),
    "all": lambda state, batch: in_place(state.params.flat),
    "an item": lambda state, batch: operator.setitem(state.params, "w", 1),
    "a folder": lambda state, batch: operator.setitem(state.arenas, "params", None),
    "an attribute": lambda state, batch: setattr(state, "arenas", {}),
    "the parameters": lambda state, batch: setattr(state, "params", None),
    "a product": lambda state, batch: product(state.params["w"]),
    "random numbers": lambda state, batch: drawn(state.params["w"]),
    "a flag": lambda state, batch: state.params["w"].setflags(write=True),
}
# the folder and line of a source file; NumPy's words after the source line
PLACE_AND_NUMPY_WORDS = (r"^\S+(?=/\w+\.py:)", r"(?<=\.py:)\d+", r"(?<=object \().*?(?=\); )")


def in_place(x: Array) -> None:
    x += 1


def product(x: Array) -> None:
    np.dot(np.eye(1), np.ones((1, len(x))), out=x.reshape(1, -1))


def drawn(x: Array) -> None:
    np.random.default_rng(0).standard_normal(out=x)


@pytest.mark.training
@pytest.mark.parametrize("case", WRITES)
def test_a_task_that_writes_into_the_state_is_refused_with_the_right_way(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setattr(kept_views.Writes, "act", staticmethod(WRITES[case]), raising=False)
    oracle = Oracle(monkeypatch, last=2)
    config = make_config(**sections(task={"name": "tests.support.kept_views:Writes"}))
    with pytest.raises(StepctlError, match=r"test_read_only\.py:\d+: ") as caught:
        train(config, tmp_path / "run", (oracle,))
    message = str(caught.value)
    assert "\n" not in message
    assert without_paths(message, PLACE_AND_NUMPY_WORDS) == snapshot
    assert oracle.compare(tmp_path / "run") == [0, 1, 2]


class Trespasser(Hook):
    """A hook that writes into the state at one of its events."""

    name = "trespasser"

    def __init__(self, event: str) -> None:
        self.event = event

    def start(self, state: TrainState) -> None:
        if self.event == "start":
            state.params["w"][:] = 0

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if self.event == "after_step":
            state.params["w"][:] = 0

    def end(self, state: TrainState, *_: object) -> None:
        if self.event == "end":
            state.params["w"][:] = 0


@pytest.mark.training
@pytest.mark.parametrize("event", ["start", "after_step", "end"])
def test_a_hook_that_writes_into_the_state_is_refused_with_its_line(
    event: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^\S*test_read_only.py:\d+: `state.params\[\"w\"\]\[:\] = 0` writes into ",
    ):
        train(make_config(**sections()), tmp_path / "run", (Trespasser(event),))


MODELS = {
    "forward": "def forward(self, params, x, workspace):\n        params['w'][0] = 0\n",
    "forward, its input": "def forward(self, params, x, workspace):\n        x -= x.mean()\n",
    "forward, a buffer": "def forward(self, params, x, workspace):\n        workspace.buffers['seen'][0] += 1\n",
    "backward": "def forward(self, params, x, workspace):\n"
    "        def backward(dy, grads):\n            params['w'][0] = 0\n"
    "        return x * params['w'].mean(), backward\n",
}


@pytest.mark.parametrize("where", MODELS)
def test_a_model_that_writes_into_its_inputs_is_refused_before_training(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"trespassing_{list(MODELS).index(where)}"
    (tmp_path / f"{name}.py").write_text(
        f"from tests.support.kept_views import Wide\n\nclass Mine(Wide):\n    {MODELS[where]}"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{name}.py:\d+: `.*` writes into "):
        train(make_config(**sections(model={"name": f"{name}:Mine"})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_writes_the_old_values_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old_values.py").write_text(
        "from tests.support.kept_views import SGD\n\nclass Mine(SGD):\n"
        "    def update_block(self, block, *coefficients):\n        block.params[...] -= block.grads\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    optimizer = {"name": "old_values:Mine", "learning_rate": 0.1}
    with pytest.raises(StepctlError, match="read-only"):
        train(make_config(**sections(optimizer=optimizer)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arrays_of_the_api_are_read_only(tmp_path: Path) -> None:
    with stepctl.create(sections(), tmp_path / "run", say=lambda line: None) as run:
        for _ in range(2):
            run.step()
            for array in (*run.state.arrays().values(), run.state.params.flat):
                with pytest.raises(ValueError, match="read-only"):
                    array += 1


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ranks_hold_to_it_too(mode: str, tmp_path: Path) -> None:
    config = sections(
        2,
        model={"name": "tests.support.kept_views:Wide", "keeps": True},
        distributed={"mode": "sync"},
        stop={"last_step": 3},
    )
    if mode == "async":  # whose model may have no buffers, so a task intrudes
        config |= {
            "model": {"name": "mlp", "hidden": [4]},
            "task": {"name": "tests.support.kept_views:KeepsState"},
        }
        config |= {"distributed": {"mode": "async"}}
    (tmp_path / "config.yaml").write_text(yaml.dumps({**make_config(**config).plain()}))
    done = job(2, "train", "--config", "config.yaml", "--run-dir", "run", "-q", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    if mode == "sync":
        alone = train(
            make_config(**{**config, "model": {"name": "tests.support.kept_views:Wide"}}),
            tmp_path / "alone",
        )
        found = stepctl.load_checkpoint(tmp_path / "run").arrays
        for path, array in alone.arrays().items():
            assert found[path].tobytes() == array.tobytes(), path
