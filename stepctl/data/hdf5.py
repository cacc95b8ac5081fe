"""HDF5 files, which may be larger than memory. Only the rows of a batch are read."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator
from typing import Any, final

import h5py
import numpy as np
import numpy.typing as npt

from stepctl.config.registry import File
from stepctl.data.base import NO_TARGETS, Source, Sources, Targets, row_ranges
from stepctl.data.files import TruncationGuard, map_file, prefetched, reading, refuse_excess
from stepctl.data.integers import RoundedIntegers, may_round
from stepctl.data.memory import (
    as_labels,
    as_targets,
    check_label_shape,
    check_shapes,
    input_dtype,
    no_targets,
    target_dtype,
    target_shape,
)
from stepctl.data.names import AUTO, ArrayNames, NamePair
from stepctl.errors import DataError, StepctlError
from stepctl.state.arena import Array
from stepctl.system.files import open_regular
from stepctl.system.text import in_one_line

_SAMPLED_ROWS = 64  # in the fingerprint of a large data set
_LARGE = 1 << 23  # bytes of x; the fingerprint of a smaller data set covers all rows
_CHUNK_CACHE = 1 << 20  # bytes, HDF5's default: it does not cache a larger chunk
_MAX_CHUNK = 1 << 28  # bytes: takes a second to unpack, and memory for the cache
_READ_ERRORS = (OSError, RuntimeError, ValueError)  # raised by h5py for HDF5's errors


def hdf5(
    *,
    path: File,
    validation_path: File | None = None,
    x: str = "x",
    y: str | None = "y",
    validation_x: str | None = AUTO,
    validation_y: str | None = AUTO,
    scale: float = 1.0,
    targets: Targets,
    dtype: str,
    integer_inputs: bool = False,
    needs_targets: bool = True,
) -> Sources:
    """Two datasets of an HDF5 file, x: (rows, ...) and y: (rows, ...).

    Contiguous datasets are memory-mapped; chunked and compressed ones are read by HDF5.

    Args:
        path: The HDF5 file of the training samples.
        validation_path: The HDF5 file of the validation samples, if they have a file of their own.
        x: Path of the dataset of samples. A file without "x" is read from "x_train".
        y: Path of the dataset of targets. A file without "x" is read from "y_train". With null, or
            if a task needs no targets and the dataset is missing, no targets are read.
        validation_x: Path of the dataset of validation samples. By default it is x_test if x is
            x_train by default, and the path of x in validation_path; null is none.
        validation_y: Path of the dataset of validation targets; by default the one that belongs to
            validation_x.
        scale: Factor that the samples are multiplied by.
    """
    names = ArrayNames(x, y, validation_x, validation_y, needs_targets)

    def load(file: str, found: NamePair, origin: str) -> HDF5Source:
        return HDF5Source(
            file,
            found,
            origin=origin,
            scale=scale,
            targets=targets,
            dtype=dtype,
            integer_inputs=integer_inputs,
        )

    listed = _top_level_names(path)
    train = load(path, names.training(listed), path)
    if validation_path is not None:
        separate = names.validation_in_own_file(_top_level_names(validation_path))
        return Sources(train, load(validation_path, separate, validation_path))
    found = names.validation_in_same_file(listed)
    if found is None:
        return Sources(train)
    return Sources(train, load(path, found, f"{path} ({found.x})"))


def _top_level_names(path: str) -> set[str]:
    """Return the names at the top level of a file, without following links."""
    with reading(path, "HDF5"), open_regular(path), h5py.File(path, "r") as file:
        return set(file)


@final
class HDF5Source(Source):
    """The rows of two datasets in one file, which stays open."""

    x_dtype: np.dtype[Any]
    y_dtype: np.dtype[Any]

    def __init__(
        self,
        path: str,
        names: NamePair,
        *,
        origin: str,
        scale: float,
        targets: Targets,
        dtype: str,
        integer_inputs: bool,
    ) -> None:
        self.origin = in_one_line(origin)
        self._scale = scale
        self._targets = targets
        self._dtype = dtype
        with reading(path, "HDF5"):
            # not left to h5py, whose message for a missing file is long, and which blocks on a pipe
            with open_regular(path) as raw:
                self._guard = TruncationGuard(raw)
            paths = [name for name in names if name is not None]
            opened = h5py.File(path, "r")
            datasets = [_open_dataset(opened, name, self._guard.size) for name in paths]
            largest_chunk = max(_chunk_bytes(dataset) for dataset in datasets)
            if largest_chunk > _CHUNK_CACHE:  # otherwise every row would unpack its chunk again
                opened.close()
                opened = h5py.File(path, "r", rdcc_nbytes=largest_chunk)
                datasets = [_open_dataset(opened, name, self._guard.size) for name in paths]
            self._opened = opened  # keeps the datasets open
            readers = [*map(self._reader, datasets, paths)]
        self._x = readers[0]
        self._y = readers[1] if len(readers) == 2 else None
        check_shapes(self.origin, self._x.shape, None if self._y is None else self._y.shape)
        self.n = self._x.shape[0]
        self.sample_shape = self._x.shape[1:]
        self.x_dtype = input_dtype(self._x.dtype, dtype, integer_inputs=integer_inputs, scale=scale)
        if self._y is None:
            self.target_shape = NO_TARGETS
            self.y_dtype = np.dtype(dtype)
        else:
            if targets == "classes":
                check_label_shape(self.origin, self._y.shape)
            self.target_shape = target_shape(targets, self._y.shape[1:])
            self.y_dtype = target_dtype(targets, self._y.dtype, dtype)

    def _reader(self, dataset: h5py.Dataset, name: str) -> _MappedDataset | _StoredDataset:
        offset = dataset.id.get_offset()
        is_contiguous = dataset.chunks is None and offset is not None
        # HDF5 stores booleans as an enumeration, whose values need a conversion
        if not is_contiguous or dataset.dtype.kind == "b" or not dataset.shape:
            return _StoredDataset(dataset, name, self._guard)
        end = offset + math.prod(dataset.shape) * dataset.dtype.itemsize
        if end > self._guard.size:
            raise ValueError(
                f"{name!r} would end at byte {end}, but the file has {self._guard.size}"
            )
        with open_regular(self._guard.path) as raw:
            array = np.ndarray(dataset.shape, dataset.dtype, map_file(raw), offset)
        return _MappedDataset(array, self._guard)

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        self._x.take(rows, x)
        if self._scale != 1:
            np.multiply(x, self._scale, out=x)
        if self._y is None:
            return
        if self._y.shape[1:] == y.shape[1:]:
            self._y.take(rows, y)
        else:
            y[...] = as_targets(self.origin, 0, self._y.rows(rows), self._targets, self._dtype)

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        for first, end in self._row_ranges():
            with np.errstate(over="ignore"):  # Source.check reports an overflow with its row
                x = self._x.slice(first, end).astype(self.x_dtype)
                if self._scale != 1:
                    x *= x.dtype.type(self._scale)
            if self._y is None:
                y = no_targets(end - first)
            else:
                stored = self._y.slice(first, end)
                y = as_targets(self.origin, first, stored, self._targets, self._dtype)
            yield first, x, y

    def warnings(self) -> Iterator[str]:
        rounded = RoundedIntegers(self.x_dtype, self.y_dtype)
        read = [("x", self._x, self.x_dtype)] if self._scale == 1 else []
        if self._y is not None:
            read.append(("y", self._y, self.y_dtype))
        for name, dataset, dtype in read:
            if not may_round(dataset.dtype, dtype):
                continue
            for first, end in self._row_ranges():
                rounded.add(self.origin, self.place, name, first, dataset.slice(first, end))
        yield from rounded.warnings()

    def n_classes(self) -> int:
        assert self._y is not None
        largest = 0
        for first, end in self._row_ranges():
            labels = as_labels(self.origin, first, self._y.slice(first, end))
            largest = max(largest, int(labels.max()))
        return largest + 1

    def fingerprint(self) -> str:
        """Return a digest of the shapes and the rows; of a large data set, of a sample of its rows.

        It depends on the values only, not on how the file stores them.
        """
        if self.n * self._row_bytes() > _LARGE:
            return self._sampled_fingerprint("")
        heads = [f"{dataset.shape} {dataset.dtype}" for dataset in self._datasets()]
        digest = hashlib.sha256(" ".join(heads).encode())
        for dataset in self._datasets():
            for first, end in self._row_ranges():
                digest.update(np.ascontiguousarray(dataset.slice(first, end)).data)
        return digest.hexdigest()

    def former_fingerprint(self) -> str:
        return self._sampled_fingerprint(f"{self._guard.size} ")

    def _sampled_fingerprint(self, prefix: str) -> str:
        heads = [f"{dataset.shape} {dataset.dtype}" for dataset in self._datasets()]
        digest = hashlib.sha256(f"{prefix}{''.join(heads)}".encode())
        rows = np.unique(np.linspace(0, self.n - 1, _SAMPLED_ROWS, dtype=np.int64))
        for dataset in self._datasets():
            digest.update(dataset.rows(rows).tobytes())
        return digest.hexdigest()

    def _datasets(self) -> list[_MappedDataset | _StoredDataset]:
        return [self._x] if self._y is None else [self._x, self._y]

    def _row_ranges(self) -> Iterator[tuple[int, int]]:
        return row_ranges(self.n, self._row_bytes())

    def _row_bytes(self) -> int:
        n_bytes: int = math.prod(self.sample_shape) * self._x.dtype.itemsize
        return n_bytes


@final
class _MappedDataset:
    """A contiguous dataset, read through a memory map of the file."""

    def __init__(self, array: Array, guard: TruncationGuard) -> None:
        self._array = array
        self._guard = guard
        self.shape = array.shape
        self.dtype = array.dtype

    def rows(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return these rows, in this order."""
        with self._guard:
            return np.asarray(self._array[rows])

    def take(self, rows: npt.NDArray[np.int64], out: Array) -> None:
        """Write these rows, in this order, into `out`."""
        # np.take copies an unaligned array, the whole of it, at every call
        if self.dtype != out.dtype or not self._array.flags.aligned:
            out[...] = self.rows(rows)
            return
        with self._guard:
            np.take(self._array, rows, axis=0, out=out, mode="clip")

    def slice(self, first: int, end: int) -> Array:
        """Return the rows first..end-1."""
        with self._guard:
            return np.array(prefetched(self._array[first:end]))


@final
class _StoredDataset:
    """A dataset read through HDF5: chunked, compressed or compact."""

    def __init__(self, dataset: h5py.Dataset, name: str, guard: TruncationGuard) -> None:
        self._dataset = dataset
        self._name = name
        self._guard = guard
        self.shape = tuple(dataset.shape)
        self.dtype = dataset.dtype

    def rows(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return these rows, in this order."""
        # one by one, in the file's order: for many rows HDF5 walks over all chunks between them
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        one_row = (1, *self.shape[1:])
        space = self._dataset.id.get_space()
        memory = h5py.h5s.create_simple(one_row)
        with self._guard:
            for i in np.argsort(rows).tolist():
                row = int(rows[i])
                space.select_hyperslab((row, *[0] * len(self.shape[1:])), one_row)
                try:
                    self._dataset.id.read(memory, space, found[i : i + 1])
                except _READ_ERRORS as error:
                    raise self._unreadable(row, error) from error
        return found

    def take(self, rows: npt.NDArray[np.int64], out: Array) -> None:
        """Write these rows, in this order, into `out`."""
        out[...] = self.rows(rows)

    def slice(self, first: int, end: int) -> Array:
        """Return the rows first..end-1."""
        try:
            with self._guard:
                return np.asarray(self._dataset[first:end])
        except _READ_ERRORS:
            return self.rows(np.arange(first, end))  # one by one, for an error that names the row

    def _unreadable(self, row: int, error: Exception) -> StepctlError:
        where = (
            f"{in_one_line(self._guard.path)}: dataset {self._name!r}, row {row}: cannot be read"
        )
        missing = [
            name for code, name in _filters(self._dataset) if not h5py.h5z.filter_avail(code)
        ]
        if missing:
            return DataError(
                f"{where}: it is compressed by {' and '.join(missing)}, which this HDF5 does not have: install the "
                "plugin and set HDF5_PLUGIN_PATH (most are in: pip install hdf5plugin), or rewrite the file elsewhere "
                "with: h5repack -f GZIP=4"
            )
        number = re.search(r"errno = ([1-9][0-9]*)", str(error))
        if number is not None:  # a disk or network error: the data may be intact
            reason = os.strerror(int(number[1]))
            return StepctlError(f"{where}: {reason}; check the disk, then run the command again")
        reason = in_one_line(str(error))
        return DataError(
            f"{where}: {reason}; its chunk is damaged; restore the file from its source"
        )


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    """Return the size of a chunk in memory; 0 if its parts can be read separately."""
    if dataset.chunks is None or not _filters(dataset):
        return 0
    n_bytes: int = math.prod(dataset.chunks) * dataset.dtype.itemsize
    return n_bytes


def _filters(dataset: h5py.Dataset) -> list[tuple[int, str]]:
    """Return (number, name for messages) of each filter of a dataset's chunks."""
    plist = dataset.id.get_create_plist()
    found = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    return [
        (code, f"filter {code} ({name.decode(errors='replace')})") for code, _, _, name in found
    ]


def _open_dataset(file: h5py.File, name: str, file_size: int) -> h5py.Dataset:
    """Open a numeric dataset.

    Raises ValueError for one whose values are in another file or not of the size it claims.
    """
    group = file
    found = None
    for part in filter(None, name.split("/")):
        link = None
        if isinstance(group, h5py.Group) and part in set(group):
            link = group.get(part, getlink=True)
        if link is None:
            raise ValueError(f"it has no dataset {name!r}; found: {', '.join(file) or 'none'}")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{name!r} is a link, not a dataset; copy the data into this file")
        group = found = group[part]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{name!r} is not a dataset")
    if found.is_virtual or found.external:
        raise ValueError(f"{name!r} keeps its data in other files; copy them into this one")
    if found.shape is None:
        raise ValueError(f"{name!r} is empty")
    if found.dtype.kind not in "biuf" or found.dtype.itemsize > 8:
        raise ValueError(f"{name!r} has dtype {found.dtype}; numbers are needed")
    _check_stored(found, name, file_size)
    return found


def _check_stored(dataset: h5py.Dataset, name: str, file_size: int) -> None:
    """Raise ValueError for a shape far larger than the stored bytes, and for too large a chunk."""
    stored = min(dataset.id.get_storage_size(), file_size)
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    if size and not stored:
        raise ValueError(
            f"{name!r} has shape {dataset.shape}, but none of it was ever written; write its rows"
        )
    try:
        refuse_excess(size, stored, "write all rows, uncompressed: h5repack -f NONE")
    except ValueError as error:
        raise ValueError(f"{name!r} has shape {dataset.shape}: {error}") from error
    chunk = _chunk_bytes(dataset)
    if chunk > _MAX_CHUNK:
        raise ValueError(
            f"{name!r} is compressed in chunks of {chunk:,} bytes, and each is unpacked whole; rewrite it in chunks "
            f"of at most {_MAX_CHUNK:,}: h5repack -l {name}:CHUNK=..."
        )
