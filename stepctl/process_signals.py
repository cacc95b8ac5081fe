"""Signal handlers and masks of this process alone: a forked child gets the defaults back.

A child that kept a handler that only sets a flag could not be ended by SIGTERM: `multiprocessing.Pool.terminate` would
wait for its workers forever.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None]

SAVE = signal.SIGUSR2  # save, and go on
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
ALL = (*STOP, SAVE)

_handlers: dict[int, Handler | signal.Handlers] = {}  # that were set here, by signal
_ever_blocked: set[int] = set()  # by `block`


def answered() -> list[signal.Signals]:
    """Return the signals to answer: what was ignored when this process was started stays ignored.

    `nohup` ignores SIGHUP so, and a shell SIGINT in a script's background jobs: Ctrl-C is not meant for these.
    """
    return [number for number in ALL if signal.getsignal(number) is not signal.SIG_IGN]


def handle(number: int, handler: Handler | signal.Handlers) -> Any:
    """Set a handler, which forked children do not inherit; return the one before."""
    _handlers[number] = handler
    return signal.signal(number, handler)


def restore(number: int, handler: Any) -> None:
    """Put the handler back that was there before `handle`, unless somebody has set another since."""
    if number in _handlers and signal.getsignal(number) == _handlers.pop(number):
        signal.signal(number, handler)


def block(numbers: Iterable[int]) -> set[int]:
    """Keep signals pending until they are unblocked, in this process and not in forked children; return the mask."""
    held = set(numbers)
    _ever_blocked.update(held)
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, held)}


def unblock(numbers: Iterable[int]) -> set[int]:
    """Let signals through, those that are pending at once; return the mask before."""
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_UNBLOCK, set(numbers))}


def _reset_in_child() -> None:
    for number, handler in _handlers.items():
        if signal.getsignal(number) == handler:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    _handlers.clear()
    # also those that are unblocked by now: a thread that was started before that still has them in its mask
    unblock(_ever_blocked)


os.register_at_fork(after_in_child=_reset_in_child)
