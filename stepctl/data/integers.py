"""Integers in the data: in which dtype they stay, and which ones a float dtype rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stepctl.state.arena import Array


def is_integer(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is a signed or unsigned integer, not a boolean."""
    return dtype.kind in "iu"


def kept_dtype(stored: np.dtype[Any], dtype: str) -> np.dtype[Any]:
    """Return the dtype of an array that keeps its integers: its own, or else the run's."""
    return stored.newbyteorder("=") if is_integer(stored) else np.dtype(dtype)


def may_round(stored: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    """Return whether there are integers of the stored dtype that a batch's dtype rounds."""
    if not is_integer(stored) or dtype.kind != "f":
        return False
    return int(np.iinfo(stored).max) > _largest_exact(dtype)


def _largest_exact(dtype: np.dtype[Any]) -> int:
    """Return the number up to which a float dtype holds every integer."""
    return int(2 ** (np.finfo(dtype).nmant + 1))


def first_rounded(values: Array, dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Return (row, value) of the first integer that the float dtype rounds; None if it keeps all.

    values: (rows, ...).
    """
    if not may_round(values.dtype, dtype) or not values.size:
        return None
    exact = _largest_exact(dtype)
    if -exact <= int(values.min()) and int(values.max()) <= exact:
        return None
    places = np.argwhere((values > exact) | (values < -exact))
    large = values[tuple(places.T)]
    floats = large.astype(dtype)
    # 2^63 - 1 becomes the float 2^63, which cannot be converted back
    fits = floats < 2.0 ** int(np.iinfo(values.dtype).max).bit_length()
    rounded = ~fits
    rounded[fits] = floats[fits].astype(values.dtype) != large[fits]
    if not rounded.any():
        return None
    index = int(rounded.argmax())
    return int(places[index, 0]), int(large[index])


def rounding_warning(origin: str, place: str, name: str, value: int, dtype: np.dtype[Any]) -> str:
    """Return the warning that an integer of x or y is rounded to the run's dtype."""
    remedies = []
    if dtype.itemsize < 8 and abs(value) <= 1 << 53:
        remedies.append("set dtype: float64")
    if name == "x":
        remedies.append("use a model with integer_inputs = True, which takes them as they are")
    else:
        remedies.append("use a task with targets = 'any', which takes them as they are")
    return (
        f"{origin}: {place}: {name} is the integer {value}, which {dtype} rounds to "
        f"{int(dtype.type(value))}, so different ones may become equal; {', or '.join(remedies)}"
    )


class RoundedIntegers:
    """The first integer of x, and of y, that the dtypes of a batch round."""

    def __init__(self, x_dtype: np.dtype[Any], y_dtype: np.dtype[Any]) -> None:
        self._dtypes = {"x": x_dtype, "y": y_dtype}
        self._warnings: dict[str, str] = {}

    def add(
        self, origin: str, place: Callable[[int], str], name: str, first: int, values: Array
    ) -> None:
        """Look at rows of x or y, from the row `first` on."""
        if name in self._warnings:
            return
        dtype = self._dtypes[name]
        found = first_rounded(values, dtype)
        if found is not None:
            row, value = found
            self._warnings[name] = rounding_warning(origin, place(first + row), name, value, dtype)

    def warnings(self) -> list[str]:
        """Return at most one warning for x and one for y."""
        return [*self._warnings.values()]
