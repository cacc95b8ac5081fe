"""Closing an object if a later step of its construction fails."""

import contextlib
from collections.abc import Iterator
from typing import Protocol, TypeVar


class _Closeable(Protocol):
    def close(self) -> None:
        """Release the resources of the object."""


T = TypeVar("T", bound=_Closeable | None)


@contextlib.contextmanager
def close_on_error(thing: T) -> Iterator[T]:
    """Yield an object, and close it if the block raises an exception; None is not closed."""
    try:
        yield thing
    except BaseException:
        if thing is not None:
            thing.close()
        raise
