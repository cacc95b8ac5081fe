"""What every optimizer shares: clipping, weight decay, and the walk over the flat arenas in blocks."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from stepctl.arena import Arena, Array, aligned_empty, update_target
from stepctl.errors import TornUpdate
from stepctl.problems import reason
from stepctl.registry import NonNegative, Positive, is_builtin
from stepctl.schedules import LearningRate

# Elements of a block. Long enough that a NumPy call outlasts the hand-over of the interpreter lock between threads,
# and that all blocks of one update still lie in the last-level cache together.
BLOCK = 1 << 18
THREADED = 1 << 20  # elements from which a second thread is worth its start


class Tick(NamedTuple):
    """When an update happens: the learning rate it uses, and its number among this optimizer's (1, 2, ...)."""

    learning_rate: float
    number: int


class Block(NamedTuple):
    """The same range of every arena, and scratch memory of its size.

    `params` and `slots` are read-only. What goes into `new_params` and `new_slots` is taken over once `update_block`
    returns; they begin as copies of the old values. (For stepctl's own optimizers they are the arenas themselves, with
    any values.)
    """

    params: Array
    slots: tuple[Array, ...]
    grads: Array
    new_params: Array
    new_slots: tuple[Array, ...]
    scratch: Array


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """How a gradient changes the parameters: a description that holds sizes and rates, no arrays.

    `clip_norm` scales a gradient down to this global norm (Pascanu et al. 2013); `weight_decay` adds that
    multiple of the parameters to the gradient, all parameters alike, after clipping.
    """

    learning_rate: LearningRate
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = None

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """The names of the arenas that this optimizer keeps beside the parameters."""

    @abstractmethod
    def coefficients(self, tick: Tick) -> tuple[float, ...]:
        """Return the numbers that `update_block` needs, the same for every block of an update."""

    @abstractmethod
    def update_block(self, block: Block, *coefficients: Array) -> None:
        """Write `new_params` and `new_slots`, elementwise. `grads` and `scratch` are free to be overwritten.

        The coefficients come as 0-d arrays of the parameters' dtype: a ufunc takes these faster than numbers.
        """

    def initial_slots(self, params: Arena) -> dict[str, Arena]:
        """Return the slots before the first update, each of the parameters' layout."""
        return {slot: params.like() for slot in self.slots}

    @final
    def update(self, params: Arena, slots: dict[str, Arena], grads: Arena, tick: Tick, *, threads: int = 1) -> None:
        """Apply one update to this process's part of arenas of one layout.

        In place, or out of place where they were handed over. The gradient is used up. The number of threads does not
        change the result. TornUpdate if it fails when some of the values have changed already.
        """
        arenas = (params, *(slots[name] for name in self.slots))
        in_place = any(not arena.handed_over for arena in arenas)
        old, new = [arena.flat for arena in arenas], [update_target(arena) for arena in arenas]
        walk = partial(self._walk, old, grads.flat, new, tick, self._clip_scale(grads))
        mine = params.part
        size = mine.stop - mine.start
        try:
            if threads == 1 or size < THREADED:
                walk(mine.start, mine.stop)
            else:
                each = -(-size // (threads * BLOCK)) * BLOCK
                starts = range(mine.start, mine.stop, each)
                list(_pool(threads).map(walk, starts, [min(start + each, mine.stop) for start in starts]))
        except Exception as error:
            if not in_place:
                raise  # what was handed over is as it was
            raise TornUpdate(f"optimizer: failed in the middle of an update ({reason(error)})") from error
        for arena in arenas:
            arena.turn()

    @final
    def trial(self, dtype: npt.DTypeLike) -> None:
        """Make an update of small arenas, so that an `update_block` that fails does so before training."""
        params, grads = Arena({"x": (5,)}, dtype), Arena({"x": (5,)}, dtype)
        params["x"] = np.linspace(-1, 1, 5)
        grads["x"] = np.linspace(0.1, -0.2, 5)
        slots = {slot: arena.to_read_only(copy=True) for slot, arena in self.initial_slots(params).items()}
        self.update(params.to_read_only(copy=True), slots, grads, Tick(0.1, 1))

    def _walk(
        self,
        old: Sequence[Array],
        grads: Array,
        new: Sequence[Array],
        tick: Tick,
        scale: float | None,
        start: int,
        end: int,
    ) -> None:
        params, *slots = old
        coefficients = [np.array(value, params.dtype) for value in self.coefficients(tick)]
        thread = threading.get_ident()
        scratch = _scratch(thread, params.dtype)
        # a user's code gets no view of the state that it could write later
        copied: list[Array] = []
        if not is_builtin(self):
            copied = [_scratch(thread, params.dtype, number) for number in range(1, 1 + len(new))]
        for first in range(start, end, BLOCK):
            at = slice(first, min(first + BLOCK, end))
            g = grads[at]
            written = [array[: len(g)] for array in copied] or [array[at] for array in new]
            if copied:
                for array, before in zip(written, old, strict=True):
                    array[:] = before[at]
            block = Block(
                params[at], tuple([slot[at] for slot in slots]), g, written[0], tuple(written[1:]), scratch[: len(g)]
            )
            if scale is not None:
                np.multiply(g, scale, out=g)
            if self.weight_decay:
                block = self.decay(block, tick)
            self.update_block(block, *coefficients)
            if copied:
                for array, after in zip(written, new, strict=True):
                    after[at] = array

    def decay(self, block: Block, tick: Tick) -> Block:
        """Add weight_decay * parameters to the gradient (L2 regularisation); return the block to update."""
        np.multiply(block.params, self.weight_decay, out=block.scratch)
        np.add(block.grads, block.scratch, out=block.grads)
        return block

    def _clip_scale(self, grads: Arena) -> float | None:
        if self.clip_norm is None:
            return None
        norm = global_norm(grads)
        return self.clip_norm / norm if norm > self.clip_norm else None


def global_norm(arena: Arena) -> float:
    """Return the Euclidean norm over all elements: the sum of the blocks' sums, in fixed order."""
    with np.errstate(over="ignore"):
        norm = _norm(arena, 1.0)
    if not math.isinf(norm):
        return norm
    largest = max(arena.owners.over_blocks(arena.flat, lambda block: float(np.abs(block).max())))
    return norm if math.isinf(largest) else largest * _norm(arena, 1 / largest)


def _norm(arena: Arena, scale: float) -> float:
    def squares(block: Array) -> float:
        scaled = block if scale == 1 else block * scale
        return float(np.dot(scaled, scaled))

    return math.sqrt(math.fsum(arena.owners.over_blocks(arena.flat, squares)))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    # an overflow is the guard's business, and NumPy warns in every thread anew
    return ThreadPoolExecutor(threads, "optimizer", initializer=lambda: np.seterr(all="ignore"))


@lru_cache(maxsize=64)
def _scratch(thread: int, dtype: np.dtype[np.generic], number: int = 0) -> Array:
    return aligned_empty((BLOCK,), dtype)
