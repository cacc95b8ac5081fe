"""Which samples a step gets: a seek by `samples_seen`, never a replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from stepctl.arena import Array, aligned_empty
from stepctl.data.base import Source
from stepctl.errors import ConfigError, DataError
from stepctl.rng import Permutation, epoch_order

_LOOKAHEAD = 32  # batches whose rows are looked up at a time, so that a step pays next to nothing for it,
_LOOKAHEAD_ROWS = 1 << 16  # but not more rows than this
_MOST_EPOCHS = 100  # in one batch


class Batch(NamedTuple):
    """x: (rows, *sample_shape); y: (rows,) int64 labels or (rows, columns) values."""

    x: Array
    y: Array


@final
@dataclass(frozen=True)
class Part:
    """Some of a source's rows, numbered 0..n-1: all of them, or a share of a keyed split."""

    source: Source
    n: int
    first: int = 0
    split: Permutation | None = None

    def rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Map sample numbers of this part to rows of the source."""
        return self.split(numbers + self.first) if self.split is not None else numbers


def split_parts(source: Source, validation_fraction: float, seed: int) -> tuple[Part, Part]:
    """Return (training part, validation part): a split keyed by the seed, evaluated row by row when asked."""
    n_validation = round(source.n * validation_fraction)
    if not 0 < n_validation < source.n:
        raise DataError(
            f"{source.origin}: data.validation_fraction {validation_fraction} of {source.n} rows leaves "
            f"{source.n - n_validation} to train on and {n_validation} to validate; each needs at least one"
        )
    split = Permutation(source.n, seed, "split")
    return (
        Part(source, source.n - n_validation, first=n_validation, split=split),
        Part(source, n_validation, split=split),
    )


def _buffers(source: Source, rows: int, dtype: str) -> Batch:
    y_dtype = dtype if source.target_shape else np.int64
    return Batch(
        aligned_empty((rows, *source.sample_shape), dtype), aligned_empty((rows, *source.target_shape), y_dtype)
    )


@final
class TrainingBatches:
    """The training part in shuffled epochs that follow one another without a gap.

    A batch may begin in one epoch and end in the next; each sample comes exactly once an epoch.
    """

    def __init__(self, part: Part, *, seed: int, batch_size: int, dtype: str) -> None:
        if batch_size > part.n * _MOST_EPOCHS:
            raise ConfigError(f"data.batch_size: {batch_size} is over {_MOST_EPOCHS} times the {part.n} rows; lower it")
        self.part, self.seed, self.batch_size = part, seed, batch_size
        self._batch = _buffers(part.source, batch_size, dtype)
        self._start, self._rows = 0, np.empty(0, np.int64)  # a cache, not state

    def batch(self, samples_seen: int) -> Batch:
        """Return the batch that begins at this position; its arrays are valid until the next call."""
        offset = samples_seen - self._start
        if offset < 0 or offset + self.batch_size > len(self._rows):
            count = max(self.batch_size, min(self.batch_size * _LOOKAHEAD, _LOOKAHEAD_ROWS))
            self._rows = self.part.rows(epoch_order(self.part.n, self.seed, samples_seen, count))
            self._start, offset = samples_seen, 0
        self.part.source.read(self._rows[offset : offset + self.batch_size], self._batch.x, self._batch.y)
        return self._batch


@final
class EvaluationBatches:
    """A part once through, in fixed order; the last batch may be smaller."""

    def __init__(self, part: Part, *, batch_size: int, dtype: str) -> None:
        self.part, self.batch_size = part, min(batch_size, part.n)
        self._batch = _buffers(part.source, self.batch_size, dtype)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.part.n, self.batch_size):
            numbers = np.arange(start, min(start + self.batch_size, self.part.n), dtype=np.int64)
            batch = Batch(self._batch.x[: len(numbers)], self._batch.y[: len(numbers)])
            self.part.source.read(self.part.rows(numbers), *batch)
            yield batch
