"""Statistics of the training rows that features are filled and standardized with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from stepctl.state.arena import Array

FILL = "fill"
MEAN = "mean"
DEVIATION = "deviation"
_MAX_NAMED = 3  # constant features in a warning


@final
class Statistics:
    """Arrays of the state, each (features,) float64; a checkpoint has them in /buffers/preprocessing.

    fill: the mean of the training rows that have a value; it replaces a missing value.
    mean, deviation: x <- (x - mean) / deviation; the mean and the standard deviation of the training
    rows, filled; 0 and 1 of features that are not standardized, or that are constant.
    """

    def __init__(
        self,
        feature_names: Sequence[str],
        *,
        is_number: Sequence[bool],
        fill: bool,
        standardize: bool,
    ) -> None:
        """`is_number`: which features are numbers, and not the encodings of words."""
        n_features = len(feature_names)
        self._names = [*feature_names]
        self._constant: list[str] = []
        self._is_number = np.array(is_number)
        self.arrays: dict[str, Array] = {}
        if fill:
            self.arrays[FILL] = np.zeros(n_features)
        if standardize:
            self.arrays[MEAN] = np.zeros(n_features)
            self.arrays[DEVIATION] = np.ones(n_features)

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Copy the arrays of a checkpoint; KeyError or ValueError if they do not fit."""
        for name, array in self.arrays.items():
            np.copyto(array, arrays[name])

    def fit(self, slices: Callable[[], Iterable[Array]]) -> None:
        """Compute the arrays from the training rows; ValueError if a feature has no usable values.

        `slices` returns an iterator over these rows: (rows, features) float64, NaN where a value is
        missing. It is called twice: deviations are computed from differences to the mean.
        """
        if not self.arrays:
            return
        n_features = len(self._names)
        n_present = np.zeros(n_features, np.int64)
        lowest = np.full(n_features, np.inf)
        highest = np.full(n_features, -np.inf)
        total = np.zeros(n_features)
        squares = np.zeros(n_features)
        n_rows = 0
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in slices():
                present = ~np.isnan(rows)
                n_rows += len(rows)
                n_present += present.sum(axis=0)
                total += np.where(present, rows, 0).sum(axis=0)
                lowest = np.fmin(lowest, np.fmin.reduce(rows, axis=0))
                highest = np.fmax(highest, np.fmax.reduce(rows, axis=0))
            self._refuse(n_present == 0, "has no value in the training rows; exclude the column")
            is_constant = lowest == highest
            mean = np.where(is_constant, lowest, total / n_present)
            for rows in slices():
                differences = rows - mean
                squares += np.where(np.isnan(rows), 0, differences**2).sum(axis=0)
            # a missing value is filled with the mean, from which it does not differ
            deviation = np.sqrt(squares / n_rows)
        is_finite = np.isfinite(mean) & np.isfinite(deviation)
        self._refuse(~is_finite, "has a value that is infinite or too large; fix or drop the row")
        if FILL in self.arrays:
            self.arrays[FILL][:] = mean
        if MEAN in self.arrays:
            self.arrays[MEAN][:] = np.where(self._is_number, mean, 0)
            self.arrays[DEVIATION][:] = np.where(self._is_number & ~is_constant, deviation, 1)
            constant = np.flatnonzero(self._is_number & is_constant)
            self._constant = [self._names[feature] for feature in constant]

    def _refuse(self, is_wrong: npt.NDArray[np.bool_], why: str) -> None:
        if is_wrong.any():
            raise ValueError(f"feature {self._names[int(is_wrong.argmax())]!r} {why}")

    def warnings(self) -> Iterator[str]:
        """Yield a warning if features are constant in the training rows."""
        if not self._constant:
            return
        named = ", ".join(self._constant[:_MAX_NAMED])
        n_more = len(self._constant) - _MAX_NAMED
        if n_more > 0:
            named += f" and {n_more} more"
        yield (
            f"{named}: the same value in all training rows, so standardize makes it 0; exclude what "
            "tells nothing"
        )

    def apply(self, features: Array, out: Array) -> None:
        """Write the features, filled and standardized, into `out`: (rows, features) in its dtype.

        They are computed in float64. `features` is overwritten.
        """
        if FILL in self.arrays:
            np.copyto(features, self.arrays[FILL], where=np.isnan(features))
        if MEAN in self.arrays:
            np.subtract(features, self.arrays[MEAN], out=features)
            np.divide(features, self.arrays[DEVIATION], out=features)
        with np.errstate(over="ignore"):  # Source.check reports an overflow with its row
            np.copyto(out, features, casting="unsafe")
