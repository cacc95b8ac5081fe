"""Stops that a program's metrics, a script or a hook requested; they are part of the state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from stepctl.config.model import Config, WhenConfig
from stepctl.errors import printable
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason, StopRule

_MAX_BYTES = 256  # of a text; its array must have one size
FORK_REMEDY = "to continue from an earlier step, fork the run"
_HOOK_REMEDY = "to continue, change or remove the hook: --set hooks=[...]"


class RequestedStop(StopRule, Hook):
    """Stops the run once it is requested.

    The reason is saved in checkpoints, so that a resume of a stopped run makes no step.
    """

    def __init__(self) -> None:
        self._reason = np.zeros(_MAX_BYTES, np.uint8)

    def state(self) -> dict[str, Array]:
        return {"reason": self._reason}

    @property
    def remedy(self) -> str:
        """How to continue a stopped run."""
        return FORK_REMEDY

    @property
    def is_requested(self) -> bool:
        """Whether the run is to stop."""
        return bool(self._reason[0])

    def reset(self) -> None:
        """Forget the request."""
        for array in self.state().values():
            array[...] = 0

    def reason(self, counters: Counters) -> StopReason | None:
        if not self._reason[0]:
            return None
        return StopReason(_decode(self._reason), done=True, remedy=self.remedy)


class StopRequest(RequestedStop):
    """A stop by a metric of a step that is below or above a value, or by a script."""

    name = "stop"

    def __init__(self, when: WhenConfig | None, remedy: str) -> None:
        super().__init__()
        self.when = when
        self._remedy = remedy

    @property
    def remedy(self) -> str:
        return self._remedy

    def request(self, reason: str) -> None:
        """Stop before the next step."""
        _encode(reason, self._reason)

    def due_step(self, step: int) -> float:
        return math.inf if self.when is None else step + 1

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        when = self.when
        if when is None:
            return
        value = metrics[when.metric]
        if when.below is not None and value < when.below:
            self.request(f"{when.metric} {value:.6g} is below {when.below:g}")
        elif when.above is not None and value > when.above:
            self.request(f"{when.metric} {value:.6g} is above {when.above:g}")


class HookStop(RequestedStop):
    """A stop that the user's own hooks request.

    With the reason it saves the import path of a hook from the config; the path is empty for a hook
    that was given in Python.
    """

    name = "hook_stop"

    def __init__(self, paths: Mapping[str, str] | None = None) -> None:
        """`paths` are the import paths of the config's hooks, by the hooks' names."""
        super().__init__()
        self._paths = paths or {}
        self._path = np.zeros(_MAX_BYTES, np.uint8)

    def state(self) -> dict[str, Array]:
        return {**super().state(), "path": self._path}

    @property
    def remedy(self) -> str:
        return _HOOK_REMEDY if self._path[0] else FORK_REMEDY

    def request(self, hook: str, reason: str) -> None:
        """Stop before the next step; of several requests the first counts."""
        if self.is_requested:
            return
        _encode(f"hook {hook}: {reason}", self._reason)
        _encode(self._paths.get(hook, ""), self._path)

    def is_obsolete(self, before: Config, config: Config) -> bool:
        """Tell whether the hook that requested the stop was changed or removed."""
        path = _decode(self._path)
        if not path:
            return False
        old = [spec for spec in before.hook_specs if spec["name"] == path]
        return old != [spec for spec in config.hook_specs if spec["name"] == path]


def _encode(text: str, array: Array) -> None:
    data = printable(text).encode(errors="replace")[:_MAX_BYTES]
    data = data.decode(errors="ignore").encode()  # no half of a character
    array[:] = 0
    array[: len(data)] = np.frombuffer(data, np.uint8)


def _decode(array: Array) -> str:
    return array.tobytes().rstrip(b"\0").decode(errors="replace")
