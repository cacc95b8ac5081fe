"""A warning where several BLAS threads are slower than one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from stepctl.hooks.base import Hook
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics

SLOW = 2.5  # times slower than one thread
_FIRST = 1.0  # seconds from the first step to the first probe: a short run pays nothing
_INTERVAL = 5.0  # seconds between two probes, at least
_SHARE = 200  # a probe takes at most this part of the time
_WINDOW, _ENOUGH = 10, 3  # probes that are remembered, and how many of them must be slow


class SlowThreads(Hook):
    """Warns once where the BLAS threads of a run are slower than one thread would be.

    On a machine whose cores are busy with something else, BLAS waits for a thread that has no core. `probe` returns
    how many times longer a matrix product takes with the run's threads than with one; it is called between steps,
    now and then, and its result decides nothing but the warning.
    """

    name = "slow_threads"

    def __init__(
        self, probe: Callable[[], float], warn: Callable[[float], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe = probe
        self._warn = warn
        self._clock = clock
        self._next = float("inf")
        self._ratios = deque[float](maxlen=_WINDOW)

    def start(self, state: TrainState) -> None:
        self._next = self._clock() + _FIRST

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        began = self._clock()
        if began < self._next:
            return
        self._ratios.append(self._probe())
        ended = self._clock()
        self._next = ended + max(_INTERVAL, _SHARE * (ended - began))
        slow = sorted(ratio for ratio in self._ratios if ratio > SLOW)
        if len(slow) >= _ENOUGH:
            self._warn(slow[len(slow) // 2])
            self._next = float("inf")
