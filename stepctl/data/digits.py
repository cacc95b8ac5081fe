"""Handwritten digits: 1,797 images of 8x8 pixels, 10 classes (see digits.README.md)."""

import gzip
import io
from importlib import resources

import numpy as np

from stepctl.data.base import Sources, Targets
from stepctl.data.memory import InMemory


def digits(*, scale: float = 1 / 16, targets: Targets, dtype: str) -> Sources:
    """The handwritten digits that come with the package: 8x8 pixels, 10 classes.

    x: (1797, 64), pixels 0..16 times `scale`; y: (1797,) labels or (1797, 1) values.

    Args:
        scale: Factor that the pixels, 0 to 16, are multiplied by.
    """
    packed = resources.files("stepctl.data").joinpath("digits.csv.gz").read_bytes()
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), np.uint8, delimiter=",")
    pixels = table[:, :-1]
    digit = table[:, -1].astype(np.int64)
    return Sources(
        InMemory(pixels, digit, origin="digits", targets=targets, dtype=dtype, scale=scale)
    )
