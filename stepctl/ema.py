"""The exponential moving average of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stepctl.arena import Arena, Array, aligned_empty, update_target

_BLOCK = 1 << 16  # elements that stay in the cache between the passes


@dataclass(frozen=True)
class MovingAverage:
    """a <- d a + (1 - d) p after each update (Polyak and Juditsky 1992, in its exponential form).

    d is `decay`, or with `warmup` min(decay, (1 + n) / (10 + n)) at the n-th update, so that the first values do not
    weigh for long (TensorFlow 1's `num_updates`).
    """

    decay: float
    warmup: bool = False

    def update(self, average: Arena, params: Arena, number: int) -> None:
        """Take in this process's part of the parameters after update `number` (1, 2, ...): arenas of one layout."""
        decay = min(self.decay, (1 + number) / (10 + number)) if self.warmup else self.decay
        old, new = average.flat, update_target(average)
        values, scratch = params.flat, _scratch(params.dtype)
        mine = average.part
        for start in range(mine.start, mine.stop, _BLOCK):
            at = slice(start, min(start + _BLOCK, mine.stop))
            added = scratch[: at.stop - start]
            np.multiply(values[at], 1 - decay, out=added)
            np.multiply(old[at], decay, out=new[at])
            np.add(new[at], added, out=new[at])
        average.turn()


@lru_cache(maxsize=4)
def _scratch(dtype: np.dtype[np.generic]) -> Array:
    return aligned_empty((_BLOCK,), dtype)
