"""User code that keeps every view it receives, and writes into them later."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stepctl.data.base import Source, Sources, Targets
from stepctl.data.batches import Batch
from stepctl.hooks.base import Hook
from stepctl.models.base import Backward, Model
from stepctl.optimizers.base import Block
from stepctl.optimizers.sgd import SGD
from stepctl.programs.base import Metrics
from stepctl.programs.supervised import Regression
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.train_state import TrainState
from stepctl.state.workspace import Workspace

N = 100_000
Ways = dict[str, Callable[[Array], object]]
# how a user's code may write into an array
WAYS: Ways = {
    "item": lambda array: array.__setitem__(..., 7),
    "in place": lambda array: array.__iadd__(7),
    "out": lambda array: np.multiply(array, 7, out=array),
    "fill": lambda array: array.fill(7),
    "copyto": lambda array: np.copyto(array, 7),
    "flat": lambda array: array.flat.__setitem__(0, 7),
    "sort": lambda array: array.sort(axis=-1),
    "a view of it": lambda array: array[:1].__iadd__(7),
    "made writable": lambda array: fill_writable(array, array),
    "its base made writable": lambda array: fill_writable(array.base, array),
}


def fill_writable(owner: Any, array: Array) -> None:
    """Make an array or its base writable, then write into the array."""
    owner.setflags(write=True)
    array.fill(7)


class Intruder:
    """Keeps the views of earlier calls, and tries to write into them."""

    def __init__(self) -> None:
        self._kept: list[Array] = []
        self.writes = 0  # that went through

    def keep(self, *handed: Array | Mapping[str, Array]) -> None:
        """Keep arrays, and all that an arena has."""
        for one in handed:
            self._kept += [one] if isinstance(one, np.ndarray) else [*one.values()]
            if isinstance(one, Arena):
                self._kept.append(one.flat)
        del self._kept[100:]

    def write(self) -> None:
        """Try every way to write into what was kept."""
        for array in self._kept:
            for way in WAYS.values():
                with contextlib.suppress(ValueError, TypeError, AttributeError):
                    way(array)
                    self.writes += 1


def everything(state: TrainState) -> list[Mapping[str, Array]]:
    return [state.arrays(), *state.arenas.values(), state.buffers]


class Wide(Model):
    """y = x mean(w): many parameters, and as many buffers, in no time."""

    def __init__(self, *, keeps: bool = False, input_shape: Shape, n_outputs: int) -> None:
        self.intruder = Intruder() if keeps else None

    def _called(self, *handed: Mapping[str, Array]) -> None:
        if self.intruder is not None:
            self.intruder.write()
            self.intruder.keep(*handed)

    def parameter_shapes(self) -> dict[str, Shape]:
        return {"w": (N,)}

    def buffer_shapes(self) -> dict[str, Shape]:
        return {"seen": (N,)}

    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        params["w"][...] = rng("w").normal(1, 0.1, N)
        self._called(params)

    def initialize_buffers(self, buffers: Arena) -> None:
        buffers["seen"][...] = 1
        self._called(buffers)

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        self._called(params, workspace.buffers)
        if workspace.new_buffers is not None:
            np.multiply(workspace.buffers["seen"], 0.5, out=workspace.new_buffers["seen"])
            workspace.new_buffers["seen"] += params["w"]

        def backward(dy: Array, grads: Arena) -> None:
            self._called(params)
            np.multiply(params["w"], (x * dy).sum(), out=grads["w"])

        return x * params["w"].mean(), backward


@dataclass(frozen=True, kw_only=True)
class KeepsBlocks(SGD):
    """An optimizer that keeps its blocks."""

    intruder: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "intruder", Intruder())

    def initial_slots(self, params: Arena) -> dict[str, Arena]:
        slots = super().initial_slots(params)
        self.intruder.keep(params, *slots.values())
        return slots

    def update_block(self, block: Block, *coefficients: Array) -> None:
        self.intruder.write()
        self.intruder.keep(block.params, *block.slots, block.new_params, *block.new_slots)
        super().update_block(block, *coefficients)


class KeepsState(Regression):  # type: ignore[misc]
    """A task that keeps the state's arrays."""

    def __init__(self, *, seed: int, dtype: str, shards: int) -> None:
        super().__init__(seed=seed, dtype=dtype, shards=shards)
        self.intruder = Intruder()

    def _called(self, state: TrainState, *batch: Array) -> None:
        self.intruder.write()
        self.intruder.keep(*everything(state), *batch)

    def initial_state(self, initial_step: int) -> TrainState:
        state = super().initial_state(initial_step)
        self._called(state)
        return state

    def trial(self, state: TrainState, batch: Batch) -> None:
        self._called(state, *batch)
        super().trial(state, batch)

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        self._called(state, *batch)
        return super().step(state, batch)

    def evaluate(self, state: TrainState, batches: Any, *, average: bool = False) -> Metrics:
        self._called(state)
        return super().evaluate(state, batches, average=average)


class KeepsInHook(Hook):
    """A hook that keeps the state's arrays."""

    name = "keeps"

    def __init__(self) -> None:
        self.intruder = Intruder()

    def start(self, state: TrainState) -> None:
        self.intruder.keep(*everything(state))

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.intruder.write()
        self.intruder.keep(*everything(state))

    def end(self, state: TrainState, *_: object) -> None:
        self.intruder.write()


class Rows(Source):
    """64 rows of one number; with `keeps`, a source that keeps the batches that it has filled."""

    def __init__(self, keeps: bool) -> None:
        self.origin = "rows"
        self.n = 64
        self.sample_shape = (1,)
        self.target_shape = (1,)
        self._x = np.random.default_rng(0).normal(size=(64, 1))
        self.intruder = Intruder() if keeps else None

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        if self.intruder is not None:
            self.intruder.write()
            self.intruder.keep(x, y)
        x[...] = self._x[rows]
        y[...] = 2 * self._x[rows]

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        yield 0, self._x, 2 * self._x

    def fingerprint(self) -> str:
        return hashlib.sha256(self._x.tobytes()).hexdigest()


def rows(*, keeps: bool = False, targets: Targets, dtype: str) -> Sources:
    return Sources(Rows(keeps))


class OwnArrays(Regression):  # type: ignore[misc]
    """A task that writes an array of the state in place, through a view that it keeps."""

    sliced = False

    def initial_state(self, initial_step: int) -> TrainState:
        state = super().initial_state(initial_step)
        own = Arena({"trace": (N,)}, "float64")
        self._kept = own["trace"]
        return TrainState(
            state.counters, {**state.arenas, "optimizers/task/own": own}, state.buffers
        )

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        trace = state.arenas["optimizers/task/own"]["trace"]
        trace *= 0.9
        self._kept += state.params["w"]
        return super().step(state, batch)


class Writes(Regression):  # type: ignore[misc]
    """A task that does once, at the third step, what a test asks for."""

    act: Callable[[TrainState, Batch], object]

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        if state.counters.global_step == 2:
            type(self).act(state, batch)
        return super().step(state, batch)
