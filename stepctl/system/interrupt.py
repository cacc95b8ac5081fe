"""Ctrl-C before training begins.

A KeyboardInterrupt may be lost: Python 3.11 wraps it in a RuntimeError in a class body, an
interrupted import may fail with any error, and exceptions of a signal handler are dropped in
callbacks from C. So the handler also sets a flag, and any error after it counts as the
interruption.
"""

# Not the module signal: it creates enums, and a Ctrl-C in their class bodies would be wrapped.
import _signal  # type: ignore[import-not-found]

_received = False


def install_handler() -> None:
    """Handle SIGINT: set the flag and raise KeyboardInterrupt.

    A SIGINT that is ignored, or that has another handler already, is left alone.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _handle)


def is_installed() -> bool:
    """Tell whether the handler of `install_handler` is in place."""
    return bool(_signal.getsignal(_signal.SIGINT) is _handle)


def was_received() -> bool:
    """Tell whether a SIGINT arrived since `install_handler`, or since `clear`."""
    return _received


def clear() -> None:
    """Reset the flag, once the interruption was handled."""
    global _received
    _received = False


def _handle(number: int, frame: object) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt
