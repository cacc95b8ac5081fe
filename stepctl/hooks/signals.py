"""Stopping and saving by signal: a handler sets a flag, and the step in flight finishes."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from stepctl import interrupt
from stepctl.hooks.base import StopReason
from stepctl.state import Counters

_ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_AT_ONCE = 2  # times Ctrl-C


class Signals:
    """SIGTERM, SIGINT, SIGUSR1: stop after this step. SIGUSR2: save and go on. A second SIGINT: stop at once.

    A context manager: it installs the handlers, and puts the old ones back. Where signals were held before it (a
    command that answers them in training only), they are passed over after it: one that comes then comes too late.
    Outside the main thread, where Python installs none, it does nothing.
    """

    def __init__(self) -> None:
        self._stop: signal.Signals | None = None
        self._save = False
        self._interrupts = 0
        self._old: dict[signal.Signals, Any] = {}
        self._held = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _ALL:
                self._old[number] = signal.signal(number, self._handle)
            held = signal.pthread_sigmask(signal.SIG_UNBLOCK, _ALL)  # one held since the start is seen now
            self._held = any(number in held for number in _ALL)
            if interrupt.received():  # after the last look at it
                interrupt.forget()
                self._handle(signal.SIGINT, None)
        return self

    def __exit__(self, *_: object) -> None:
        self.ignore()
        for number, handler in self._old.items():
            # ignored for the whole process, as a mask is only this thread's; one in between finds a handler
            signal.signal(number, signal.SIG_IGN if self._held else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self._save = True
            return
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts == _AT_ONCE:
            raise KeyboardInterrupt
        self._stop = signal.Signals(number)

    def hear(self, number: int) -> None:
        """Answer a signal that came to another process of the same job."""
        if number == signal.SIGUSR2:
            self._save = True
        else:
            self._stop = signal.Signals(number)

    def ignore(self) -> None:
        """Pass over what still comes: what counts is done."""
        self._interrupts = _AT_ONCE

    def reason(self, counters: Counters) -> StopReason | None:
        """Return why to stop now, or None."""
        return StopReason(f"signal {self._stop.name}", done=False) if self._stop else None

    def save_requested(self) -> bool:
        """Tell, once a request, whether a checkpoint was asked for."""
        requested, self._save = self._save, False
        return requested
