"""Closing an object if a later step of its construction fails."""

import contextlib
from collections.abc import Iterator
from typing import Protocol


class _Closeable(Protocol):
    def close(self) -> None:
        """Release the resources of the object."""


@contextlib.contextmanager
def close_on_error(thing: _Closeable) -> Iterator[None]:
    """Close an object if the block raises an exception."""
    try:
        yield
    except BaseException:
        thing.close()
        raise
