"""HDF5 files that may be larger than memory: a batch reads its own rows and no others."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator
from typing import final

import h5py
import numpy as np
import numpy.typing as npt

from stepctl.arena import Array
from stepctl.data.base import Source, Sources, Targets, ranges
from stepctl.data.files import WholeFile, fetched, mapped, reading, refuse_excess
from stepctl.data.memory import as_labels, as_targets
from stepctl.errors import DataError, StepctlError
from stepctl.files import open_regular
from stepctl.problems import in_one_line
from stepctl.registry import File

_SAMPLED = 64  # rows in the fingerprint of a large set
_READ_WHOLE = 1 << 23  # bytes of x, up to which a fingerprint is that of all rows
_CHUNK_CACHE = 1 << 20  # bytes, HDF5's own: a larger chunk is not kept there
_LARGEST_CHUNK = 1 << 28  # bytes: a second to unpack, and memory to keep it
_READ_ERRORS = (OSError, RuntimeError, ValueError)  # what h5py makes of HDF5's errors


def hdf5(
    *,
    path: File,
    validation_path: File | None = None,
    x: str = "x",
    y: str = "y",
    scale: float = 1.0,
    targets: Targets,
    dtype: str,
) -> Sources:
    """The datasets `x`: (rows, ...), multiplied by `scale`, and `y`: (rows,) or (rows, columns) of an HDF5 file.

    Contiguous datasets are read through a memory map, chunked or compressed ones through HDF5.
    """

    def load(file: str) -> HDF5Rows:
        return HDF5Rows(file, x, y, scale=scale, targets=targets, dtype=dtype)

    return Sources(load(path), load(validation_path) if validation_path else None)


@final
class HDF5Rows(Source):
    """Rows of two datasets of one file, which is held open."""

    def __init__(self, path: str, x: str, y: str, *, scale: float, targets: Targets, dtype: str) -> None:
        self.origin, self._scale, self._targets, self._dtype = in_one_line(path), scale, targets, dtype
        with reading(path, "HDF5"):
            with open_regular(path) as raw:  # h5py's own message for a missing file is long; it waits for a pipe
                self._file = WholeFile(raw)
            names = (x, y)
            opened = h5py.File(path, "r")
            datasets = [_dataset(opened, name, self._file.size) for name in names]
            largest = max(_chunk_bytes(dataset) for dataset in datasets)
            if largest > _CHUNK_CACHE:
                opened.close()
                opened = h5py.File(path, "r", rdcc_nbytes=largest)  # else each row unpacks its chunk anew
                datasets = [_dataset(opened, name, self._file.size) for name in names]
            self._opened = opened  # the datasets are closed with it
            self._x, self._y = map(self._rows_of, datasets, names)
        x_shape, y_shape = self._x.shape, self._y.shape
        if len(x_shape) < 2 or len(y_shape) not in (1, 2) or 0 in (*x_shape[1:], *y_shape[1:]):
            raise DataError(
                f"{self.origin}: x has shape {x_shape} and y {y_shape}; "
                "(rows, features, ...) and (rows,) or (rows, columns) are needed"
            )
        if x_shape[0] != y_shape[0]:
            raise DataError(f"{self.origin}: x has {x_shape[0]} rows, but y has {y_shape[0]}; they must be equal")
        if x_shape[0] == 0:
            raise DataError(f"{self.origin}: holds no rows; a data set needs at least one")
        self.n, self.sample_shape = x_shape[0], x_shape[1:]
        if targets == "classes" and len(y_shape) == 2 and y_shape[1] != 1:
            raise DataError(f"{self.origin}: y has shape {y_shape}; a classification needs one label a row")
        self.target_shape = () if targets == "classes" else (math.prod(y_shape[1:]),)

    def _rows_of(self, dataset: h5py.Dataset, name: str) -> _MappedRows | _StoredRows:
        offset = dataset.id.get_offset()
        if dataset.chunks is not None or offset is None or dataset.dtype.kind == "b" or not dataset.shape:
            return _StoredRows(dataset, name, self._file)
        end = offset + math.prod(dataset.shape) * dataset.dtype.itemsize
        if end > self._file.size:
            raise ValueError(f"{name!r} would end at byte {end}, but the file has {self._file.size}")
        with open_regular(self._file.path) as raw:
            return _MappedRows(np.ndarray(dataset.shape, dataset.dtype, mapped(raw), offset), self._file)

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        self._x.take(rows, x)
        if self._scale != 1:
            np.multiply(x, self._scale, out=x)
        if self._y.shape[1:] == y.shape[1:]:
            self._y.take(rows, y)
        else:
            y[...] = as_targets(self.origin, 0, self._y.rows(rows), self._targets, self._dtype)

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        for first, end in self._ranges():
            with np.errstate(over="ignore"):  # check() finds and names what overflowed
                x = self._x.part(first, end).astype(self._dtype) * np.dtype(self._dtype).type(self._scale)
            yield first, x, as_targets(self.origin, first, self._y.part(first, end), self._targets, self._dtype)

    def n_classes(self) -> int:
        parts = (as_labels(self.origin, first, self._y.part(first, end)) for first, end in self._ranges())
        return max(int(labels.max()) for labels in parts) + 1

    def fingerprint(self) -> str:
        """Return a digest of the shapes and the rows, or a sample of the rows of a set too large to read whole.

        The file does not matter: compressed or not, it has the same fingerprint.
        """
        if self.n * self._row_bytes() > _READ_WHOLE:
            return self._sampled_fingerprint("")
        digest = hashlib.sha256(f"{self._x.shape} {self._x.dtype} {self._y.shape} {self._y.dtype}".encode())
        for dataset in (self._x, self._y):
            for first, end in self._ranges():
                digest.update(np.ascontiguousarray(dataset.part(first, end)).data)
        return digest.hexdigest()

    def former_fingerprint(self) -> str:
        return self._sampled_fingerprint(f"{self._file.size} ")

    def _sampled_fingerprint(self, start: str) -> str:
        digest = hashlib.sha256(f"{start}{self._x.shape} {self._x.dtype}".encode())
        digest.update(f"{self._y.shape} {self._y.dtype}".encode())
        rows = np.unique(np.linspace(0, self.n - 1, _SAMPLED, dtype=np.int64))
        digest.update(self._x.rows(rows).tobytes())
        digest.update(self._y.rows(rows).tobytes())
        return digest.hexdigest()

    def _ranges(self) -> Iterator[tuple[int, int]]:
        return ranges(self.n, self._row_bytes())

    def _row_bytes(self) -> int:
        n_bytes: int = math.prod(self.sample_shape) * self._x.dtype.itemsize
        return n_bytes


@final
class _MappedRows:
    """The rows of a contiguous dataset, in a memory map of the file."""

    def __init__(self, array: Array, file: WholeFile) -> None:
        self._array, self._file = array, file
        self.shape, self.dtype = array.shape, array.dtype

    def rows(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return some rows, in that order."""
        with self._file:
            return np.asarray(self._array[rows])

    def take(self, rows: npt.NDArray[np.int64], out: Array) -> None:
        """Write some rows into `out`, in that order."""
        # of an array that is not aligned, np.take makes a copy, whole, at every call
        if self.dtype != out.dtype or not self._array.flags.aligned:
            out[...] = self.rows(rows)
            return
        with self._file:
            np.take(self._array, rows, axis=0, out=out, mode="clip")

    def part(self, first: int, end: int) -> Array:
        """Return the rows from `first` up to `end`."""
        with self._file:
            return np.array(fetched(self._array[first:end]))


@final
class _StoredRows:
    """The rows of a dataset that HDF5 reads: chunked, compressed or compact."""

    def __init__(self, dataset: h5py.Dataset, name: str, file: WholeFile) -> None:
        self._dataset, self._name, self._file = dataset, name, file
        self.shape, self.dtype = tuple(dataset.shape), dataset.dtype

    def rows(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return some rows, in that order."""
        # row by row, in the file's order: a selection of many rows costs HDF5 a walk over all chunks between them
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        one_row, space = (1, *self.shape[1:]), self._dataset.id.get_space()
        memory = h5py.h5s.create_simple(one_row)
        with self._file:
            for i in np.argsort(rows).tolist():
                row = int(rows[i])
                space.select_hyperslab((row, *[0] * len(self.shape[1:])), one_row)
                try:
                    self._dataset.id.read(memory, space, found[i : i + 1])
                except _READ_ERRORS as error:
                    raise self._unreadable(row, error) from error
        return found

    def take(self, rows: npt.NDArray[np.int64], out: Array) -> None:
        """Write some rows into `out`, in that order."""
        out[...] = self.rows(rows)

    def part(self, first: int, end: int) -> Array:
        """Return the rows from `first` up to `end`."""
        try:
            with self._file:
                return np.asarray(self._dataset[first:end])
        except _READ_ERRORS:
            return self.rows(np.arange(first, end))  # which names the row

    def _unreadable(self, row: int, error: Exception) -> StepctlError:
        where = f"{in_one_line(self._file.path)}: dataset {self._name!r}, row {row}: cannot be read"
        missing = [name for code, name in _filters(self._dataset) if not h5py.h5z.filter_avail(code)]
        if missing:
            return DataError(
                f"{where}: it is compressed by {' and '.join(missing)}, which this HDF5 does not have: install the "
                "plugin and set HDF5_PLUGIN_PATH (most are in: pip install hdf5plugin), or rewrite the file elsewhere "
                "with: h5repack -f GZIP=4"
            )
        reason = in_one_line(str(error))
        if (number := re.search(r"errno = ([1-9][0-9]*)", str(error))) is not None:
            reason = os.strerror(int(number[1]))  # of the disk, or of the network: the data may be whole
            return StepctlError(f"{where}: {reason}; mend the disk, then run the command again")
        return DataError(f"{where}: {reason}; its chunk is damaged: restore the file from where it came")


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    """Return what a chunk takes in memory, 0 if parts of it can be read by themselves."""
    if dataset.chunks is None or not _filters(dataset):
        return 0
    n_bytes: int = math.prod(dataset.chunks) * dataset.dtype.itemsize
    return n_bytes


def _filters(dataset: h5py.Dataset) -> list[tuple[int, str]]:
    """Return the number and the name of each filter that a dataset's chunks went through."""
    plist = dataset.id.get_create_plist()
    found = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    return [(code, f"filter {code} ({name.decode(errors='replace')})") for code, _, _, name in found]


def _dataset(file: h5py.File, name: str, file_size: int) -> h5py.Dataset:
    """Open a dataset; refuse what would read another file, or is not the size that it seems to be."""
    group, found = file, None
    for part in filter(None, name.split("/")):
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) and part in set(group) else None
        if link is None:
            raise ValueError(f"no dataset {name!r} in it; it holds {', '.join(file) or 'nothing'}")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{name!r} is a link to elsewhere; copy the data into this file")
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
    """Raise ValueError if a shape has little to do with what is in the file, or a chunk is too large to be read."""
    stored = min(dataset.id.get_storage_size(), file_size)
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    if size and not stored:
        raise ValueError(f"{name!r} has shape {dataset.shape}, but none of it was ever written; write its rows")
    try:
        refuse_excess(size, stored, "write all rows, uncompressed: h5repack -f NONE")
    except ValueError as error:
        raise ValueError(f"{name!r} has shape {dataset.shape}: {error}") from error
    if (chunk := _chunk_bytes(dataset)) > _LARGEST_CHUNK:
        raise ValueError(
            f"{name!r} is compressed in chunks of {chunk:,} bytes, and each is unpacked whole; rewrite it in chunks "
            f"of at most {_LARGEST_CHUNK:,}: h5repack -l {name}:CHUNK=..."
        )
