"""Which samples a step gets: a seek by `samples_seen`, never a replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast, final

import numpy as np
import numpy.typing as npt

from stepctl.arena import Array, aligned_empty, read_only
from stepctl.data.base import Source
from stepctl.errors import ConfigError, DataError
from stepctl.rng import Permutation, epoch_order

_LOOKAHEAD = 64  # batches whose rows are looked up at a time, so that a step pays next to nothing for it,
_LOOKAHEAD_ROWS = 1 << 16  # but not more rows than this
_MOST_EPOCHS = 100  # in one batch


class Batch(NamedTuple):
    """x: (rows, *sample_shape); y: (rows,) int64 labels or (rows, columns) values. Read-only but for their source."""

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

    A batch may begin in one epoch and end in the next; each sample comes exactly once an epoch. A step takes
    `per_step` batches of `batch_size` one after another. Where `ranks` processes share them, each reads its own rows
    and no others: the rank-th of equal parts of every batch.
    """

    def __init__(
        self, part: Part, *, seed: int, batch_size: int, dtype: str, per_step: int = 1, rank: int = 0, ranks: int = 1
    ) -> None:
        samples = batch_size * per_step
        if samples > part.n * _MOST_EPOCHS:
            raise ConfigError(f"data.batch_size: {samples} is over {_MOST_EPOCHS} times the {part.n} rows; lower it")
        self.part, self.seed, self.samples = part, seed, samples
        rows = batch_size // ranks
        # of a step's samples, those of this rank
        self._mine = np.add.outer(np.arange(per_step) * batch_size, np.arange(rank * rows, (rank + 1) * rows)).ravel()
        self._batch = _buffers(part.source, len(self._mine), dtype)
        self._shown = Batch(read_only(self._batch.x), read_only(self._batch.y))
        # a cache, not state
        self._start, self._rows = 0, cast(npt.NDArray[np.int64], np.empty((0, len(self._mine)), np.int64))

    def batch(self, samples_seen: int) -> Batch:
        """Return the `samples` that begin at this position, or this rank's part of them.

        Its arrays are valid until the next call.
        """
        number, between = divmod(samples_seen - self._start, self.samples)
        if between or not 0 <= number < len(self._rows):
            steps = max(1, min(_LOOKAHEAD, _LOOKAHEAD_ROWS // len(self._mine)))
            positions = np.add.outer(samples_seen + np.arange(steps) * self.samples, self._mine)
            numbers = epoch_order(self.part.n, self.seed, positions.ravel())
            self._rows = self.part.rows(numbers).reshape(positions.shape)
            self._start, number = samples_seen, 0
        self.part.source.read(self._rows[number], *self._batch)
        return self._shown


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
            yield Batch(read_only(batch.x), read_only(batch.y))
