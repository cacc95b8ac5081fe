"""Ctrl-C before training begins.

A KeyboardInterrupt does not always arrive as one: in a class body Python 3.11 wraps it in a RuntimeError, an import
that is broken off may fail with any error, and where Python calls back from C it drops what a signal handler raises.
So the handler also remembers the signal, and whatever is raised after it counts as the interruption.
"""

from __future__ import annotations

# not the module signal: the enums that it makes are class bodies, which a Ctrl-C must not meet yet
import _signal  # type: ignore[import-not-found]

_received = False


def watch() -> None:
    """Remember a SIGINT from now on, and raise KeyboardInterrupt at it as Python does by default.

    A SIGINT that is ignored, or that somebody else handles already, is left to that.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _interrupt)


def watching() -> bool:
    """Tell whether `watch` handles SIGINT now."""
    return bool(_signal.getsignal(_signal.SIGINT) is _interrupt)


def received() -> bool:
    """Tell whether a SIGINT came since `watch`, or since `forget`."""
    return _received


def forget() -> None:
    """Forget a SIGINT: it was answered."""
    global _received
    _received = False


def _interrupt(number: int, frame: object) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt
