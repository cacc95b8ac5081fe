"""The task protocol: what one step computes, and how a state is evaluated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.distributed.comm import SINGLE_PROCESS, Comm
from stepctl.errors import CheckpointError, ConfigError, NonFiniteError
from stepctl.models.base import ModelShapes
from stepctl.programs.learner import MODEL, Learner
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.counters import GLOBAL_STEP, SAMPLES_SEEN, Counters
from stepctl.state.train_state import TrainState
from stepctl.system.text import a_or_an
from stepctl.writers.base import ROW_KEYS

Metrics = dict[str, float]
Mode = Literal["min", "max"]  # which value of a metric is the better one


def refuse_non_finite(
    step: int, loss: float, gradient: Arena, prefix: str = "", *, buffers: Arena | None = None
) -> None:
    """Raise NonFiniteError if the loss, the gradient or the new buffers of a step are not finite.

    The message names the first bad array; `prefix` precedes the names of the gradient's arrays.
    """
    bad = gradient.first_non_finite()
    if bad is not None:
        bad = f"the gradient of {prefix}{bad}"
    elif buffers is not None:
        bad = buffers.first_non_finite()
        if bad is not None:
            bad = f"the new value of buffers/{bad}"
    if bad is None and math.isfinite(loss):
        return
    where = f"first bad array: {bad}" if bad else "the gradient is finite"
    raise NonFiniteError(f"step {step}: the loss is {loss}; {where}", on_all_ranks=True)


def refuse_unwritten(gradient: Arena, buffers: Arena, model: str = MODEL) -> None:
    """Raise ConfigError if a sentinel is left in the gradient or the new buffers.

    Both were filled by `Arena.fill_sentinel` before the model wrote them.
    """
    unwritten = gradient.with_sentinel()
    if unwritten:
        raise ConfigError(
            f"{model}: backward left the gradient of {', '.join(unwritten)} unwritten; "
            "it must write all of it: grads[name][...] = ..."
        )
    unwritten = buffers.with_sentinel()
    if unwritten:
        raise ConfigError(
            f"{model}: forward left the new values of the buffers {', '.join(unwritten)} unwritten; in training it "
            "must write all of them: workspace.new_buffers[name][...] = ..."
        )


def as_numbers(metrics: object, giver: str) -> Metrics:
    """Return the metrics that a method of a task or a program returned, as Python numbers.

    `giver` begins the message of an error: "task: step returned". Raises ConfigError for a value
    that is no real number (NumPy's scalars and 0-d arrays are), and for a name that is no text, or
    that every metrics row already has.
    """
    if type(metrics) is dict and ROW_KEYS.isdisjoint(metrics):
        for name, value in metrics.items():
            if type(value) is not float or type(name) is not str:
                break
        else:
            return metrics  # the usual case, without a copy
    return _converted(metrics, giver)


def _converted(metrics: object, giver: str) -> Metrics:
    if not isinstance(metrics, Mapping):
        kind = a_or_an(type(metrics).__name__)
        raise ConfigError(f"{giver} {kind}; a dict of numbers by their names is needed")
    converted: Metrics = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ConfigError(f"{giver} a metric named {name!r}; names must be text")
        if name in ROW_KEYS:
            raise ConfigError(
                f"{giver} a metric {name!r}, which every row has; give it another name"
            )
        if isinstance(value, float):  # np.float64 too
            converted[name] = float(value)
        else:
            converted[name] = _as_number(f"{giver} the metric {name!r}", value)
    return converted


def _as_number(where: str, value: object) -> float:
    if isinstance(value, np.ndarray) and value.ndim > 0:
        raise ConfigError(f"{where} as an array of shape {value.shape}; a number is needed")
    plain = value
    if isinstance(value, np.ndarray | np.generic):
        plain = value.item()
    if isinstance(plain, Integral):
        return int(plain)
    if isinstance(plain, Real):
        return float(plain)
    raise ConfigError(f"{where} as {a_or_an(type(value).__name__)}; a number is needed")


def sum_metrics(parts: list[Metrics]) -> Metrics:
    """Return the sum of each metric, correctly rounded: the order of the parts does not matter."""
    if len(parts) == 1:
        return parts[0]
    return {name: _exact_sum([part[name] for part in parts]) for name in parts[0]}


def _exact_sum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # infinities of both signs, or an overflow
        return sum(values)


class Predictions(NamedTuple):
    """The predictions for some rows.

    values: (rows,) int64 classes, or (rows, n_outputs) numbers; probabilities: (rows, n_classes),
    None unless the task classifies.
    """

    values: Array
    probabilities: Array | None = None


class Task(ABC):
    """One update of the state, and its evaluation.

    The constructor takes keyword arguments. `seed`, `dtype` and `shards` are passed if its
    signature names them; all others come from the config's `task` section. `learners` and `comm`
    are available after `attach`, that is not in the constructor, `ends`, `counts` and `count_at`:
    the models are built from the result of `ends`.

    The arrays of the state are read-only: `Learner.update` changes parameters, slots and moving
    averages, `state.buffers.copy_from` changes buffers. A batch holds this rank's shards only.
    """

    targets: Targets
    models: ClassVar[tuple[str, ...]] = (MODEL,)
    metrics: ClassVar[dict[str, Mode]]  # returned by `evaluate`; states are compared by the first
    training_metrics: ClassVar[tuple[str, ...]]  # returned by `step`, without rates and norms
    clock: str = MODEL  # the counter that the global step follows
    batches_per_step: int = 1
    learners: dict[str, Learner]  # by the names in `models`
    comm: Comm = SINGLE_PROCESS  # the ranks that share each step

    # Features that the task supports:
    needs_targets: ClassVar[bool] = True  # it reads y; otherwise data without y are fine
    learns_labels: ClassVar[bool] = True  # labels decide what it learns, if its targets are classes
    divisible: ClassVar[bool] = False  # `step` computes only the shards of `comm.mine`
    # Ranks of one host may keep the arenas in shared memory, and each rank updates its own slice of
    # them. `step` must sum gradients with ShardSum and change arenas only through `Learner.update`.
    sliced: ClassVar[bool] = False
    buffered: ClassVar[bool] = False  # `step` updates the buffers of its one model
    classifies: ClassVar[bool] = False  # `predict` returns classes and their probabilities

    def attach(self, learners: dict[str, Learner], comm: Comm) -> None:
        """Complete the construction; called once, before any step."""
        self.learners = learners
        self.comm = comm

    @abstractmethod
    def ends(
        self, n_classes: int | None, sample_shape: Shape, target_shape: Shape
    ) -> dict[str, ModelShapes]:
        """Return the shapes of the inputs and outputs of each of the `models`."""

    def counts(self, steps: int) -> dict[str, int]:
        """Return the number of updates of each optimizer after `steps` global steps."""
        return {MODEL: steps}

    def initial_state(self, initial_step: int) -> TrainState:
        """Return the state before the first update.

        A task may add arenas of its own. One that is not `to_read_only` is written by `step` and
        copied by a save; such a task is not `sliced`.
        """
        counters = {GLOBAL_STEP: initial_step, SAMPLES_SEEN: 0} | dict.fromkeys(self.models, 0)
        arenas: dict[str, Arena] = {}
        for learner in self.learners.values():
            arenas |= learner.initial_arenas()
        if len(self.learners) != 1:  # only the model of a task with one model may have buffers
            return TrainState(Counters(counters), arenas)
        (learner,) = self.learners.values()
        return TrainState(Counters(counters), arenas, learner.initial_buffers())

    @abstractmethod
    def trial(self, state: TrainState, batch: Batch) -> None:
        """Compute a step without applying it; ConfigError if the model breaks its protocol."""

    @abstractmethod
    def step(self, state: TrainState, batch: Batch) -> Metrics:
        """Apply one update to the arrays, not to the counters; return the training metrics.

        After an error before the first change of an array the state is still valid. After a later
        one it is not, and is never saved; raise TornUpdate where the change cannot be detected.
        NonFiniteError must leave the state unchanged.
        """

    @abstractmethod
    def evaluate(
        self, state: TrainState, batches: Iterable[Batch], *, average: bool = False
    ) -> Metrics:
        """Return the metrics over all batches; changes nothing.

        With `average`, the weights are their moving average.
        """

    def predict(self, state: TrainState, x: Array, *, average: bool = False) -> Predictions | None:
        """Return the predictions for x, (rows, *sample_shape); None if the task makes none.

        With `average`, the weights are their moving average.
        """
        return None

    def generate(
        self, state: TrainState, n: int, *, average: bool = False, seed: int | None = None
    ) -> Array | None:
        """Return n samples, (n, *sample_shape), which depend on the weights and the seed alone.

        None if the task has no generator. `seed` is by default the run's. With `average`, the
        weights are their moving average.
        """
        return None

    def increments(self, counters: Counters, samples: int) -> dict[str, int]:
        """Return the increment of each counter for a completed update of `samples` samples."""
        updates = counters[self.clock]
        before = self.counts(updates)
        after = self.counts(updates + 1)
        increments = {GLOBAL_STEP: 1, SAMPLES_SEEN: samples}
        return increments | {name: after[name] - before[name] for name in after}

    def count_at(self, name: str, steps: int, *, initial_step: int, batch_size: int) -> int:
        """Return a counter's value after `steps` global steps without a skipped batch."""
        samples = steps * batch_size * self.batches_per_step
        values = {GLOBAL_STEP: initial_step + steps, SAMPLES_SEEN: samples}
        values |= self.counts(steps)
        return values[name]

    @property
    def needs_autograd(self) -> bool:
        """Whether autograd computes gradients; its version is part of the run's numerics then."""
        return False

    def close(self) -> None:
        """Release the resources of the task; called once, after the last step."""
        return

    def check_counters(self, counters: Counters, initial_step: int) -> None:
        """Raise CheckpointError unless the counters are consistent with the global step."""
        for name, expected in self.counts(counters.global_step - initial_step).items():
            if counters[name] != expected:
                raise CheckpointError(
                    "counter",
                    f"inconsistent counters: {counters[name]} updates of the {name}, expected "
                    f"{expected} at global step {counters.global_step} (initial_step {initial_step})",
                )


class OneUpdate(Task):
    """A task whose step is one gradient and one update; asynchronous training calls both."""

    @abstractmethod
    def gradient(self, state: TrainState, batch: Batch) -> tuple[Arena, Metrics]:
        """Return the finite gradient of the one model and the training metrics; changes nothing."""

    @abstractmethod
    def apply(self, state: TrainState, gradient: Arena, counts: Mapping[str, int]) -> Metrics:
        """Update the arrays and return metrics of the update; `counts` are the counters before it.

        The gradient is overwritten.
        """
