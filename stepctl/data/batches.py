"""The samples of a step, found by `samples_seen`: a seek, never a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import numpy as np
import numpy.typing as npt

from stepctl.config.model import Order
from stepctl.data.base import Source
from stepctl.data.permutation import Permutation, epoch_order
from stepctl.errors import ConfigError, DataError
from stepctl.state.arena import Array, aligned_empty, read_only

# Row numbers are computed for several batches at a time, so that the cost per step is negligible.
_LOOKAHEAD = 64  # batches
_LOOKAHEAD_ROWS = 1 << 16  # at most
_MAX_EPOCHS = 100  # in one batch


class Batch(NamedTuple):
    """Samples and targets; read-only for everything but their source.

    x: (rows, *sample_shape); y: (rows,) int64 labels, or (rows, *target_shape); (rows, 0) of data
    without targets.
    """

    x: Array
    y: Array


@final
@dataclass(frozen=True)
class Subset:
    """Samples 0..n-1 of a source: consecutive rows, or one side of a split."""

    source: Source
    n: int
    first: int = 0  # row of sample 0, or its position in the split
    split: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]] | None = None

    def rows(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Map sample numbers of this subset to rows of the source."""
        positions = samples + self.first
        return positions if self.split is None else self.split(positions)


def split_source(
    source: Source,
    validation_fraction: float,
    seed: int,
    order: Order = "shuffled",
    labels: Array | None = None,
) -> tuple[Subset, Subset]:
    """Return (training subset, validation subset).

    The split is random and depends on the seed alone; with the order "sequential" the validation
    subset are the last rows. With `labels`, (rows,) integers, it is stratified: this holds for the
    rows of each class. Raises DataError if a subset would be empty.
    """
    n_validation = round(source.n * validation_fraction)
    n_training = source.n - n_validation
    if not 0 < n_validation < source.n:
        raise DataError(
            f"{source.origin}: data.validation_fraction {validation_fraction} of {source.n} rows leaves "
            f"{n_training} to train on and {n_validation} to validate; each needs at least one"
        )
    if labels is not None:
        split_rows = _stratified(labels, n_validation, seed, order)
        training = Subset(source, n_training, first=n_validation, split=split_rows.take)
        return training, Subset(source, n_validation, split=split_rows.take)
    if order == "sequential":
        return Subset(source, n_training), Subset(source, n_validation, first=n_training)
    split = Permutation(source.n, seed, "split")
    training = Subset(source, n_training, first=n_validation, split=split)
    validation = Subset(source, n_validation, split=split)
    return training, validation


def _stratified(labels: Array, n_validation: int, seed: int, order: Order) -> npt.NDArray[np.int64]:
    """Return the rows of a stratified split: first those to validate, then those to train on.

    Both are in ascending order.
    """
    classes, class_numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quotas = _quotas(counts, n_validation)
    validates = np.zeros(len(labels), np.bool_)
    for number, label in enumerate(classes):
        rows = np.flatnonzero(class_numbers == number)
        if order == "shuffled":
            rows = rows[Permutation(len(rows), seed, "split", int(label))(np.arange(len(rows)))]
        validates[rows[len(rows) - quotas[number] :]] = True
    return np.concatenate([np.flatnonzero(validates), np.flatnonzero(~validates)])


def _quotas(counts: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Divide a total in proportion to counts, by the method of the largest remainders."""
    n = int(counts.sum())
    quotas = counts * total // n
    remainders = counts * total % n
    # of equal remainders the first one
    largest = np.argsort(-remainders, kind="stable")[: total - int(quotas.sum())]
    quotas[largest] += 1
    return quotas


class Batches(Protocol):
    """The batches of the steps."""

    samples: int  # of a step, on all ranks

    def batch(self, samples_seen: int) -> Batch:
        """Return this rank's part of the `samples` from the position `samples_seen` on."""


@final
class NoBatches:
    """The empty batches of a program, which reads its data itself."""

    samples = 0

    def __init__(self) -> None:
        self._batch = Batch(np.empty(0), np.empty(0))

    def batch(self, samples_seen: int) -> Batch:
        """Return an empty batch."""
        return self._batch


def _empty_batch(source: Source, rows: int, dtype: str) -> Batch:
    x_dtype: npt.DTypeLike = dtype if source.x_dtype is None else source.x_dtype
    y_dtype: npt.DTypeLike = dtype if source.target_shape else np.int64
    if source.y_dtype is not None:
        y_dtype = source.y_dtype
    return Batch(
        aligned_empty((rows, *source.sample_shape), x_dtype),
        aligned_empty((rows, *source.target_shape), y_dtype),
    )


@final
class TrainingBatches:
    """Batches of the training subset in epochs that follow one another without a gap.

    A batch may begin in one epoch and end in the next; every sample occurs once per epoch. With the
    order "shuffled" each epoch has an order of its own, with "sequential" that of the rows. A step
    uses `per_step` consecutive batches of `batch_size`. With several `ranks`, each reads only the
    rank-th of equal parts of every batch.
    """

    def __init__(
        self,
        subset: Subset,
        *,
        seed: int,
        batch_size: int,
        dtype: str,
        order: Order = "shuffled",
        per_step: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        samples = batch_size * per_step
        if samples > subset.n * _MAX_EPOCHS:
            raise ConfigError(
                f"data.batch_size: {samples} is over {_MAX_EPOCHS} times the {subset.n} rows; lower it"
            )
        self.subset = subset
        self.seed = seed
        self.order = order
        self.samples = samples  # of a step, on all ranks
        # offsets of this rank's samples within the samples of a step
        rows = batch_size // ranks
        batch_starts = np.arange(per_step) * batch_size
        rank_rows = np.arange(rank * rows, (rank + 1) * rows)
        self._offsets = np.add.outer(batch_starts, rank_rows).ravel()
        self._batch = _empty_batch(subset.source, len(self._offsets), dtype)
        self.x_dtype = self._batch.x.dtype
        self.y_dtype = self._batch.y.dtype
        self._read_only_batch = Batch(read_only(self._batch.x), read_only(self._batch.y))
        # a cache, not state: the rows of the steps from the position `_cache_start` on
        self._cache_start = 0
        self._cached_rows: npt.NDArray[np.int64] = np.empty((0, len(self._offsets)), np.int64)

    def batch(self, samples_seen: int) -> Batch:
        """Return this rank's part of the `samples` from the position `samples_seen` on.

        Its arrays are valid until the next call.
        """
        number, remainder = divmod(samples_seen - self._cache_start, self.samples)
        if remainder or not 0 <= number < len(self._cached_rows):
            self._fill_cache(samples_seen)
            number = 0
        self.subset.source.read(self._cached_rows[number], *self._batch)
        return self._read_only_batch

    def _fill_cache(self, samples_seen: int) -> None:
        steps = max(1, min(_LOOKAHEAD, _LOOKAHEAD_ROWS // len(self._offsets)))
        step_starts = samples_seen + np.arange(steps) * self.samples
        positions = np.add.outer(step_starts, self._offsets)
        if self.order == "sequential":
            samples = positions.ravel() % self.subset.n
        else:
            samples = epoch_order(self.subset.n, self.seed, positions.ravel())
        self._cached_rows = self.subset.rows(samples).reshape(positions.shape)
        self._cache_start = samples_seen


@final
class EvaluationBatches:
    """One pass over a subset in a fixed order; the last batch may be smaller."""

    def __init__(self, subset: Subset, *, batch_size: int, dtype: str) -> None:
        self.subset = subset
        self.batch_size = min(batch_size, subset.n)
        self._batch = _empty_batch(subset.source, self.batch_size, dtype)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.subset.n, self.batch_size):
            end = min(start + self.batch_size, self.subset.n)
            samples = np.arange(start, end, dtype=np.int64)
            batch = Batch(self._batch.x[: len(samples)], self._batch.y[: len(samples)])
            self.subset.source.read(self.subset.rows(samples), *batch)
            yield Batch(read_only(batch.x), read_only(batch.y))
