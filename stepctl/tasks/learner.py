"""A model and the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stepctl.arena import Arena, Array, Workspace, update_target
from stepctl.ema import MovingAverage
from stepctl.errors import ConfigError
from stepctl.models.base import Backward, Ends, Model, TangentBackward
from stepctl.optimizers.base import Optimizer, Tick, global_norm
from stepctl.problems import defined_at, in_one_line
from stepctl.registry import is_builtin
from stepctl.rng import rng
from stepctl.state import TrainState

MODEL = "model"  # what the one model of a task, its optimizer and its counter are called


class Learner:
    """One model, its optimizer, and where their arrays lie in the state.

    The optimizer and the counter of its updates have the model's name. Alone in its task, the model's arrays are in
    the folders "params" and "ema"; beside others in "params/<name>" and "ema/<name>".
    """

    def __init__(
        self,
        name: str,
        model: Model,
        optimizer: Optimizer,
        ends: Ends,
        *,
        seed: int,
        dtype: str,
        threads: int,
        average: MovingAverage | None = None,
        norms: bool = False,
    ) -> None:
        self.name, self.model, self.optimizer, self.ends = name, model, optimizer, ends
        self._seed, self._dtype, self._threads, self._average, self._norms = seed, dtype, threads, average, norms
        alone = name == MODEL
        self._below = "" if alone else f"/{name}"
        self._prefix = "" if alone else f"{name}_"
        self._slots = {slot: f"optimizers/{name}/{slot}" for slot in optimizer.slots}

    def initial_arenas(self) -> dict[str, Arena]:
        """Return the arenas before the first update, read-only, by their folders in a checkpoint."""
        params = Arena(self.model.parameter_shapes(), self._dtype)
        self.model.initialize(params, lambda name: rng(self._seed, f"init{self._below}/{name}"))
        slots = self.optimizer.initial_slots(params)
        # what a user's code was handed to fill stays its own: it may have kept a view
        copy = not (is_builtin(self.model) and is_builtin(self.optimizer))
        arenas = {f"params{self._below}": params.to_read_only(copy=copy)}
        for slot, path in self._slots.items():
            arenas[path] = slots[slot].to_read_only(copy=copy)
        if self._average is not None:
            arenas[f"ema{self._below}"] = params.to_read_only(copy=True)
        return arenas

    def initial_buffers(self) -> Arena:
        """Return the model's buffers before the first update, read-only."""
        buffers = Arena(self.model.buffer_shapes(), self._dtype)
        self.model.initialize_buffers(buffers)
        return buffers.to_read_only(copy=not is_builtin(self.model))

    def arenas(self, state: TrainState) -> dict[str, Arena]:
        """Return what an update changes, by folder."""
        folders = [f"params{self._below}", *self._slots.values(), f"ema{self._below}"]
        return {folder: state.arenas[folder] for folder in folders if folder in state.arenas}

    def params(self, state: TrainState, *, average: bool = False) -> Arena:
        """Return the parameters, or their moving average."""
        return state.arenas[f"{'ema' if average else 'params'}{self._below}"]

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        """Return the model's outputs: (rows, n_outputs), and the way back."""
        made = self.model.forward(params, x, self._scope(workspace))
        try:
            outputs, backward = made
        except (TypeError, ValueError) as error:
            given = in_one_line(repr(made), 60)
            raise ConfigError(
                f"{self.name}: forward returned {given}; return outputs, backward{self._where}"
            ) from error
        expected = (len(x), self.ends.n_outputs)
        if outputs.shape != expected:
            raise ConfigError(f"{self.name}: forward returned shape {outputs.shape}; {expected} is needed{self._where}")
        return outputs, backward

    @property
    def _where(self) -> str:
        return f" ({defined_at(type(self.model))})"

    def tangent(self, params: Arena, x: Array, v: Array, workspace: Workspace) -> tuple[Array, Array, TangentBackward]:
        """Return the model's outputs, their derivative along v, and the way back of both."""
        return self.model.tangent(params, x, v, self._scope(workspace))

    def _scope(self, workspace: Workspace) -> Workspace:
        """Give the model's random streams its name where it has other models beside it."""
        return workspace if self.name == MODEL else workspace.scoped(self.name)

    def learning_rate(self, counts: Mapping[str, int]) -> float:
        """Return the rate of the next update, when the counters stand so."""
        schedule = self.optimizer.learning_rate
        return schedule(counts[schedule.counter])

    def update(
        self, state: TrainState, gradient: Arena, counts: Mapping[str, int], *, clip: float | None = None
    ) -> dict[str, float]:
        """Apply one update, when the counters stand so; return the learning rate, and norms if asked for.

        The gradient is used up. With `clip`, every parameter is then brought within +-clip.
        """
        params, number = self.params(state), counts[self.name] + 1
        measured = {"learning_rate": self.learning_rate(counts)}
        if self._norms:
            measured["gradient_norm"] = global_norm(gradient)
        slots = {slot: state.arenas[path] for slot, path in self._slots.items()}
        tick = Tick(measured["learning_rate"], number)
        with params.owners.updating():
            self.optimizer.update(params, slots, gradient, tick, threads=self._threads)
            if clip is not None:
                mine = update_target(params)[params.part]
                np.clip(mine, -clip, clip, out=mine)
            if self._average is not None:
                self._average.update(self.params(state, average=True), params, number)
            if self._norms:
                measured["parameter_norm"] = global_norm(params)
        return {f"{self._prefix}{name}": value for name, value in measured.items()}

    def measured(self) -> tuple[str, ...]:
        """Return the names of what `update` may return, the same whatever is asked for."""
        return tuple(f"{self._prefix}{name}" for name in ("learning_rate", "gradient_norm", "parameter_norm"))

    def trial(self, state: TrainState) -> None:
        """Raise ConfigError if the optimizer breaks its protocol."""
        self.optimizer.trial(self._dtype)
        self.learning_rate(state.counters)
