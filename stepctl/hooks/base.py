"""The protocol of a hook."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, NamedTuple, cast, final

import numpy as np

from stepctl.arena import Array, read_only
from stepctl.errors import ConfigError
from stepctl.problems import a_or_an
from stepctl.state import TrainState, Trigger
from stepctl.tasks.base import Metrics

_DTYPES = ("float32", "float64", "int64", "uint8")  # that a checkpoint holds


class StopReason(NamedTuple):
    """Why a segment ends, whether that is its end (or an interruption), and how to go on all the same."""

    text: str
    done: bool
    remedy: str = ""


class Hook(ABC):
    """Something that looks at the state after a step; it decides by the global step alone.

    A hook that remembers returns its arrays from `state`: they are in every checkpoint under /hooks/<name>, and a
    resume hands them to `load_state`. The arrays of the training state, which it is shown, are read-only.
    """

    name: str
    trigger: Trigger | None = None  # asked after every update; without one, all count

    @property
    def essential(self) -> bool:
        """Whether a checkpoint of a step in which this hook failed would lack something: what it remembers, a row."""
        return type(self).state is not Hook.state

    def state(self) -> Mapping[str, Array]:
        """Return, as they are now, the arrays that this hook must find again after a resume.

        Called at each save, which copies them. Names, shapes and dtypes (float32, float64, int64 or uint8) stay as
        they are at the first call.
        """
        return {}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Go on from the arrays of a checkpoint, which are this hook's to keep.

        By default the arrays that `state` returns are filled in place.
        """
        for key, array in self.state().items():
            array[...] = state[key]

    def start(self, state: TrainState) -> None:
        """Run once, before the segment's first step."""
        return

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        """Run when an update is complete and counted, if the trigger fires."""
        return

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        """Run once, after the segment's last step; `metrics` are that step's, None if there was no step."""
        return


@final
class HookState:
    """The arrays of one hook, checked at each call: a checkpoint can hold them, and their kinds stay the same."""

    def __init__(self, hook: Hook) -> None:
        """ConfigError if the arrays cannot be saved, or if `load_state` is the default and could not fill them."""
        self.name, self._hook = hook.name, hook
        self._kinds: dict[str, tuple[Any, ...]] = {}
        arrays = self._arrays()
        self._kinds = _kinds(arrays)
        if type(hook).load_state is Hook.load_state:
            again = hook.state()
            for key, array in arrays.items():
                self._check_can_be_filled(key, array, again.get(key))

    def state(self) -> dict[str, Array]:
        """Return the hook's arrays, read-only; ConfigError if they are not of the kinds they were."""
        arrays = self._arrays()
        found = _kinds(arrays)
        if found != self._kinds:
            key = next(key for key in [*self._kinds, *found] if found.get(key) != self._kinds.get(key))
            now, before = (" ".join(map(str, kinds.get(key, ("nothing",)))) for kinds in (found, self._kinds))
            raise ConfigError(
                f"hook {self.name}: state()[{key!r}] is {now}, and was {before} when the run was opened; names, shapes "
                "and dtypes must stay the same"
            )
        return {key: read_only(array) for key, array in arrays.items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Hand the hook the arrays of a checkpoint."""
        self._hook.load_state(state)

    def _arrays(self) -> dict[str, Array]:
        values: object = self._hook.state()
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"hook {self.name}: state() returned {a_or_an(type(values).__name__)}; a dict of NumPy arrays is needed"
            )
        return {key: self._array(key, value) for key, value in values.items()}

    def _array(self, key: object, value: object) -> Array:
        # most often, and at once: a save asks all hooks
        if isinstance(value, np.ndarray) and self._kinds.get(cast(str, key)) == (value.dtype, value.shape):
            return value
        where = f"hook {self.name}: state()[{key!r}]"
        if not isinstance(key, str):
            raise ConfigError(f"{where}: names must be strings")
        if not isinstance(value, np.ndarray | np.generic):
            kind = a_or_an(type(value).__name__)
            raise ConfigError(f"{where} is {kind}; return a NumPy array, such as np.array(0.0)")
        array = np.asarray(value)
        if array.dtype.newbyteorder("=").name not in _DTYPES:
            raise ConfigError(f"{where} is an array of {array.dtype}; a checkpoint holds {', '.join(_DTYPES)}")
        return array

    def _check_can_be_filled(self, key: str, array: Array, again: object) -> None:
        in_place = isinstance(again, np.ndarray) and array.flags.writeable
        if not (in_place and (array.size == 0 or np.may_share_memory(array, again))):
            raise ConfigError(
                f"hook {self.name}: state()[{key!r}] is made anew at each call, so a resume cannot fill it; return an "
                "array that the hook keeps, or define load_state(self, state)"
            )


def _kinds(arrays: Mapping[str, Array]) -> dict[str, tuple[Any, ...]]:
    return {key: (array.dtype, array.shape) for key, array in arrays.items()}
