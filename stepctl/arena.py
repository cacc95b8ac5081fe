"""The memory that training uses: arenas for what lasts, a workspace for what a step leaves behind."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
GRAIN = 1 << 13  # elements of a block that no two processes divide: OpenBLAS threads no dot product of this size
_DEEPEST = 16
_SLICE = 1 << 18  # elements looked at together
_UINT = {4: np.uint32, 8: np.uint64}
_MARK = {4: 0x7FC5CA1E, 8: 0x7FF85CA1E5CA1E00}
NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # between the slashes of an array's name


def aligned_empty(shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Return an uninitialised C-ordered array whose first element is 64-byte aligned."""
    return _aligned(np.empty, shape, np.dtype(dtype))


def aligned_zeros(shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Return a C-ordered array of zeros whose first element is 64-byte aligned; it is fetched when it is touched."""
    return _aligned(np.zeros, shape, np.dtype(dtype))


def _aligned(make: Callable[..., Array], shape: Shape, dtype: np.dtype[Any]) -> Array:
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = make(n_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def read_only(array: Array) -> Array:
    """Return a view of an array that cannot be written, nor can any view of it."""
    # with a read-only memoryview as its base, NumPy lets nobody set WRITEABLE again
    return np.asarray(array.data.toreadonly())


class Owners:
    """Who updates which part of an arena, and how they agree: here this process, all of it.

    A part is whole blocks of GRAIN elements, but for the arena's end. All owners call the same in the same order.
    """

    def part(self, n: int) -> slice:
        """Return which of n elements this process updates."""
        return slice(0, n)

    def least(self, number: int) -> int:
        """Return the least of the owners' numbers."""
        return number

    def over_blocks(self, flat: Array, value: Callable[[Array], float]) -> list[float]:
        """Return the value of each block of an arena, in order, found by the block's owner."""
        return [value(flat[first : first + GRAIN]) for first in range(0, len(flat), GRAIN)]

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Keep all owners in here together, each of which updates its part: once one is out, all parts are whole.

        TornUpdate if it fails where other owners' parts may have changed.
        """
        return _ALONE


SOLE = Owners()
_ALONE = contextlib.nullcontext()


class _Memory(NamedTuple):
    """A buffer, its view for readers, and the views of the named arrays."""

    flat: Array
    shown: Array
    views: dict[str, Array]


class Arena(Mapping[str, Array]):
    """One contiguous, 64-byte aligned, 1-D buffer that holds many named arrays as views.

    `flat` is the whole buffer, with zeros in the gaps that alignment leaves; `arena["dense0/weight"]` is a
    view into it. Names are paths; no name may be a folder of another.

    The views of a `read_only` arena, which a state is made of, cannot be written, and NumPy cannot make them
    writable: only an update changes the values. An update writes the new values, all of them, into what
    `update_target` returns and then calls `turn`. The target is the arena's memory itself, unless `hand_over` gave
    that away: then it is a second buffer, and the two change places. Where several processes have the same memory,
    each of its `owners` updates its `part`.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        dtype: npt.DTypeLike,
        flat: Array | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        """`flat` is the buffer if it is made already: 64-byte aligned, and as long as the layout asks."""
        check_names(shapes)
        self.shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in shapes.items()}
        self.dtype = np.dtype(dtype)
        self.read_only = read_only
        self._memory = self._new_memory(flat)
        self._spare: _Memory | None = None
        self.handed_over = False  # and not updated since
        self.touched = False  # whether an update may have changed values since this was last set to False
        self.owners = SOLE

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        return f"Arena({self.dtype}: {shapes})"

    def _new_memory(self, flat: Array | None = None) -> _Memory:
        n_elements = sum(self._padded(shape) for shape in self.shapes.values())
        if flat is None:
            flat = aligned_zeros((n_elements,), self.dtype)
        elif flat.shape != (n_elements,) or (n_elements and flat.ctypes.data % ALIGNMENT):
            raise ValueError("this memory is of another layout")
        shown = read_only(flat) if self.read_only else flat
        return _Memory(flat, shown, self._views(shown))

    def _padded(self, shape: Shape) -> int:
        """Return how many elements an array takes with the gap behind it."""
        step = ALIGNMENT // self.dtype.itemsize
        return -(-math.prod(shape) // step) * step

    def _views(self, flat: Array) -> dict[str, Array]:
        views, start = {}, 0
        for name, shape in self.shapes.items():
            views[name] = flat[start : start + math.prod(shape)].reshape(shape)
            start += self._padded(shape)
        return views

    @property
    def flat(self) -> Array:
        """The whole buffer."""
        return self._memory.shown

    @property
    def part(self) -> slice:
        """What of the buffer this process updates."""
        return self.owners.part(len(self._memory.flat))

    def _target(self) -> _Memory:
        """Return the memory that the next update writes."""
        if not self.handed_over:
            self.touched = True
            return self._memory
        self._spare = self._spare or self._new_memory()
        return self._spare

    def turn(self) -> None:
        """Swap in the buffer that an update has written."""
        if self.handed_over and self._spare is not None:
            self.touched = True
            self._memory, self._spare = self._spare, self._memory
            self.handed_over = False

    def move(self, memory: Array, spare: Array, owners: Owners) -> None:
        """Be in other memory from now on, with the values that stand there; the second buffer is made already too."""
        self._memory, self._spare = self._new_memory(memory), self._new_memory(spare)
        self.owners = owners

    def hand_over(self) -> Arena:
        """Return an arena of the present values that nothing changes any more until the update after the next call.

        Nothing of a read-only arena is copied: its memory is given away, and the next update goes elsewhere. There
        are two buffers, so an arena that was handed over before must be done with by the update after this call. The
        memory of any other arena may be written by whoever holds a view of it, so that its values are copied.
        """
        if not self.read_only:
            return self.to_read_only(copy=True)
        handed = object.__new__(Arena)
        handed.shapes, handed.dtype, handed.read_only = self.shapes, self.dtype, True
        handed._memory, handed._spare, handed.owners = self._memory, None, SOLE
        handed.handed_over, handed.touched = False, False
        self.handed_over = True
        return handed

    def to_read_only(self, *, copy: bool) -> Arena:
        """Return a read-only arena of these values; with `copy`, no view of this one can change it."""
        flat = self._memory.flat
        if copy:
            flat = aligned_empty(flat.shape, self.dtype)
            flat[:] = self._memory.flat
        return Arena(self.shapes, self.dtype, flat, read_only=True)

    def new_views(self) -> dict[str, Array]:
        """Return views of the named arrays that nobody else has: to set the shape of another changes none of them."""
        return self._views(self._memory.shown)

    def __getitem__(self, name: str) -> Array:
        return self._memory.views[name]

    def __setitem__(self, name: str, value: npt.ArrayLike) -> None:
        view = self._memory.views[name]
        if self.read_only:
            raise ValueError(f"array {name!r} is read-only")
        view[...] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self._memory.views)

    def __len__(self) -> int:
        return len(self._memory.views)

    @property
    def n_elements(self) -> int:
        """Elements in the named arrays, gaps not counted."""
        return sum(view.size for view in self._memory.views.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.flat.nbytes

    def like(self, flat: Array | None = None) -> Arena:
        """Return a new writable arena of the same layout, of zeros, or over a buffer that is made already."""
        return Arena(self.shapes, self.dtype, flat)

    def copy_from(self, other: Arena) -> None:
        """Take over every value of an arena of the same layout; this is an update."""
        if (self.shapes, self.dtype) != (other.shapes, other.dtype):
            raise ValueError("the arenas differ in layout")
        update_target(self)[:] = other.flat
        self.turn()

    def first_non_finite(self) -> str | None:
        """Return the name of the first array that is NaN or infinite in part, as far as its owners see."""
        first = self.owners.least(self._first_bad())
        return None if first == len(self) else list(self)[first]

    def _first_bad(self) -> int:
        """Return the number of the first array that is not finite in this process's part, or how many there are."""
        mine = self.flat[self.part]
        if all_finite(mine):
            return len(self)
        place = self.part.start + int(np.isfinite(mine).argmin())
        starts = [(view.ctypes.data - self.flat.ctypes.data) // self.dtype.itemsize for view in self.values()]
        return bisect_right(starts, place) - 1

    def mark(self) -> None:
        """Fill every named array with a NaN of a bit pattern that no computation makes."""
        for view in self._memory.views.values():
            view.view(_UINT[self.dtype.itemsize]).fill(_MARK[self.dtype.itemsize])

    def marked(self) -> list[str]:
        """Return the names of the arrays in which a mark still stands: not all of them was written."""
        size = self.dtype.itemsize
        return [name for name, view in self.items() if (view.view(_UINT[size]) == _MARK[size]).any()]

    def same_bits(self, other: Mapping[str, Array]) -> bool:
        """Tell whether both hold the same names, shapes, dtypes and bits (NaN payloads and signs of zero too)."""
        return self.keys() == other.keys() and all(same_bits(self[name], other[name]) for name in self)


def update_target(arena: Arena) -> Array:
    """Return the buffer that the next update of an arena writes.

    For stepctl's own updates, and not handed to any other code: whoever kept it could change a checkpoint in flight.
    """
    return arena._target().flat


def update_views(arena: Arena) -> dict[str, Array]:
    """Return the named arrays of `update_target`."""
    return arena._views(arena._target().flat)


def same_bits(a: Array, b: Array) -> bool:
    """Tell whether two arrays are the same to the bit."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def all_finite(array: Array) -> bool:
    """Tell whether no element is NaN or infinite."""
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[start : start + _SLICE]).all()) for start in range(0, flat.size, _SLICE))


def check_names(names: Collection[str]) -> None:
    """Raise ValueError at a name that a file could not hold: odd letters, too deep, or a folder of another."""
    for name in names:
        if not all(map(NAME_PART.fullmatch, name.split("/"))) or name.count("/") > _DEEPEST:
            raise ValueError(
                f"array name {name!r}: use letters, digits, '_', '-', '.', and '/' between at most {_DEEPEST} folders"
            )
        parts = name.split("/")
        for end in range(1, len(parts)):
            folder = "/".join(parts[:end])
            if folder in names:
                raise ValueError(f"array name {name!r}: {folder!r} is an array already, so it cannot be a folder")


class Workspace:
    """The temporary arrays of one forward and backward pass, made once and reused by every later pass.

    The n-th request of a pass gets the n-th array, so a pass that asks for the same shapes in the same order
    allocates nothing. `rng(stream)` gives the pass's random generator for a named stream; it is None when
    there is nothing random about the pass (evaluation), and layers then act in inference mode. `buffers` are the
    model's, to be read; into `new_buffers`, None in evaluation, goes all of what each becomes by this pass.
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
        """Begin a pass: every array is free again."""
        self.rng, self.new_buffers = rng, new_buffers
        self.buffers = {} if buffers is None else buffers
        self._pool.next = 0

    def scoped(self, name: str) -> Workspace:
        """Return a workspace with the same arrays whose random streams are called "<name>/<stream>".

        Models that take part in one pass each get a scope, so that equal layer names do not share a stream.
        """
        outer = self.rng
        if outer is None:
            return self
        inner = copy.copy(self)
        inner.rng = lambda stream: outer(f"{name}/{stream}")
        return inner

    def empty(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> Array:
        """Return an uninitialised array that is this caller's until the next `start`."""
        dtype = self.dtype if dtype is None else dtype
        pool = self._pool
        if pool.next == len(pool.arrays):
            pool.arrays.append(aligned_empty(shape, dtype))
        array = pool.arrays[pool.next]
        if array.shape != shape or array.dtype != dtype:
            array = pool.arrays[pool.next] = aligned_empty(shape, dtype)
        pool.next += 1
        return array


class _Pool:
    """The arrays of a workspace, and the number of the next one to hand out."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.next = 0


T = TypeVar("T")


class Fold(Generic[T]):
    """Joins values in the order of a fixed binary tree over the leaves 0, 1, ...: ((0 + 1) + (2 + 3)) + ...

    What comes is the values of whole subtrees, one after another, from any leaf on: as long as every value spans
    2^height leaves and begins at a multiple of that, it does not matter who joined what is in it.
    """

    def __init__(self, join: Callable[[T, T], T]) -> None:
        self._join = join
        self._stack: list[tuple[int, int, T]] = []  # (height, first leaf, value)

    def push(self, height: int, first: int, value: T) -> None:
        """Take the value of the leaves first .. first + 2^height - 1; join what belongs together."""
        while self._stack and self._stack[-1][0] == height and not self._stack[-1][1] >> height & 1:
            _, first, left = self._stack.pop()
            value = self._join(left, value)
            height += 1
        self._stack.append((height, first, value))

    def take(self) -> list[tuple[int, int, T]]:
        """Return what is joined as far as can be, (height, first leaf, value), and begin anew."""
        taken, self._stack = self._stack, []
        return taken

    def total(self) -> T:
        """Return everything joined into one, and begin anew."""
        *rest, (_, _, value) = self.take()
        for _, _, left in reversed(rest):
            value = self._join(left, value)
        return value


class TreeSum:
    """The sum of n arenas in the order of a fixed binary tree: ((0 + 1) + (2 + 3)) + ...

    Write the k-th summand into `leaf()` and call `add()`; `total()` is the sum. At most log2(n) + 1 arenas
    are held. Who computes a subtree does not change the result: the summands may begin at the leaf `first`.
    """

    def __init__(self, layout: Arena, first: int = 0) -> None:
        self._layout, self._first, self._next = layout, first, first
        self._free: list[Arena] = []
        self._fold = Fold(self._merge)
        self._leaf: Arena | None = None

    def leaf(self) -> Arena:
        """Return the arena for the next summand. Its old values must be overwritten, all of them."""
        if self._leaf is None:
            self._leaf = self._free.pop() if self._free else self._new()
        return self._leaf

    def add(self) -> None:
        """Take what stands in `leaf()` as the next summand."""
        leaf, self._leaf = self.leaf(), None
        self._fold.push(0, self._next, leaf)
        self._next += 1

    def total(self) -> Arena:
        """Return the sum of all summands since the last total; it is valid until the next `leaf()`."""
        total = self._fold.total()
        self._free.append(total)
        self._begin()
        return total

    def drop(self) -> None:
        """Forget the summands since the last total, and a leaf that was not added."""
        self._free += [arena for _, _, arena in self._fold.take()]
        if self._leaf is not None:
            self._free.append(self._leaf)
            self._leaf = None
        self._begin()

    def _begin(self) -> None:
        self._next = self._first

    def _new(self) -> Arena:
        return self._layout.like()

    def _merge(self, left: Arena, right: Arena) -> Arena:
        np.add(left.flat, right.flat, out=left.flat)
        self._free.append(right)
        return left
