"""NumPy archives (.npz)."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np

from stepctl.config.registry import File
from stepctl.data.base import Sources, Targets
from stepctl.data.files import reading, refuse_excess
from stepctl.data.memory import InMemory, StoredArray
from stepctl.data.names import AUTO, ArrayNames, NamePair
from stepctl.state.arena import Array
from stepctl.system.files import open_regular

_BLOCK_BYTES = 1 << 22  # read at a time


def arrays(
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
    """Two arrays of an .npz file, x: (rows, ...) and y: (rows, ...).

    Args:
        path: The .npz file of the training samples.
        validation_path: The .npz file of the validation samples, if they have a file of their own.
        x: Name of the array of samples. A file without "x" is read from "x_train".
        y: Name of the array of targets. A file without "x" is read from "y_train". With null, or
            if a task needs no targets and the array is missing, no targets are read.
        validation_x: Name of the array of validation samples. By default it is x_test if x is
            x_train by default, and the name of x in validation_path; null is none.
        validation_y: Name of the array of validation targets; by default the one that belongs to
            validation_x.
        scale: Factor that the samples are multiplied by.
    """
    names = ArrayNames(x, y, validation_x, validation_y, needs_targets)

    def load(archive: Any, found: NamePair, origin: str) -> InMemory:
        samples = _read(archive, found.x)
        labels = None if found.y is None else _read(archive, found.y)
        return InMemory(
            samples,
            labels,
            origin=origin,
            targets=targets,
            dtype=dtype,
            scale=scale,
            integer_inputs=integer_inputs,
        )

    validation = None
    with _open_archive(path) as archive:
        train = load(archive, names.training(archive), path)
        if validation_path is None:
            found = names.validation_in_same_file(archive)
            if found is not None:
                validation = load(archive, found, f"{path} ({found.x})")
    if validation_path is not None:
        with _open_archive(validation_path) as archive:
            found = names.validation_in_own_file(archive)
            validation = load(archive, found, validation_path)
    return Sources(train, validation)


@contextmanager
def _open_archive(file: str) -> Iterator[Any]:
    with reading(file, "a NumPy archive (.npz)"), open_regular(file) as raw:
        if raw.read(2) != b"PK":
            raise ValueError("it is not a zip archive; save x and y together with np.savez")
        raw.seek(0)
        with np.load(raw, allow_pickle=False) as archive:
            yield archive


def _read(archive: Any, name: str) -> Array | StoredArray:
    """Return an array of an archive; ValueError if there is none, or it is damaged."""
    if name not in archive:
        names = ", ".join(archive.files) or "none"
        raise ValueError(f"it has no array {name!r}; found: {names}")
    # np.load accepts either name
    member = name if name in archive.zip.namelist() else f"{name}.npy"
    stored = _ArchivedArray(archive.zip, archive.zip.getinfo(member), name)
    if stored.has_rows:
        return stored
    array: Array = archive[name]
    return array


@final
class _ArchivedArray:
    """An array of an archive, compressed or not."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
        """Read the header; ValueError if it says more than there is, before memory is allocated."""
        self._archive = archive
        self._info = info
        self._name = name
        remedy = "save the arrays with np.savez, which does not compress"
        refuse_excess(info.file_size, info.compress_size, remedy)
        with archive.open(info) as file:
            if np.lib.format.read_magic(file) == (1, 0):
                header = np.lib.format.read_array_header_1_0(file)
            else:
                header = np.lib.format.read_array_header_2_0(file)
            self._header_bytes = file.tell()
        self.shape, self._is_fortran, self.dtype = header
        expected = self._header_bytes + math.prod(self.shape) * self.dtype.itemsize
        if not self.dtype.hasobject and info.file_size < expected:
            raise ValueError(
                f"array {name!r} of shape {self.shape} needs {expected} bytes, but has "
                f"{info.file_size}"
            )

    @property
    def has_rows(self) -> bool:
        """Whether rows of numbers lie one after another in the file."""
        is_array = len(self.shape) > 0 and 0 not in self.shape
        return is_array and self.dtype.kind in "biuf" and not self._is_fortran

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Yield (number of the first row, rows); ValueError if bytes are missing."""
        n_rows, *row_shape = self.shape
        row_bytes = math.prod(row_shape) * self.dtype.itemsize
        at_a_time = max(_BLOCK_BYTES // row_bytes, 1)
        with self._archive.open(self._info) as file:
            file.read(self._header_bytes)
            for first in range(0, n_rows, at_a_time):
                shape = (min(at_a_time, n_rows - first), *row_shape)
                data = file.read(shape[0] * row_bytes)
                if len(data) != shape[0] * row_bytes:
                    raise ValueError(f"array {self._name!r}: the file ends in row {first} or later")
                yield first, np.frombuffer(data, self.dtype).reshape(shape)
