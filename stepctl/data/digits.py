"""The handwritten digits that come with stepctl: 1,797 images of 8x8 pixels, 10 classes (see digits.README.md)."""

import gzip
import io
from importlib import resources

import numpy as np

from stepctl.data.base import Sources, Targets
from stepctl.data.memory import InMemory


def digits(*, targets: Targets, dtype: str) -> Sources:
    """Pixels scaled to 0..1, shape (64,), and the digit: a label, or in a regression a number."""
    packed = resources.files("stepctl.data").joinpath("digits.csv.gz").read_bytes()
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), np.uint8, delimiter=",")
    pixels, digit = table[:, :-1], table[:, -1]
    return Sources(InMemory(pixels, digit, origin="digits", targets=targets, dtype=dtype, scale=1 / 16))
