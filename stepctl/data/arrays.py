"""NumPy archives (.npz)."""

import math
import zipfile

import numpy as np

from stepctl.data.base import Sources, Targets
from stepctl.data.files import reading, refuse_excess
from stepctl.data.memory import InMemory
from stepctl.files import open_regular
from stepctl.registry import File


def arrays(
    *,
    path: File,
    validation_path: File | None = None,
    x: str = "x",
    y: str = "y",
    scale: float = 1.0,
    targets: Targets,
    dtype: str,
) -> Sources:
    """The arrays called `x`: (rows, ...) and `y`: (rows,) or (rows, columns) of an .npz file."""

    def load(file: str) -> InMemory:
        with reading(file, "a NumPy archive (.npz)"), open_regular(file) as raw:
            if raw.read(2) != b"PK":
                raise ValueError("it is not a zip archive; save x and y together with np.savez")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as archive:
                for name in (x, y):
                    if name not in archive:
                        raise ValueError(f"no array {name!r} in it; it holds {', '.join(archive.files) or 'none'}")
                    _check_size(archive.zip, name)
                features, target = archive[x], archive[y]
        return InMemory(features, target, origin=file, targets=targets, dtype=dtype, scale=scale)

    return Sources(load(path), load(validation_path) if validation_path else None)


def _check_size(archive: zipfile.ZipFile, name: str) -> None:
    """Raise ValueError unless an array is as large as its header promises, before memory is taken for it."""
    # np.load takes the one name or the other
    member = name if name in archive.namelist() else f"{name}.npy"
    info = archive.getinfo(member)
    refuse_excess(info.file_size, info.compress_size, "save the arrays with np.savez, which does not compress")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        expected = file.tell() + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and info.file_size < expected:
        raise ValueError(
            f"the header of {name!r} promises {expected} bytes for shape {shape}, but it has {info.file_size}"
        )
