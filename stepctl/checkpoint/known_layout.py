"""A file that has the layout of one that was checked before needs no second look by the HDF5 library.

    known = KnownLayout.of(reader)        # after all checks; None where it cannot be told for sure
    facts = known.check(content, name)    # None: only a whole check can tell

The objects of an HDF5 file follow from its metadata: the bytes outside of the arrays. Two checkpoints of
a run differ in their arrays, in the root attribute `global_step`, and in the checksum beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Extent:
    """The bytes of one array in a file, and its dtype."""

    start: int
    end: int
    dtype: np.dtype
