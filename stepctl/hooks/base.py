"""The protocol of a hook, and the checked access to a hook's saved arrays."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, final

import numpy as np

from stepctl.config.cadence import Cadence
from stepctl.errors import ConfigError
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array, read_only
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from stepctl.system.text import a_or_an

_DTYPES = ("float32", "float64", "int64", "uint8")  # that the checkpoint format has for hooks


class Hook(ABC):
    """Callbacks around the steps.

    A hook decides by the counters alone: not by the time or by the process.

    A hook with arrays of its own returns them from `state`. They are saved in each checkpoint under
    /hooks/<name>, and a resume passes them to `load_state`. The arrays of the training state are
    read-only.

    The constructor is called by commands that make no step, too: acquire resources in `start`. In a
    job of several ranks, only rank 0 has hooks.
    """

    name: str
    # called with the counters after an update: whether to call `after_step`; None: always
    trigger: Callable[[Counters], bool] | None = None

    @property
    def essential(self) -> bool:
        """Whether a checkpoint is incomplete if this hook failed: by default, if it has arrays."""
        return has_state(self)

    def state(self) -> Mapping[str, Array]:
        """Return the current values of the arrays to save.

        Called at each save, which copies them. Names, shapes and dtypes (float32, float64, int64 or
        uint8) must be the same at each call.
        """
        return {}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Restore the arrays of a checkpoint, which the hook may keep.

        By default the arrays that `state` returns are filled in place.
        """
        for key, array in self.state().items():
            array[...] = state[key]

    def start(self, state: TrainState) -> None:
        """Run once, before the segment's first step."""
        return

    def after_step(self, state: TrainState, metrics: Metrics) -> str | None:
        """Run after an update, when the counters include it, if the trigger fires.

        Returns None, or the reason to stop the run after this step. A stopped run stays finished.
        """
        return None

    def due_step(self, step: int) -> float:
        """Return the next global step after `step` that needs a call; by default step + 1.

        `after_step` is also called after the first step of a segment, and after a signal.
        """
        return step + 1

    def due_time(self) -> float:
        """Return the time.monotonic() from which a call is needed; by default infinity."""
        return math.inf

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        """Run once, after the segment's last step, with its metrics (None: there was no step)."""
        return


class PeriodicHook(Hook):
    """A hook whose `after_step` runs where a cadence fires."""

    def __init__(self, cadence: Cadence) -> None:
        self.trigger = cadence.fires
        self._cadence = cadence

    def due_step(self, step: int) -> float:
        return self._cadence.due_step(step)


class TimedHook(Hook):
    """A hook that is due at a time, and at no step."""

    def due_step(self, step: int) -> float:
        return math.inf


def has_state(hook: Hook) -> bool:
    """Tell whether a hook has arrays in checkpoints."""
    return type(hook).state is not Hook.state


@final
class HookState:
    """A hook's arrays; each access checks their types, and that their layout is constant."""

    def __init__(self, hook: Hook) -> None:
        """ConfigError if the arrays cannot be saved, or the default `load_state` cannot fill them."""
        self.name = hook.name
        self._hook = hook
        self._layout: dict[str, tuple[Any, ...]] = {}
        arrays = self._checked_arrays()
        self._layout = _layout(arrays)
        if type(hook).load_state is Hook.load_state:
            arrays_of_next_call = hook.state()
            for key, array in arrays.items():
                self._check_same_memory(key, array, arrays_of_next_call.get(key))

    def state(self) -> dict[str, Array]:
        """Return the hook's arrays, read-only; ConfigError if a name, shape or dtype changed."""
        arrays = self._checked_arrays()
        layout = _layout(arrays)
        if layout != self._layout:
            keys = [*self._layout, *layout]
            key = next(key for key in keys if layout.get(key) != self._layout.get(key))
            raise ConfigError(
                f"hook {self.name}: state()[{key!r}] is {_describe(layout, key)}, and was "
                f"{_describe(self._layout, key)} when the run was opened; names, shapes and dtypes "
                "must stay the same"
            )
        return {key: read_only(array) for key, array in arrays.items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Restore the arrays of a checkpoint."""
        self._hook.load_state(state)

    def _checked_arrays(self) -> dict[str, Array]:
        values: object = self._hook.state()
        if not isinstance(values, Mapping):
            kind = a_or_an(type(values).__name__)
            raise ConfigError(
                f"hook {self.name}: state() returned {kind}; return a dict of NumPy arrays"
            )
        return {key: self._checked_array(key, value) for key, value in values.items()}

    def _checked_array(self, key: object, value: object) -> Array:
        if isinstance(value, np.ndarray):
            layout = (value.dtype, value.shape)
            if self._layout.get(cast(str, key)) == layout:  # fast: each save checks all hooks
                return value
        where = f"hook {self.name}: state()[{key!r}]"
        if not isinstance(key, str):
            raise ConfigError(f"{where}: names must be strings")
        if not isinstance(value, np.ndarray | np.generic):
            kind = a_or_an(type(value).__name__)
            raise ConfigError(f"{where} is {kind}; return a NumPy array, such as np.array(0.0)")
        array = np.asarray(value)
        if array.dtype.newbyteorder("=").name not in _DTYPES:
            raise ConfigError(
                f"{where} is an array of {array.dtype}; a checkpoint holds {', '.join(_DTYPES)}"
            )
        return array

    def _check_same_memory(self, key: str, array: Array, next_array: object) -> None:
        """Raise ConfigError unless two calls of `state` returned the same writable memory."""
        is_writable = isinstance(next_array, np.ndarray) and array.flags.writeable
        if is_writable and (array.size == 0 or np.may_share_memory(array, next_array)):
            return
        raise ConfigError(
            f"hook {self.name}: state()[{key!r}] is another array at each call, so a resume cannot "
            "fill it; return an array that the hook keeps, or define load_state(self, state)"
        )


def hook_states(hooks: Iterable[Hook]) -> tuple[HookState, ...]:
    """Return the checked arrays of the hooks that have some."""
    return tuple(HookState(hook) for hook in hooks if has_state(hook))


def _layout(arrays: Mapping[str, Array]) -> dict[str, tuple[Any, ...]]:
    return {key: (array.dtype, array.shape) for key, array in arrays.items()}


def _describe(layout: Mapping[str, tuple[Any, ...]], key: str) -> str:
    if key not in layout:
        return "nothing"
    dtype, shape = layout[key]
    return f"{dtype} {shape}"
