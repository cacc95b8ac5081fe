"""The exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stepctl.state.arena import Arena, Array, aligned_empty, update_target

_BLOCK = 1 << 16  # elements that stay in the cache between the passes over a block


@dataclass(frozen=True)
class MovingAverage:
    """a <- d a + (1 - d) p after each update (Polyak and Juditsky 1992, in its exponential form).

    d is `decay`. With `warmup`, it is min(decay, (1 + n) / (10 + n)) at the n-th update, which
    gives the initial values less weight (`num_updates` of TensorFlow 1's ExponentialMovingAverage).
    """

    decay: float
    warmup: bool = False

    def update(
        self,
        average: Arena,
        params: Arena,
        number: int,
        compiled: Callable[..., None] | None = None,
    ) -> None:
        """Update this process's slice of the average after update `number` (1, 2, ...).

        Both arenas have the same layout. `compiled` is that of `compilation.compile_average`.
        """
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + number) / (10 + number))
        old = average.flat
        new = update_target(average)
        values = params.flat
        scratch = _scratch(params.dtype)
        owned = average.owned_slice
        numbers = np.array([(decay, 1 - decay)], average.dtype)
        for start in range(owned.start, owned.stop, _BLOCK):
            at = slice(start, min(start + _BLOCK, owned.stop))
            if compiled is not None:
                if average.in_snapshot:
                    new[at] = old[at]
                compiled(np.array([(at.start, at.stop)]), numbers, values, new)
                continue
            weighted = scratch[: at.stop - start]
            np.multiply(values[at], 1 - decay, out=weighted)
            np.multiply(old[at], decay, out=new[at])
            np.add(new[at], weighted, out=new[at])
        average.swap_buffers()


@lru_cache(maxsize=4)
def _scratch(dtype: np.dtype[np.generic]) -> Array:
    return aligned_empty((_BLOCK,), dtype)
