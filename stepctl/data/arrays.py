"""NumPy archives (.npz)."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from stepctl.config.registry import File
from stepctl.data.base import Sources, Targets
from stepctl.data.files import reading, refuse_excess
from stepctl.data.memory import InMemory
from stepctl.data.names import AUTO, ArrayNames, NamePair
from stepctl.state.arena import Array
from stepctl.system.files import open_regular


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


def _read(archive: Any, name: str) -> Array:
    """Return an array of an archive; ValueError if there is none, or it is damaged."""
    if name not in archive:
        names = ", ".join(archive.files) or "none"
        raise ValueError(f"it has no array {name!r}; found: {names}")
    _check_size(archive.zip, name)
    array: Array = archive[name]
    return array


def _check_size(archive: zipfile.ZipFile, name: str) -> None:
    """Raise ValueError if an array is smaller than its header says, before memory is allocated."""
    # np.load accepts either name
    member = name if name in archive.namelist() else f"{name}.npy"
    info = archive.getinfo(member)
    refuse_excess(
        info.file_size, info.compress_size, "save the arrays with np.savez, which does not compress"
    )
    with archive.open(info) as file:
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        expected = file.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and info.file_size < expected:
        raise ValueError(
            f"array {name!r} of shape {shape} needs {expected} bytes, but has {info.file_size}"
        )
