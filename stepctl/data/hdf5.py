"""HDF5 files that may be larger than memory: a batch reads its own rows and no others."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from typing import Any, final

import h5py
import numpy as np
import numpy.typing as npt

from stepctl.arena import Array
from stepctl.data.base import Source, Sources, Targets, ranges
from stepctl.data.files import fetched, mapped, reading
from stepctl.data.memory import as_labels, as_targets
from stepctl.errors import DataError
from stepctl.files import open_regular
from stepctl.problems import in_one_line
from stepctl.registry import File

_SAMPLED = 64  # rows in the fingerprint of a large set
_READ_WHOLE = 1 << 23  # bytes of x, up to which a fingerprint is that of all rows


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
            open_regular(path).close()  # h5py's own message for a missing file is long; it waits for a pipe
            self._file = h5py.File(path, "r")
            self._x, self._y = _dataset(self._file, x), _dataset(self._file, y)
        if len(self._x.shape) < 2 or len(self._y.shape) not in (1, 2) or 0 in (*self._x.shape[1:], *self._y.shape[1:]):
            raise DataError(
                f"{self.origin}: x has shape {self._x.shape} and y {self._y.shape}; "
                "(rows, features, ...) and (rows,) or (rows, columns) are needed"
            )
        if len(self._x) != len(self._y):
            raise DataError(f"{self.origin}: x has {len(self._x)} rows, but y has {len(self._y)}; they must be equal")
        if len(self._x) == 0:
            raise DataError(f"{self.origin}: holds no rows; a data set needs at least one")
        self.n, self.sample_shape = len(self._x), tuple(self._x.shape[1:])
        if targets == "classes" and len(self._y.shape) == 2 and self._y.shape[1] != 1:
            raise DataError(f"{self.origin}: y has shape {self._y.shape}; a classification needs one label a row")
        self.target_shape = () if targets == "classes" else (math.prod(self._y.shape[1:]),)

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        _take(self._x, rows, x)
        if self._scale != 1:
            np.multiply(x, self._scale, out=x)
        if self._y.shape[1:] == y.shape[1:]:
            _take(self._y, rows, y)
        else:
            y[...] = as_targets(self.origin, 0, _rows(self._y, rows), self._targets, self._dtype)

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        for first, end in self._ranges():
            with np.errstate(over="ignore"):  # check() finds and names what overflowed
                x = fetched(self._x[first:end]).astype(self._dtype) * np.dtype(self._dtype).type(self._scale)
            yield first, x, as_targets(self.origin, first, fetched(self._y[first:end]), self._targets, self._dtype)

    def n_classes(self) -> int:
        parts = (as_labels(self.origin, first, fetched(self._y[first:end])) for first, end in self._ranges())
        return max(int(labels.max()) for labels in parts) + 1

    def fingerprint(self) -> str:
        """Return a digest of the shapes and the rows, or a sample of the rows of a set too large to read whole.

        The file does not matter: compressed or not, it has the same fingerprint.
        """
        if self.n * _row_bytes(self._x) > _READ_WHOLE:
            return self._sampled_fingerprint("")
        digest = hashlib.sha256(f"{self._x.shape} {self._x.dtype} {self._y.shape} {self._y.dtype}".encode())
        for dataset in (self._x, self._y):
            for first, end in self._ranges():
                digest.update(np.ascontiguousarray(dataset[first:end]).data)
        return digest.hexdigest()

    def former_fingerprint(self) -> str:
        return self._sampled_fingerprint(f"{os.path.getsize(self._file.filename)} ")

    def _sampled_fingerprint(self, start: str) -> str:
        digest = hashlib.sha256(f"{start}{self._x.shape} {self._x.dtype}".encode())
        digest.update(f"{self._y.shape} {self._y.dtype}".encode())
        rows = np.unique(np.linspace(0, self.n - 1, _SAMPLED, dtype=np.int64))
        digest.update(_rows(self._x, rows).tobytes())
        digest.update(_rows(self._y, rows).tobytes())
        return digest.hexdigest()

    def _ranges(self) -> Iterator[tuple[int, int]]:
        return ranges(self.n, math.prod(self.sample_shape) * self._x.dtype.itemsize)


def _row_bytes(dataset: Any) -> int:
    return int(math.prod(dataset.shape[1:]) * dataset.dtype.itemsize)


def _dataset(file: h5py.File, name: str) -> Any:
    """Open a dataset, or its memory map; refuse what would read another file."""
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
    offset = found.id.get_offset()
    if found.chunks is not None or offset is None or found.dtype.kind == "b" or not found.shape:
        return found
    with open(file.filename, "rb") as raw:
        return np.ndarray(found.shape, found.dtype, mapped(raw), offset)


def _rows(dataset: Any, rows: npt.NDArray[np.int64]) -> Array:
    if isinstance(dataset, np.ndarray):
        return np.asarray(dataset[rows])
    # row by row, in the file's order: a selection of many rows costs HDF5 a walk over all chunks between them
    found = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    one_row, space = (1, *dataset.shape[1:]), dataset.id.get_space()
    memory = h5py.h5s.create_simple(one_row)
    for i in np.argsort(rows).tolist():
        space.select_hyperslab((int(rows[i]), *[0] * len(dataset.shape[1:])), one_row)
        dataset.id.read(memory, space, found[i : i + 1])
    return found


def _take(dataset: Any, rows: npt.NDArray[np.int64], out: Array) -> None:
    # of an array that is not aligned, np.take makes a copy, whole, at every call
    if isinstance(dataset, np.ndarray) and dataset.dtype == out.dtype and dataset.flags.aligned:
        np.take(dataset, rows, axis=0, out=out, mode="clip")
    else:
        out[...] = _rows(dataset, rows)
