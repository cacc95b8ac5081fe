"""A warning if several BLAS threads are slower than one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from stepctl.hooks.base import TimedHook
from stepctl.programs.base import Metrics
from stepctl.state.train_state import TrainState

SLOW_RATIO = 2.5  # times slower than one thread
_FIRST_PROBE = 1.0  # seconds after the start: a short run has no probe
_MIN_INTERVAL = 5.0  # seconds between two probes
_MAX_SHARE = 1 / 200  # of the time that probes may take
_N_RATIOS = 10  # probes that are remembered
_N_SLOW = 3  # slow probes among them that cause the warning


class SlowThreads(TimedHook):
    """Warns once if the BLAS threads of a run are slower than one thread would be.

    On busy cores, BLAS waits for threads that do not get one. `probe` returns how many times longer
    a matrix product takes with the run's threads than with one. It runs between steps and has no
    effect on the result.
    """

    name = "slow_threads"

    def __init__(
        self,
        probe: Callable[[], float],
        warn: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._warn = warn
        self._clock = clock
        self._next_probe = float("inf")
        self._ratios = deque[float](maxlen=_N_RATIOS)

    def start(self, state: TrainState) -> None:
        self._next_probe = self._clock() + _FIRST_PROBE

    def due_time(self) -> float:
        return self._next_probe

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        started = self._clock()
        if started < self._next_probe:
            return
        self._ratios.append(self._probe())
        ended = self._clock()
        self._next_probe = ended + max(_MIN_INTERVAL, (ended - started) / _MAX_SHARE)
        slow = sorted(ratio for ratio in self._ratios if ratio > SLOW_RATIO)
        if len(slow) >= _N_SLOW:
            self._warn(slow[len(slow) // 2])
            self._next_probe = float("inf")
