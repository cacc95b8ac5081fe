"""NumPy archives (.npz)."""

import numpy as np

from stepctl.data.base import Sources, Targets
from stepctl.data.files import reading
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
                features, target = archive[x], archive[y]
        return InMemory(features, target, origin=file, targets=targets, dtype=dtype, scale=scale)

    return Sources(load(path), load(validation_path) if validation_path else None)
