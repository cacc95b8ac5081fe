"""Signal handlers and masks of this process only: a forked child gets the defaults back.

A child that inherited a handler which only sets a flag could not be ended by SIGTERM, and
`multiprocessing.Pool.terminate` would wait for it forever.
"""

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None]

SAVE = signal.SIGUSR2  # save, and continue
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
ALL = (*STOP, SAVE)

# by signal, as `set_handler` set them; a run within a hook of another run sets its own on top
_handlers: defaultdict[int, list[Handler | signal.Handlers]] = defaultdict(list)
_ever_blocked: set[int] = set()


def not_ignored() -> list[signal.Signals]:
    """Return the signals of ALL that were not ignored when this process started.

    `nohup` ignores SIGHUP, and a shell script ignores SIGINT in its background jobs.
    """
    return [number for number in ALL if signal.getsignal(number) is not signal.SIG_IGN]


def set_handler(number: int, handler: Handler | signal.Handlers) -> Any:
    """Set a handler that forked children do not inherit, and return the previous one."""
    _handlers[number].append(handler)
    return signal.signal(number, handler)


def restore_handler(number: int, handler: Any) -> None:
    """Set the previous handler again, unless another was set since `set_handler`."""
    handlers = _handlers[number]
    if handlers and signal.getsignal(number) == handlers.pop():
        signal.signal(number, handler)


def block(numbers: Iterable[int]) -> set[int]:
    """Keep signals pending, in this process and not in forked children; return the old mask."""
    blocked = set(numbers)
    _ever_blocked.update(blocked)
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, blocked)}


def unblock(numbers: Iterable[int]) -> set[int]:
    """Deliver signals, pending ones at once; return the old mask."""
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_UNBLOCK, set(numbers))}


_forking = threading.local()  # its `mask`: the signals that a thread blocked before it forks


def _block_to_fork() -> None:
    """Keep signals to the child pending until it has the default handlers: none is lost."""
    handled = [number for number, handlers in _handlers.items() if handlers]
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, handled)


def _unblock_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _reset_in_child() -> None:
    for number, handlers in _handlers.items():
        if signal.getsignal(number) in handlers:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    _handlers.clear()
    # Also those that were unblocked: a thread started before that still has them in its mask.
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask - _ever_blocked)


os.register_at_fork(
    before=_block_to_fork,
    after_in_parent=_unblock_in_parent,
    after_in_child=_reset_in_child,
)
