"""The protocol of a task."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, cast

import numpy as np

from stepctl.arena import Arena, Array, Shape
from stepctl.comm import ALONE, Comm
from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.errors import CheckpointError, ConfigError, NonFiniteError
from stepctl.models.base import Ends
from stepctl.problems import a_or_an
from stepctl.state import GLOBAL_STEP, SAMPLES_SEEN, Counters, TrainState
from stepctl.tasks.learner import MODEL, Learner

Metrics = dict[str, float]
Mode = Literal["min", "max"]  # which value of a metric is the better one
_TAKEN = {"step", "kind", "extra", "epoch", "samples_per_second"}  # keys of a row beside metrics


def refuse_non_finite(
    step: int, loss: float, gradient: Arena, whose: str = "", *, buffers: Arena | None = None
) -> None:
    """Raise NonFiniteError, with the first bad array, if the update to `step` would spoil parameters or buffers."""
    parts = {f"the gradient of {whose}": gradient} | ({} if buffers is None else {"the new value of buffers/": buffers})
    names = ((what, arena.first_non_finite()) for what, arena in parts.items())
    bad = next((what + name for what, name in names if name is not None), None)
    if bad is None and math.isfinite(loss):
        return
    where = f"first bad array: {bad}" if bad else "the gradient is finite"
    error = NonFiniteError(f"step {step}: the loss is {loss}; {where}")
    error.by_all = True
    raise error


def refuse_unwritten(gradient: Arena, buffers: Arena, whose: str = "model") -> None:
    """Raise ConfigError if a part of a gradient or of new buffers that were marked before is as it was."""
    if unwritten := gradient.marked():
        raise ConfigError(
            f"{whose}: backward left the gradient of {', '.join(unwritten)} unwritten; "
            "it must write all of it: grads[name][...] = ..."
        )
    if unwritten := buffers.marked():
        raise ConfigError(
            f"{whose}: forward left the new values of the buffers {', '.join(unwritten)} unwritten; in training it "
            "must write all of them: workspace.new_buffers[name][...] = ..."
        )


def as_numbers(metrics: object, method: str) -> Metrics:
    """Return what a task's method measured as plain numbers, which NumPy's scalars and 0-d arrays become.

    ConfigError at anything else, or at a name that a row of metrics has of itself.
    """
    if not isinstance(metrics, Mapping):
        kind = a_or_an(type(metrics).__name__)
        raise ConfigError(f"task: {method} returned {kind}; a dict of numbers by their names is needed")
    if taken := _TAKEN & metrics.keys():
        raise ConfigError(f"task: {method} returned a metric {min(taken)!r}, which every row has; give it another name")
    if all(type(value) is float for value in metrics.values()):  # most often, and at once
        return cast(Metrics, metrics)
    return {name: _number(f"task: {method} returned the metric {name!r}", value) for name, value in metrics.items()}


def _number(where: str, value: object) -> float:
    if isinstance(value, np.ndarray) and value.ndim:
        raise ConfigError(f"{where} as an array of shape {value.shape}; a number is needed")
    plain = value.item() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(plain, numbers.Integral):
        return int(plain)
    if isinstance(plain, numbers.Real):
        return float(plain)
    raise ConfigError(f"{where} as {a_or_an(type(value).__name__)}; a number is needed")


def summed(parts: list[Metrics]) -> Metrics:
    """Return the sums of the parts' metrics, exactly rounded, so that the order of the parts does not matter."""
    return parts[0] if len(parts) == 1 else {name: _sum([part[name] for part in parts]) for name in parts[0]}


def _sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # infinities of both signs, or beyond the largest number
        return sum(values)


class Task(ABC):
    """One update of the state, and its evaluation.

    The arrays of the state are read-only: parameters, slots and averages change by `Learner.update` alone, buffers by
    `state.buffers.copy_from`.

    Its constructor takes keyword arguments: `seed`, `dtype` and `shards` come from the config's other sections if it
    asks for them; every other argument from its own. Then it is handed `learners`, one for each of its `models`, and
    `comm`. A batch that a task gets is this process's part: of each batch of a step its share of the shards.
    """

    targets: Targets
    models: ClassVar[tuple[str, ...]] = (MODEL,)
    metrics: ClassVar[dict[str, Mode]]  # what `evaluate` returns; the first is the one to go by
    training_metrics: ClassVar[tuple[str, ...]]  # what `step` returns, beside learning rates and norms
    clock: str = MODEL  # the counter that the global step follows
    batches_per_step: int = 1
    learners: dict[str, Learner]
    learns_labels: ClassVar[bool] = True  # whether labels, if those are its targets, decide what it learns
    divisible: ClassVar[bool] = False  # whether `step` computes only `comm.mine` of the shards
    # whether it sums gradients by ShardSum and changes arenas by learners' updates alone: each process may then update
    # its part of arenas that all have in common
    sliced: ClassVar[bool] = False
    comm: Comm = ALONE  # the processes that share a step
    buffered: ClassVar[bool] = False  # whether `step` fills the buffers of its one model

    @abstractmethod
    def ends(self, n_classes: int | None, sample_shape: Shape, target_shape: Shape) -> dict[str, Ends]:
        """Return what each model maps to what."""

    def counts(self, steps: int) -> dict[str, int]:
        """Return how many updates each optimizer has made after so many global steps: the relation of the counters."""
        return {MODEL: steps}

    def initial_state(self, initial_step: int) -> TrainState:
        """Return the state before the first update.

        An arena that a task adds to it, and does not make `to_read_only`, is the task's own: `step` writes into it, and
        a save copies it. Such a task is not `sliced`.
        """
        counters = {GLOBAL_STEP: initial_step, SAMPLES_SEEN: 0} | dict.fromkeys(self.models, 0)
        learners = list(self.learners.values())
        arenas = {path: arena for learner in learners for path, arena in learner.initial_arenas().items()}
        if len(learners) == 1:  # of several models none has any
            return TrainState(Counters(counters), arenas, learners[0].initial_buffers())
        return TrainState(Counters(counters), arenas)

    @abstractmethod
    def trial(self, state: TrainState, batch: Batch) -> None:
        """Compute what a step would, changing nothing; ConfigError if the model breaks its protocol."""

    @abstractmethod
    def step(self, state: TrainState, batch: Batch) -> Metrics:
        """Apply one update to the arrays (not to the counters) and return what was measured on the way: numbers.

        An error before the first change of an array costs nothing. After it the state is that of no step, and is not
        saved; TornUpdate says so where it cannot be seen here. NonFiniteError must leave the state as it was.
        """

    @abstractmethod
    def evaluate(self, state: TrainState, batches: Iterable[Batch], *, average: bool = False) -> Metrics:
        """Return the metrics over all batches, with the moving average's weights if asked; nothing changes."""

    def generate(self, state: TrainState, n: int, *, average: bool = False) -> Array | None:
        """Return n samples, always of the same noise: (n, *sample_shape); None from a task that makes none."""
        return None

    def increments(self, counters: Counters, samples: int) -> dict[str, int]:
        """Return by how much each counter rises once an update that used so many samples is complete."""
        made = counters[self.clock]
        before, after = self.counts(made), self.counts(made + 1)
        return {GLOBAL_STEP: 1, SAMPLES_SEEN: samples} | {name: after[name] - before[name] for name in after}

    def count_at(self, name: str, steps: int, *, initial_step: int, batch_size: int) -> int:
        """Return what a counter stands at after so many global steps that nothing disturbed."""
        samples = steps * batch_size * self.batches_per_step
        return {GLOBAL_STEP: initial_step + steps, SAMPLES_SEEN: samples, **self.counts(steps)}[name]

    def check_counters(self, counters: Counters, initial_step: int) -> None:
        """Raise CheckpointError if the optimizers' counters are not those of so many global steps."""
        for name, expected in self.counts(counters.global_step - initial_step).items():
            if counters[name] != expected:
                raise CheckpointError(
                    "counter",
                    f"counters disagree: {counters[name]} updates of the {name}, but global step "
                    f"{counters.global_step} with initial_step {initial_step} makes {expected}",
                )


class OneUpdate(Task):
    """A task whose step is one gradient and one update, which may come apart: an asynchronous one is."""

    @abstractmethod
    def gradient(self, state: TrainState, batch: Batch) -> tuple[Arena, Metrics]:
        """Return the gradient, finite, of the one model's parameters, and what was measured; nothing changes."""

    @abstractmethod
    def apply(self, state: TrainState, gradient: Arena, counts: Mapping[str, int]) -> Metrics:
        """Update the arrays, when the counters stand so; return what was measured. The gradient is used up."""
