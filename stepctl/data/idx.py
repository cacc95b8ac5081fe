"""IDX files, the format of MNIST, gzipped or not."""

import math

import numpy as np

from stepctl.arena import Array
from stepctl.data.base import Sources, Targets
from stepctl.data.files import read_bytes, reading
from stepctl.data.memory import InMemory
from stepctl.errors import DataError
from stepctl.registry import File

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def idx(
    *,
    images: File,
    labels: File,
    validation_images: File | None = None,
    validation_labels: File | None = None,
    scale: float = 1 / 255,
    targets: Targets,
    dtype: str,
) -> Sources:
    """Images: (rows, height, width), multiplied by `scale`, and labels: (rows,), each from a file of its own."""
    if (validation_images is None) != (validation_labels is None):
        raise DataError("data: give validation_images and validation_labels together, or neither")

    def load(x_file: str, y_file: str) -> InMemory:
        x, y = _read(x_file), _read(y_file)
        return InMemory(x, y, origin=f"{x_file} and {y_file}", targets=targets, dtype=dtype, scale=scale)

    validation = load(validation_images, validation_labels) if validation_images and validation_labels else None
    return Sources(load(images, labels), validation)


def _read(path: str) -> Array:
    with reading(path, "IDX"):
        data = read_bytes(path)
        if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
            raise ValueError(f"it begins with {data[:4].hex() or 'nothing'}, not with an IDX magic number")
        dtype, n_dims = np.dtype(_DTYPES[data[2]]), data[3]
        start = 4 + 4 * n_dims
        if len(data) < start:
            raise ValueError(f"it ends after {len(data)} bytes, inside its header")
        shape = tuple(int(size) for size in np.frombuffer(data, ">u4", n_dims, offset=4))
        expected = start + math.prod(shape) * dtype.itemsize
        if len(data) != expected:
            raise ValueError(f"its header promises {expected} bytes for shape {shape}, but it has {len(data)}")
        return np.frombuffer(data, dtype, offset=start).reshape(shape)
