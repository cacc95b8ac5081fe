"""Sums over a fixed binary tree, whose bits do not depend on which process adds which part."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from stepctl.state.arena import Arena

T = TypeVar("T")


class Subtree(NamedTuple, Generic[T]):
    """The value of the 2^height leaves from `first_leaf` on, a multiple of 2^height."""

    height: int
    first_leaf: int
    value: T


class Fold(Generic[T]):
    """Joins values in the order of a fixed binary tree: ((0 + 1) + (2 + 3)) + ...

    Subtrees may be joined elsewhere. They are pushed one after another, from any leaf on.
    """

    def __init__(self, join: Callable[[T, T], T]) -> None:
        self._join = join
        self._stack: list[Subtree[T]] = []

    def push(self, height: int, first_leaf: int, value: T) -> None:
        """Add the next subtree, and join it with complete siblings on its left."""
        while self._stack and self._is_sibling(height):
            left = self._stack.pop()
            value = self._join(left.value, value)
            first_leaf = left.first_leaf
            height += 1
        self._stack.append(Subtree(height, first_leaf, value))

    def _is_sibling(self, height: int) -> bool:
        """Tell whether the last subtree is the left sibling of one with this height."""
        last = self._stack[-1]
        is_left_child = not last.first_leaf >> height & 1
        return last.height == height and is_left_child

    def subtrees(self) -> list[Subtree[T]]:
        """Return the subtrees that are not joined yet, from left to right."""
        return list(self._stack)

    def root(self) -> T:
        """Join all subtrees from right to left, and return the result."""
        *rest, last = self._stack
        value = last.value
        for left in reversed(rest):
            value = self._join(left.value, value)
        return value

    def clear(self) -> None:
        """Remove all subtrees."""
        self._stack.clear()


class TreeSum:
    """The sum of n arenas in the order of a fixed binary tree: ((0 + 1) + (2 + 3)) + ...

    Write a summand into `leaf()` and call `add()`, n times; `total()` is the sum. At most log2(n) +
    1 buffers are used, in the same order for every sum of n arenas.
    """

    def __init__(
        self, layout: Arena, first_leaf: int = 0, buffers: Sequence[Arena] | None = None
    ) -> None:
        """Leave out `buffers` to allocate them when they are needed."""
        self._layout = layout
        self._first_leaf = first_leaf
        self._buffers = list(buffers or ())
        self._fold = Fold(self._join)
        self.reset()

    def reset(self) -> None:
        """Discard all summands since the last total."""
        self._fold.clear()
        self._next_leaf = self._first_leaf
        self._leaf_buffer: int | None = None
        self._free = list(reversed(range(len(self._buffers))))

    def leaf(self) -> Arena:
        """Return the arena for the next summand. All of its old values must be overwritten."""
        if self._leaf_buffer is None:
            if not self._free:
                self._free.append(len(self._buffers))
                self._buffers.append(self._layout.like())
            self._leaf_buffer = self._free.pop()
        return self._buffers[self._leaf_buffer]

    def add(self) -> None:
        """Add the values of `leaf()` as the next summand."""
        assert self._leaf_buffer is not None
        self._fold.push(0, self._next_leaf, self._leaf_buffer)
        self._leaf_buffer = None
        self._next_leaf += 1

    def total(self) -> Arena:
        """Return the sum of all summands since the last total; valid until the next `leaf()`."""
        total = self._buffers[self._fold.root()]
        self.reset()
        return total

    def partial_sums(self) -> list[Subtree[int]]:
        """Return the sums of whole subtrees so far, left to right; values are buffer indices."""
        return self._fold.subtrees()

    @property
    def n_buffers(self) -> int:
        """The number of buffers allocated so far."""
        return len(self._buffers)

    def _join(self, left: int, right: int) -> int:
        left_sum = self._buffers[left].flat
        np.add(left_sum, self._buffers[right].flat, out=left_sum)
        self._free.append(right)
        return left
