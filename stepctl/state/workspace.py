"""Temporary arrays that are allocated once and reused by every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from stepctl.state.arena import Array, Shape, aligned_empty


class _Pool:
    """The arrays of a workspace, and the index of the next one to hand out."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.next = 0


class Workspace:
    """The temporary arrays, random streams and buffers of one forward and backward pass.

    The n-th request of a pass gets the n-th array, so a pass that requests the same shapes in the
    same order as the previous one allocates nothing.

    `rng(stream)` returns the pass's random generator for a named stream. It is None in evaluation,
    when layers act in inference mode. `buffers` are the model's non-trainable arrays, read-only. In
    training, the pass writes all values of their updates into `new_buffers`; in evaluation that is
    None.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.rng: Callable[[str], np.random.Generator] | None = None
        self.buffers: Mapping[str, Array] = {}
        self.new_buffers: Mapping[str, Array] | None = None
        self._pool = _Pool()

    def start(
        self,
        rng: Callable[[str], np.random.Generator] | None = None,
        buffers: Mapping[str, Array] | None = None,
        new_buffers: Mapping[str, Array] | None = None,
    ) -> None:
        """Begin a pass: all arrays of the previous pass may be reused."""
        self.rng = rng
        self.buffers = {} if buffers is None else buffers
        self.new_buffers = new_buffers
        self._pool.next = 0

    def scoped(self, name: str) -> Workspace:
        """Return the same workspace with random streams named "<name>/<stream>".

        Each model of a pass gets a scope, so that layers of equal names do not share a stream.
        """
        outer = self.rng
        if outer is None:
            return self
        inner = copy.copy(self)
        inner.rng = lambda stream: outer(f"{name}/{stream}")
        return inner

    def empty(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
        """Return an uninitialised array for the caller's own use until the next `start`."""
        dtype = self.dtype if dtype is None else dtype
        pool = self._pool
        index = pool.next
        pool.next += 1
        if index == len(pool.arrays):
            pool.arrays.append(aligned_empty(shape, dtype))
        array = pool.arrays[index]
        if array.shape != shape or array.dtype != dtype:
            array = aligned_empty(shape, dtype)
            pool.arrays[index] = array
        return array
