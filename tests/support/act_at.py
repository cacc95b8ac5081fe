"""A hook that acts at one step."""

from __future__ import annotations

from collections.abc import Callable

from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.train_state import TrainState


class ActAt(Hook):
    """Calls a function after a step, before the row of the next one is written."""

    name = "act_at"

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step = step
        self.act = act

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self.step:
            self.act()
