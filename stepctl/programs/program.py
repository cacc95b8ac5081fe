"""A user's own program: its steps, and its state.

class Walk(Program):
    def initial_state(self, rng):
        return {"x": np.zeros(3)}

    def step(self, state, step, rng):
        state["x"] += rng("noise").standard_normal(3)
        return {"radius": np.linalg.norm(state["x"])}
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast, final

import numpy as np

from stepctl.data.batches import Batch
from stepctl.errors import ConfigError
from stepctl.models.base import Ends
from stepctl.programs.base import Metrics, Mode, Task, as_numbers
from stepctl.state.arena import Shape
from stepctl.state.counters import GLOBAL_STEP, SAMPLES_SEEN, Counters
from stepctl.state.program_state import ProgramState, find_changed
from stepctl.state.streams import Streams
from stepctl.state.train_state import TrainState
from stepctl.system.text import a_or_an
from stepctl.system.user_code import defined_at
from stepctl.writers.series import SeriesBuffer

StepResult = Mapping[str, float] | tuple[Mapping[str, float], Mapping[str, Any]] | None
NAMES: dict[str, str] = {}  # there is no built-in program besides the tasks


class Program(ABC):
    """What one step does, and the state that it changes.

    A config names the class as `program: {name: "module:Class", ...}`. The constructor takes the
    section's other keys as keyword arguments, and `seed` if its signature names it. An argument
    annotated `stepctl.File` is a data file.

    `state` is a dict of arrays, numbers, text, lists, dicts, NumPy generators and objects with
    `state_dict` and `load_state_dict`. All that later steps depend on must be in it, or be computed
    from the arguments and the step. `rng("name")` returns the `numpy.random.Generator` of a stream;
    its draws depend on the seed, the name and the step.
    """

    @abstractmethod
    def initial_state(self, rng: Streams) -> dict[str, Any]:
        """Return the state before the first step."""

    @abstractmethod
    def step(self, state: dict[str, Any], step: int, rng: Streams) -> StepResult:
        """Change the state, in place or by rebinding its keys; return metrics, which are numbers.

        `step` is the number of completed steps before this one. With rows of series, which are
        arrays, return (metrics, {name: row}).
        """

    def evaluate(self, state: dict[str, Any], rng: Streams) -> Mapping[str, float]:
        """Return the metrics of a state, which must not be changed."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the resources that the constructor acquired."""
        return


@final
class Script(Program):
    """The loop of a script, which makes the steps itself; `state` is the dict that it changes."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def initial_state(self, rng: Streams) -> dict[str, Any]:
        return self.state

    def step(self, state: dict[str, Any], step: int, rng: Streams) -> Metrics:
        raise NotImplementedError


@final
class ProgramTask(Task):
    """A user's program as a task without models and data."""

    models: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[dict[str, Mode]] = {}  # a program declares none
    training_metrics: ClassVar[tuple[str, ...]] = ()
    clock = GLOBAL_STEP

    def __init__(self, program: Program, *, seed: int, needed_metric: str | None = None) -> None:
        """Each step must return `needed_metric`."""
        self.program = program
        self._needed_metric = needed_metric
        self._initial_streams = Streams(seed, "initial state")
        self.step_streams = Streams(seed, "steps")
        self._evaluation_streams = Streams(seed, "evaluations")
        self.series = SeriesBuffer()

    @property
    def can_evaluate(self) -> bool:
        """Whether the program has a method `evaluate`."""
        return type(self.program).evaluate is not Program.evaluate

    def ends(
        self, n_classes: int | None, sample_shape: Shape, target_shape: Shape
    ) -> dict[str, Ends]:
        return {}

    def counts(self, steps: int) -> dict[str, int]:
        return {}

    def increments(self, counters: Counters, samples: int) -> dict[str, int]:
        return {GLOBAL_STEP: 1, SAMPLES_SEEN: samples}

    def initial_state(self, initial_step: int) -> TrainState:
        self._initial_streams.begin_step(initial_step)
        state: object = self.program.initial_state(self._initial_streams)
        self._initial_streams.refuse_kept("program: initial_state")
        self._initial_streams.end_step()
        if not isinstance(state, dict):
            kind = a_or_an(type(state).__name__)
            raise ConfigError(f"program: initial_state returned {kind}; return a dict{self._where}")
        counters = Counters({GLOBAL_STEP: initial_step, SAMPLES_SEEN: 0})
        if not isinstance(self.program, Script):  # a program may keep the objects that it returned
            ProgramState(state).view()  # raises an error for values that share memory
            state = _own_copy(state)
        return TrainState(counters, {}, program=ProgramState(cast(dict[str, Any], state)))

    def trial(self, state: TrainState, batch: Batch) -> None:
        return  # its step cannot be made without changing the state

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        step = state.counters.global_step
        streams = self.step_streams
        streams.begin_step(step)
        returned: object = self.program.step(_program_state(state).live, step, streams)
        streams.end_step()
        if isinstance(returned, tuple):
            returned = self._take_series(step + 1, returned)
        metrics: Metrics = {}
        if returned is not None:
            metrics = as_numbers(returned, "program: step returned")
        if self._needed_metric is not None and self._needed_metric not in metrics:
            raise ConfigError(
                f"program: step returned no {self._needed_metric!r}, which stop.when.metric names; "
                f"it returned {', '.join(metrics) or 'nothing'}"
            )
        return metrics

    def _take_series(self, step: int, returned: tuple[object, ...]) -> object:
        """Add the rows of series that came with the metrics of a step, and return the metrics."""
        rows = returned[-1] if len(returned) == 2 else None
        if not isinstance(rows, Mapping):
            raise ConfigError(
                f"program: step returned a tuple of {len(returned)}; return metrics, or (metrics, "
                f"{{name: row}}){self._where}"
            )
        self.series.add(step, rows)
        return returned[0]

    def evaluate(
        self, state: TrainState, batches: Iterable[Batch], *, average: bool = False
    ) -> Metrics:
        program_state = _program_state(state)
        before = program_state.capture()
        streams = self._evaluation_streams
        streams.begin_step(state.counters.global_step)
        returned: object = self.program.evaluate(program_state.live, streams)
        streams.end_step()
        changed = find_changed(before, program_state.view())
        if changed is not None:
            raise ConfigError(
                f"program: evaluate changed {changed}; it must leave the state as it is: copy what "
                f"it changes{self._where}"
            )
        return as_numbers(returned, "program: evaluate returned")

    def close(self) -> None:
        self.program.close()

    @property
    def _where(self) -> str:
        return f" ({defined_at(type(self.program))})"


def _program_state(state: TrainState) -> ProgramState:
    assert isinstance(state.program, ProgramState)
    return state.program


def _own_copy(value: Any) -> Any:
    """Return a copy of containers, arrays and generators; other values are the same."""
    if isinstance(value, dict):
        return {key: _own_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_own_copy(item) for item in value)
    if isinstance(value, np.ndarray):
        return value.copy(order="K")
    if isinstance(value, np.random.Generator | np.random.RandomState):
        return copy.deepcopy(value)
    return value
