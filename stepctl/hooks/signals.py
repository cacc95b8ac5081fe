"""Stopping and saving by signal: a handler sets a flag, and the step in flight finishes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from stepctl import interrupt, process_signals
from stepctl.hooks.base import StopReason
from stepctl.state import Counters

_AT_ONCE = 2  # times Ctrl-C


@contextlib.contextmanager
def ended_by_signals(*, is_rank: bool = False) -> Iterator[None]:
    """While data are loaded, let the signals that stop end the process at once, by their default action.

    A handler of Python's does not run before a call into C returns, and HDF5, zlib or a text parser may stay in one
    for minutes. The command line and the ranks that it leads (`is_rank`) do so; in a program that uses the library,
    signals are left alone, and so are those that are ignored.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    commanded = is_rank or interrupt.watching() or signal.SIGTERM in held
    if not commanded or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in process_signals.STOP}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    # for process 1 of a container the kernel has no default action
    action = _exit_as_if_killed if os.getpid() == 1 else signal.SIG_DFL
    for number in handlers:
        signal.signal(number, action)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)  # one that was held ends the process here
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit_as_if_killed(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


class Signals:
    """SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGXCPU: stop after this step. SIGUSR2: save and go on.

    A second SIGINT stops at once. A signal that is ignored stays ignored.

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
            answered = process_signals.answered()
            for number in answered:
                self._old[number] = process_signals.handle(number, self._handle)
            held = process_signals.unblock(answered)  # one held since the start is seen now
            self._held = any(number in held for number in answered)
            if interrupt.received():  # after the last look at it
                interrupt.forget()
                self._handle(signal.SIGINT, None)
        return self

    def __exit__(self, *_: object) -> None:
        self.ignore()
        for number, handler in self._old.items():
            # ignored for the whole process, as a mask is only this thread's; one in between finds a handler
            if self._held:
                process_signals.handle(number, signal.SIG_IGN)
            else:
                process_signals.restore(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == process_signals.SAVE:
            self._save = True
            return
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts == _AT_ONCE:
            raise KeyboardInterrupt
        self._stop = signal.Signals(number)

    def hear(self, number: int) -> None:
        """Answer a signal that came to another process of the same job."""
        if number == process_signals.SAVE:
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


class DeferredInterrupt:
    """Ctrl-C in a call that makes steps: the step in flight finishes, and KeyboardInterrupt is raised at the end.

        with DeferredInterrupt() as interrupt:
            while steps are left and not interrupt.received:
                make a step

    A second SIGINT raises it at once. A context manager: it installs its handler in the place of Python's own alone,
    in the main thread alone, and puts that back. A SIGINT that is ignored, or that the program has a handler of its own
    for, is left to that.
    """

    def __init__(self) -> None:
        self.received = False
        self._installed = False

    def __enter__(self) -> DeferredInterrupt:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            process_signals.handle(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._installed:
            process_signals.restore(signal.SIGINT, signal.default_int_handler)
        if self.received and kind is None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
