"""A check of the arguments of functions that users call."""

import contextlib
import operator

import numpy as np

from stepctl.errors import ConfigError
from stepctl.system.text import in_one_line

MAX_STEP = (1 << 62) - 1


def whole_number(name: str, value: object, minimum: int, maximum: int) -> int:
    """Return an argument as an int; ConfigError if it is another kind of value, or out of range."""
    number = None
    if not isinstance(value, bool | np.bool_):
        with contextlib.suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
    if number is None or not minimum <= number <= maximum:
        shown = in_one_line(repr(value), 60)
        limits = f"from {minimum} to {maximum}"
        if number is None or number < minimum:
            limits = f"of at least {minimum}"
        raise ConfigError(f"{name} is {shown}; give a whole number {limits}")
    return number
