"""The protocol of a hook."""

from __future__ import annotations

from abc import ABC
from typing import NamedTuple

from stepctl.arena import Array
from stepctl.state import TrainState, Trigger
from stepctl.tasks.base import Metrics


class StopReason(NamedTuple):
    """Why a segment ends, whether that is its end (or an interruption), and how to go on all the same."""

    text: str
    done: bool
    remedy: str = ""


class Hook(ABC):
    """Something that looks at the state after a step; it decides by the global step alone.

    A hook that remembers returns its arrays from `state`: they are in every checkpoint under /hooks/<name>,
    and a resume fills them in place.
    """

    name: str
    trigger: Trigger | None = None  # asked after every update; without one, all count

    @property
    def essential(self) -> bool:
        """Whether a checkpoint of a step in which this hook failed would lack something: what it remembers, a row."""
        return type(self).state is not Hook.state

    def state(self) -> dict[str, Array]:
        """Return the arrays that this hook changes and must find again after a resume."""
        return {}

    def start(self, state: TrainState) -> None:
        """Run once, before the segment's first step."""
        return

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        """Run when an update is complete and counted, if the trigger fires."""
        return

    def end(self, state: TrainState, metrics: Metrics | None, reason: StopReason) -> None:
        """Run once, after the segment's last step; `metrics` are that step's, None if there was no step."""
        return
