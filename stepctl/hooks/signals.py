"""Stopping and saving by signal: a handler sets a flag, and the step in flight finishes."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from stepctl.hooks.base import StopReason
from stepctl.state import Counters

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """SIGTERM, SIGINT, SIGUSR1: stop after this step. SIGUSR2: save and go on. A second SIGINT: stop at once.

    A context manager: it installs the handlers, and puts the old ones back. Outside the main thread, where
    Python installs none, it does nothing.
    """

    def __init__(self) -> None:
        self._stop: signal.Signals | None = None
        self._save = self._interrupted = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (*_STOP, signal.SIGUSR2):
                self._old[number] = signal.signal(number, self._handle)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._old)  # one held since the start is seen now
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self._save = True
        elif number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        else:
            self._interrupted = self._interrupted or number == signal.SIGINT
            self._stop = signal.Signals(number)

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        return StopReason(f"signal {self._stop.name}", done=False) if self._stop else None

    def save_requested(self) -> bool:
        """Tell, once a request, whether a checkpoint was asked for."""
        requested, self._save = self._save, False
        return requested
