"""The rows of a table in memory, which are filled and standardized when they are read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import numpy as np
import numpy.typing as npt

from stepctl.data.base import Source, Targets, row_ranges
from stepctl.data.memory import as_targets, fingerprint_head, no_targets
from stepctl.data.statistics import Statistics
from stepctl.errors import DataError
from stepctl.state.arena import Array, aligned_empty
from stepctl.system.text import in_one_line


@final
class TableSource(Source):
    """The rows of a table in memory: x (rows, features), and y (rows, ...) if there is a target."""

    x_dtype: np.dtype[Any]
    y_dtype: np.dtype[Any]

    def __init__(
        self,
        features: Array,
        y: Array | None,
        *,
        origin: str,
        targets: Targets,
        dtype: str,
        statistics: Statistics,
        place: Callable[[int], str],
        warnings: Sequence[str] = (),
        decided: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """features: (rows, features), in the run's dtype, or as float64 if `statistics` has arrays.

        `place` returns the name of a row in messages.
        """
        self.origin = in_one_line(origin)
        self._place = place
        self._features = features
        self._y = no_targets(len(features))
        if y is not None:
            self._y = as_targets(self.origin, 0, y, targets, dtype, place)
        self._statistics = statistics
        self._warnings = warnings
        self._decided = decided
        self.x_dtype = np.dtype(dtype)
        self.y_dtype = self._y.dtype
        self.n = len(features)
        self.sample_shape = features.shape[1:]
        self.target_shape = self._y.shape[1:]
        self._buffer = aligned_empty((0, *self.sample_shape), features.dtype)

    def warnings(self) -> Iterator[str]:
        yield from self._warnings
        for warning in self._statistics.warnings():
            yield f"{self.origin}: {warning}"

    def place(self, row: int) -> str:
        return self._place(row)

    def labels_in_memory(self) -> Array:
        return self._y

    def decided_config(self) -> Mapping[str, Any]:
        return self._decided

    def preprocessing_arrays(self) -> Mapping[str, Array]:
        return self._statistics.arrays

    def fit_preprocessing(self, rows: npt.NDArray[np.int64]) -> None:
        if not self._statistics.arrays:
            return

        def slices() -> Iterator[Array]:
            for first, end in self._row_ranges(len(rows)):
                yield self._features[rows[first:end]]

        try:
            self._statistics.fit(slices)
        except ValueError as error:
            raise DataError(f"{self.origin}: {error}") from error

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        # rows are in range by construction; "clip" lets take write straight into out
        np.take(self._y, rows, axis=0, out=y, mode="clip")
        if not self._statistics.arrays:
            np.take(self._features, rows, axis=0, out=x, mode="clip")
            return
        if len(rows) > len(self._buffer):
            self._buffer = aligned_empty((len(rows), *self.sample_shape), self._features.dtype)
        taken = self._buffer[: len(rows)]
        np.take(self._features, rows, axis=0, out=taken, mode="clip")
        self._statistics.apply(taken, out=x)

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        if not self._statistics.arrays:
            yield 0, self._features, self._y
            return
        for first, end in self._row_ranges(self.n):
            x = aligned_empty((end - first, *self.sample_shape), self.x_dtype)
            self._statistics.apply(self._features[first:end].copy(), out=x)
            yield first, x, self._y[first:end]

    def fingerprint(self) -> str:
        head = fingerprint_head(self._features.shape, self.x_dtype, self._y.shape, self.y_dtype)
        digest = hashlib.sha256(head)
        digest.update(self._features.data)
        digest.update(self._y.data)
        return digest.hexdigest()

    def _row_ranges(self, n: int) -> Iterator[tuple[int, int]]:
        return row_ranges(n, math.prod(self.sample_shape) * self._features.itemsize)
