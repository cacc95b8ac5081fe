"""Arenas: contiguous memory for named arrays."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # an array name's part between slashes
# Elements of a block that is never divided between processes. OpenBLAS computes a dot product of
# this size on one thread.
PARTITION_BLOCK = 1 << 13
_PAGE = 1 << 12  # bytes
_STAGGER = 17 * ALIGNMENT  # bytes; four arrays in turn are more than 1,000 apart
_allocations = itertools.count()
_MAX_FOLDERS = 16
_FINITE_CHECK_ELEMENTS = 1 << 18
_SENTINEL = {4: 0x7FC5CA1E, 8: 0x7FF85CA1E5CA1E00}  # NaNs that no computation produces


def aligned_empty(shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Return an uninitialised C-ordered array whose first element is 64-byte aligned."""
    return _aligned(np.empty, shape, np.dtype(dtype))


def aligned_zeros(shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Return a C-ordered array of zeros whose first element is 64-byte aligned.

    The operating system allocates its pages when they are first touched.
    """
    return _aligned(np.zeros, shape, np.dtype(dtype))


def _aligned(allocate: Callable[..., Array], shape: Shape, dtype: np.dtype[Any]) -> Array:
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = allocate(n_bytes + _PAGE, np.uint8)
    # Successive arrays begin at different offsets in a page: a load waits for an earlier store whose
    # address has the same low 12 bits.
    offset = next(_allocations) * _STAGGER
    start = (offset - raw.ctypes.data) % _PAGE
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def read_only(array: Array) -> Array:
    """Return a read-only view of an array; neither it nor a view of it can be made writable."""
    # NumPy does not set WRITEABLE on a view whose base is a read-only memoryview
    return np.asarray(array.data.toreadonly())


def spans(shapes: Mapping[str, Shape], dtype: npt.DTypeLike) -> dict[str, slice]:
    """Return the slice of each array in an arena's buffer, with the gap after it."""
    step = ALIGNMENT // np.dtype(dtype).itemsize
    found = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + -(-math.prod(shape) // step) * step
        found[name] = slice(start, stop)
        start = stop
    return found


class Partition:
    """The division of an arena between the processes that update it: here, one process.

    Each process updates one slice of whole blocks of PARTITION_BLOCK elements (the arena's last
    block may be shorter). `minimum`, `map_blocks` and `synchronized_update` are collective: all
    processes must call them in the same order.
    """

    def owned_slice(self, n: int) -> slice:
        """Return the slice of n elements that this process updates."""
        return slice(0, n)

    def minimum(self, number: int) -> int:
        """Return the minimum of all processes' numbers."""
        return number

    def map_blocks(self, function: Callable[[Array], float], flat: Array) -> list[float]:
        """Return the function's value for each block of an arena, in order.

        Each process computes its own blocks.
        """
        starts = range(0, len(flat), PARTITION_BLOCK)
        return [function(flat[start : start + PARTITION_BLOCK]) for start in starts]

    def synchronized_update(self) -> contextlib.AbstractContextManager[None]:
        """Wait for all processes before and after the block, in which each updates its slice.

        TornUpdate if the block fails and other processes may have changed their slices.
        """
        return contextlib.nullcontext()


UNDIVIDED = Partition()


class _Buffer(NamedTuple):
    """The memory of an arena: writable, read-only, and as named read-only views."""

    writable: Array
    visible: Array
    views: dict[str, Array]


class Arena(Mapping[str, Array]):
    """One contiguous, 64-byte aligned, 1-D buffer that holds many named arrays as views.

    `flat` is the whole buffer, with zeros in the gaps that alignment leaves;
    `arena["dense0/weight"]` is a view into it. Names are paths; no name may be a folder of another.

    A training state consists of `read_only` arenas. Their views cannot be made writable, so only an
    update changes them: it writes every element of its slice of `update_target(arena)`, and then
    calls `swap_buffers`. The target is the arena's own buffer (an update in place), or a spare
    buffer if a snapshot holds the arena's own.

    If several processes share the memory, `partition` tells which slice each of them updates.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        dtype: npt.DTypeLike,
        flat: Array | None = None,
        *,
        read_only: bool = False,
        partition: Partition = UNDIVIDED,
    ) -> None:
        """`flat` is an existing buffer: 64-byte aligned, of the layout's length."""
        check_names(shapes)
        self.shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in shapes.items()}
        self.dtype = np.dtype(dtype)
        self.read_only = read_only
        self.partition = partition
        self._buffer = self._new_buffer(flat)
        self._spare: _Buffer | None = None
        self.in_snapshot = False  # whether a snapshot holds the buffer
        self.modified = False  # whether an update began to change values since this was last reset

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        return f"Arena({self.dtype}: {shapes})"

    def _new_buffer(self, flat: Array | None = None) -> _Buffer:
        ends = [span.stop for span in spans(self.shapes, self.dtype).values()]
        n_elements = max(ends, default=0)
        if flat is None:
            flat = aligned_zeros((n_elements,), self.dtype)
        elif flat.shape != (n_elements,) or (n_elements and flat.ctypes.data % ALIGNMENT):
            raise ValueError(f"a buffer of {n_elements} aligned elements is needed")
        visible = read_only(flat) if self.read_only else flat
        return _Buffer(flat, visible, self._views(visible))

    def _views(self, flat: Array) -> dict[str, Array]:
        views = {}
        for name, span in spans(self.shapes, self.dtype).items():
            shape = self.shapes[name]
            views[name] = flat[span][: math.prod(shape)].reshape(shape)
        return views

    @property
    def flat(self) -> Array:
        """The whole buffer."""
        return self._buffer.visible

    @property
    def owned_slice(self) -> slice:
        """The slice of the buffer that this process updates."""
        return self.partition.owned_slice(len(self._buffer.writable))

    def _update_buffer(self) -> _Buffer:
        """Return the buffer that the next update writes."""
        if not self.in_snapshot:
            self.modified = True
            return self._buffer
        if self._spare is None:
            self._spare = self._new_buffer()
        return self._spare

    def swap_buffers(self) -> None:
        """Complete an update: swap in the spare buffer if the update wrote into it."""
        if self.in_snapshot and self._spare is not None:
            self.modified = True
            updated = self._spare
            self._spare = self._buffer
            self._buffer = updated
            self.in_snapshot = False

    def move_to(self, flat: Array, spare: Array, partition: Partition) -> None:
        """Use other buffers from now on, and the values in `flat`."""
        self._buffer = self._new_buffer(flat)
        self._spare = self._new_buffer(spare)
        self.partition = partition

    def snapshot(self) -> Arena:
        """Return a snapshot: a read-only arena of the current values.

        Of a read-only arena nothing is copied: the snapshot holds its buffer, and the next update
        writes into the spare one. The update after the next snapshot reuses the buffer, so the
        snapshot must be discarded by then. Any other arena is copied, because views of it may be
        written at any time.
        """
        if not self.read_only:
            return self.to_read_only(copy=True)
        frozen = copy.copy(self)  # with the same buffer
        frozen.partition = UNDIVIDED
        frozen._spare = None
        frozen.in_snapshot = False
        frozen.modified = False
        self.in_snapshot = True
        return frozen

    def to_read_only(self, *, copy: bool) -> Arena:
        """Return a read-only arena of these values; without `copy`, it shares this one's buffer."""
        flat = self._buffer.writable
        if copy:
            flat = aligned_empty(flat.shape, self.dtype)
            flat[:] = self._buffer.writable
        return Arena(self.shapes, self.dtype, flat, read_only=True)

    def new_views(self) -> dict[str, Array]:
        """Return views of its own for the caller, who may assign to their shape."""
        return self._views(self._buffer.visible)

    def __getitem__(self, name: str) -> Array:
        return self._buffer.views[name]

    def __setitem__(self, name: str, value: npt.ArrayLike) -> None:
        view = self._buffer.views[name]
        if self.read_only:
            raise ValueError(f"array {name!r} is read-only")
        view[...] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffer.views)

    def __len__(self) -> int:
        return len(self._buffer.views)

    @property
    def n_elements(self) -> int:
        """Elements of the named arrays, without the gaps."""
        return sum(view.size for view in self._buffer.views.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.flat.nbytes

    def like(self, flat: Array | None = None, partition: Partition = UNDIVIDED) -> Arena:
        """Return a writable arena of the same layout, of zeros or over an existing buffer."""
        return Arena(self.shapes, self.dtype, flat, partition=partition)

    def copy_from(self, other: Arena) -> None:
        """Copy all values of an arena of the same layout, as an update."""
        if self.shapes != other.shapes or self.dtype != other.dtype:
            raise ValueError("the arenas differ in layout")
        update_target(self)[:] = other.flat
        self.swap_buffers()

    def first_non_finite(self) -> str | None:
        """Return the name of the first array with a NaN or infinity, or None.

        Each process checks its own slice.
        """
        if not self:
            return None
        index = self.partition.minimum(self._first_non_finite_index())
        return None if index == len(self) else list(self)[index]

    def _first_non_finite_index(self) -> int:
        """Return the index of the first non-finite array in the owned slice, or `len(self)`."""
        owned = self.owned_slice
        values = self.flat[owned]
        with np.errstate(over="ignore"):
            sum_of_squares = np.dot(values, values)
        # twice as fast as `all_finite`, which decides if the sum overflows
        if math.isfinite(sum_of_squares) or all_finite(values):
            return len(self)
        position = owned.start + int(np.isfinite(values).argmin())
        address = self.flat.ctypes.data
        starts = [(view.ctypes.data - address) // self.dtype.itemsize for view in self.values()]
        return bisect_right(starts, position) - 1

    def fill_sentinel(self) -> None:
        """Fill every named array with a NaN of a bit pattern that no computation produces."""
        for name in self:
            self._bits(name).fill(_SENTINEL[self.dtype.itemsize])

    def with_sentinel(self) -> list[str]:
        """Return the names of the arrays that were not written completely since `fill_sentinel`."""
        sentinel = _SENTINEL[self.dtype.itemsize]
        return [name for name in self if (self._bits(name) == sentinel).any()]

    def _bits(self, name: str) -> Array:
        return self[name].view(f"u{self.dtype.itemsize}")

    def same_bits(self, other: Mapping[str, Array]) -> bool:
        """Tell whether both have the same names, shapes, dtypes and bits.

        NaN payloads and signs of zero count.
        """
        if self.keys() != other.keys():
            return False
        return all(same_bits(self[name], other[name]) for name in self)


def update_target(arena: Arena) -> Array:
    """Return the buffer that the next update of an arena writes.

    Only for stepctl's own updates: other code could keep it and change a checkpoint in flight.
    """
    return arena._update_buffer().writable


def update_views(arena: Arena) -> dict[str, Array]:
    """Return the named arrays of `update_target`."""
    return arena._views(update_target(arena))


def same_bits(a: Array, b: Array) -> bool:
    """Tell whether two arrays have the same shape, dtype and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def all_finite(array: Array) -> bool:
    """Tell whether no element is NaN or infinite."""
    flat = array.reshape(-1)
    # in parts, so that the temporary array stays in the cache
    starts = range(0, flat.size, _FINITE_CHECK_ELEMENTS)
    return all(np.isfinite(flat[start : start + _FINITE_CHECK_ELEMENTS]).all() for start in starts)


def check_names(names: Collection[str]) -> None:
    """Raise ValueError for an array name that is no path, too deep, or below another array."""
    for name in names:
        parts = name.split("/")
        if not all(map(NAME_PART.fullmatch, parts)) or len(parts) > _MAX_FOLDERS + 1:
            raise ValueError(
                f"array name {name!r}: use letters, digits, '_', '-', '.', and '/' between at most "
                f"{_MAX_FOLDERS} folders"
            )
        for end in range(1, len(parts)):
            folder = "/".join(parts[:end])
            if folder in names:
                raise ValueError(
                    f"array name {name!r}: {folder!r} is an array already, so it cannot be a folder"
                )
