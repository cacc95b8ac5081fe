"""Stopping and saving by signal: a handler sets a flag, and the step in flight finishes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from stepctl.state.counters import Counters
from stepctl.stopping.base import StopReason, StopRule
from stepctl.system import interrupt, process_signals

_INTERRUPTS_TO_STOP_AT_ONCE = 2


@contextlib.contextmanager
def default_signal_actions(*, is_rank: bool = False) -> Iterator[None]:
    """Let stop signals end the process at once, while data are loaded.

    A Python handler runs only after a call into C returns, and HDF5, zlib or a text parser may take
    minutes. This applies to the command line and to the ranks of its job (`is_rank`); a program
    that uses the library keeps its handlers. Ignored signals stay ignored.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    is_command = is_rank or interrupt.is_installed() or signal.SIGTERM in mask
    if not is_command or not _in_main_thread():
        yield
        return
    handlers = {}
    for number in process_signals.STOP:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):
            handlers[number] = handler
    # the kernel ignores default actions for process 1 of a container
    action = _exit_as_if_killed if os.getpid() == 1 else signal.SIG_DFL
    for number in handlers:
        signal.signal(number, action)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)  # a pending signal ends the process here
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit_as_if_killed(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Signals(StopRule):
    """A stop rule: SIGTERM, SIGINT, SIGUSR1, SIGHUP and SIGXCPU stop, and SIGUSR2 requests a save.

    A second SIGINT raises KeyboardInterrupt at once. Ignored signals stay ignored.

    As a context manager it installs its handlers, and restores the previous ones at the end. If the
    signals were blocked before (by a command that handles them in training only), they are ignored
    afterwards, because they come too late. Outside the main thread it does nothing.
    """

    def __init__(self) -> None:
        self._stop: signal.Signals | None = None
        self._save = False
        self._n_interrupts = 0
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._were_blocked = False

    def __enter__(self) -> Signals:
        if _in_main_thread():
            numbers = process_signals.not_ignored()
            for number in numbers:
                self._previous_handlers[number] = process_signals.set_handler(number, self._handle)
            mask = process_signals.unblock(numbers)  # a pending signal is handled now
            self._were_blocked = any(number in mask for number in numbers)
            if interrupt.was_received():
                interrupt.clear()
                self._handle(signal.SIGINT, None)
        return self

    def __exit__(self, *_: object) -> None:
        self.ignore_interrupts()
        for number, handler in self._previous_handlers.items():
            if self._were_blocked:
                # ignored, not blocked again: a mask is only this thread's
                process_signals.set_handler(number, signal.SIG_IGN)
            else:
                process_signals.restore_handler(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._n_interrupts += 1
            if self._n_interrupts == _INTERRUPTS_TO_STOP_AT_ONCE:
                raise KeyboardInterrupt
        self.receive(number)

    def receive(self, number: int) -> None:
        """Handle a signal that this or another process of the job received."""
        if number == process_signals.SAVE:
            self._save = True
        else:
            self._stop = signal.Signals(number)

    def ignore_interrupts(self) -> None:
        """Raise no KeyboardInterrupt from now on: the work is done."""
        self._n_interrupts = _INTERRUPTS_TO_STOP_AT_ONCE

    @property
    def received(self) -> signal.Signals | None:
        """The signal that stops the run; None if none came."""
        return self._stop

    def reason(self, counters: Counters) -> StopReason | None:
        return StopReason(f"signal {self._stop.name}", done=False) if self._stop else None

    def is_pending(self) -> bool:
        """Tell whether a signal came that stops the run or requests a save."""
        return self._save or self._stop is not None

    def take_save_request(self) -> bool:
        """Return whether a save was requested since the last call."""
        requested = self._save
        self._save = False
        return requested


class DeferredInterrupt:
    """Ctrl-C in a call that makes steps: the step in flight finishes first.

        with DeferredInterrupt() as interrupt:
            while more_steps and not interrupt.received:
                make_step()

    KeyboardInterrupt is raised at the end, or at once by a second SIGINT. Only Python's own handler
    is replaced, and only in the main thread: a SIGINT that is ignored, or has a handler of the
    program, is left alone.
    """

    def __init__(self) -> None:
        self.received = False
        self._installed = False

    def __enter__(self) -> DeferredInterrupt:
        if _in_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            process_signals.set_handler(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._installed:
            process_signals.restore_handler(signal.SIGINT, signal.default_int_handler)
        if self.received and kind is None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
