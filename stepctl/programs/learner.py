"""A model and the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stepctl.config.registry import is_builtin
from stepctl.errors import ConfigError
from stepctl.models.base import Backward, Model, ModelShapes, TangentBackward
from stepctl.optimizers.base import Optimizer, UpdateInfo, global_norm, gradient_norm
from stepctl.optimizers.groups import owned_parts
from stepctl.optimizers.moving_average import MovingAverage
from stepctl.state.arena import Arena, Array, spans, update_target
from stepctl.state.rng import rng
from stepctl.state.train_state import TrainState
from stepctl.state.workspace import Workspace
from stepctl.system.text import in_one_line
from stepctl.system.user_code import defined_at

if TYPE_CHECKING:
    from stepctl.optimizers.kernels import CompiledUpdate, Kernel

MODEL = "model"  # the name of a task's one model, of its optimizer and of its counter
_MEASURED = ("learning_rate", "gradient_norm", "parameter_norm")


class Learner:
    """One model, its optimizer, and the places of their arrays in the state.

    The optimizer and the counter of its updates have the model's name. The only model of a task has
    its arrays in the folders "params" and "ema"; one of several has them in "params/<name>" and
    "ema/<name>".
    """

    def __init__(
        self,
        name: str,
        model: Model,
        optimizer: Optimizer,
        shapes: ModelShapes,
        *,
        seed: int,
        dtype: str,
        threads: int,
        average: MovingAverage | None = None,
        norms: bool = False,
        initialize: bool = True,
    ) -> None:
        """Without `initialize` the arenas are zeros: they are to be restored."""
        self.name = name
        self.model = model
        self.optimizer = optimizer
        self.shapes = shapes
        self._seed = seed
        self._dtype = dtype
        self._threads = threads
        self._average = average
        self._norms = norms
        self._initialize = initialize
        self._suffix = "" if name == MODEL else f"/{name}"  # of folders
        self._prefix = "" if name == MODEL else f"{name}_"  # of metrics
        self._slots = {slot: f"optimizers/{name}/{slot}" for slot in optimizer.slots}
        layout = spans(model.parameter_shapes(), dtype)
        self._groups = optimizer.group_slices(layout)
        self.n_elements = max((span.stop for span in layout.values()), default=0)
        self._compiled: CompiledUpdate | None = None
        self._compiled_average: Kernel | None = None

    def compile_update(self) -> bool:
        """Use compiled kernels from now on; the bits stay the same. False for a user's optimizer.

        It takes a second, and less if they were compiled before. CompilationError if it fails.
        """
        from stepctl.optimizers import compilation

        compiled = compilation.compile_update(self.optimizer, self._dtype)
        average = None
        if self._average is not None:
            average = compilation.compile_average(self._dtype)
        self._compiled = compiled
        self._compiled_average = average
        return compiled is not None

    def initial_arenas(self) -> dict[str, Arena]:
        """Return the read-only arenas before the first update, by their folders in a checkpoint."""
        params = Arena(self.model.parameter_shapes(), self._dtype)
        if self._initialize:
            self.model.initialize(
                params, lambda name: rng(self._seed, f"init{self._suffix}/{name}")
            )
        slots = self.optimizer.initial_slots(params)
        # user code may have kept a view of the arrays it filled
        copy = not (is_builtin(self.model) and is_builtin(self.optimizer))
        arenas = {f"params{self._suffix}": params.to_read_only(copy=copy)}
        for slot, path in self._slots.items():
            arenas[path] = slots[slot].to_read_only(copy=copy)
        if self._average is not None:
            average = params if self._initialize else params.like()
            arenas[f"ema{self._suffix}"] = average.to_read_only(copy=self._initialize)
        return arenas

    def initial_buffers(self) -> Arena:
        """Return the model's read-only buffers before the first update."""
        buffers = Arena(self.model.buffer_shapes(), self._dtype)
        self.model.initialize_buffers(buffers)
        return buffers.to_read_only(copy=not is_builtin(self.model))

    def arenas(self, state: TrainState) -> dict[str, Arena]:
        """Return the arenas that an update changes, by folder."""
        folders = [f"params{self._suffix}", *self._slots.values(), f"ema{self._suffix}"]
        return {folder: state.arenas[folder] for folder in folders if folder in state.arenas}

    def params(self, state: TrainState, *, average: bool = False) -> Arena:
        """Return the parameters, or their moving average."""
        folder = "ema" if average else "params"
        return state.arenas[f"{folder}{self._suffix}"]

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        """Return the model's outputs, (rows, n_outputs), and its backward function.

        Raises ConfigError if the model returns anything else.
        """
        returned = self.model.forward(params, x, self._scope(workspace))
        try:
            outputs, backward = returned
        except (TypeError, ValueError) as error:
            found = in_one_line(repr(returned), 60)
            raise ConfigError(
                f"{self.name}: forward returned {found}; return outputs, backward{self._where}"
            ) from error
        expected = (len(x), self.shapes.n_outputs)
        if outputs.shape != expected:
            raise ConfigError(
                f"{self.name}: forward returned shape {outputs.shape}; {expected} is needed{self._where}"
            )
        return outputs, backward

    @property
    def _where(self) -> str:
        return f" ({defined_at(type(self.model))})"

    def tangent(
        self, params: Arena, x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, TangentBackward]:
        """Return outputs, their directional derivative along v, and the backward function of both.

        x, v: (rows, *input_shape); outputs, derivative: (rows, n_outputs).
        """
        return self.model.tangent(params, x, v, self._scope(workspace))

    def _scope(self, workspace: Workspace) -> Workspace:
        """Return the workspace; one of several models gets random streams of its own."""
        if self.name == MODEL:
            return workspace
        return workspace.scoped(self.name)

    def learning_rate(self, counts: Mapping[str, int]) -> float:
        """Return the learning rate of the next update; `counts` are the counters before it."""
        schedule = self.optimizer.learning_rate
        return schedule(counts[schedule.counter])

    def update(
        self,
        state: TrainState,
        gradient: Arena,
        counts: Mapping[str, int],
        *,
        clip: float | None = None,
    ) -> dict[str, float]:
        """Apply one update and return its learning rate, and its norms if the config asks for them.

        `counts` are the counters before the update. The gradient is overwritten. With `clip`, the
        new parameters are limited to -clip..clip, except for frozen ones.
        """
        params = self.params(state)
        number = counts[self.name] + 1
        measured = {"learning_rate": self.learning_rate(counts)}
        if self._norms:
            measured["gradient_norm"] = gradient_norm(gradient, self._groups)
        slots = {slot: state.arenas[path] for slot, path in self._slots.items()}
        info = UpdateInfo(measured["learning_rate"], number)
        with params.partition.synchronized_update():
            self.optimizer.update(
                params,
                slots,
                gradient,
                info,
                groups=self._groups,
                threads=self._threads,
                compiled=self._compiled,
            )
            if clip is not None:
                for at in owned_parts(params, self._groups, frozen=False):
                    mine = update_target(params)[at]
                    np.clip(mine, -clip, clip, out=mine)
            if self._average is not None:
                average = self.params(state, average=True)
                self._average.update(average, params, number, self._compiled_average)
            if self._norms:
                measured["parameter_norm"] = global_norm(params)
        return {f"{self._prefix}{name}": value for name, value in measured.items()}

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that `update` can return."""
        return tuple(f"{self._prefix}{name}" for name in _MEASURED)

    def trial(self, state: TrainState) -> None:
        """Raise ConfigError if the optimizer or its schedule breaks its protocol."""
        self.optimizer.trial(self._dtype)
        self.learning_rate(state.counters)
