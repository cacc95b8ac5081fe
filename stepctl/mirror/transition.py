"""Transitions: operations on a store without input and output, and `run`, which performs them.

A transition is a generator. It yields requests, receives the replies, and returns its result. Tests
and the model checker perform the same requests on a store of their own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator
from typing import Any, BinaryIO, TypeVar

from stepctl.errors import CheckpointError
from stepctl.mirror.store import ObjectStore, StoreUnavailable

T = TypeVar("T")

_MAX_NAMES = 50_000  # of one prefix
_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Create:
    """Create an object if absent; the reply tells whether it was, see `ObjectStore.create`."""

    name: str
    content: bytes


@dataclasses.dataclass(frozen=True)
class Put:
    """Create or overwrite an object."""

    name: str
    content: bytes


@dataclasses.dataclass(frozen=True)
class Get:
    """Read an object; the reply is its content, or None."""

    name: str
    max_bytes: int


@dataclasses.dataclass(frozen=True)
class List:
    """List the names below a prefix that are greater than `after`; the reply is a list of them."""

    prefix: str
    after: str = ""


@dataclasses.dataclass(frozen=True)
class Upload:
    """Upload the next bytes of a file."""

    name: str
    file: BinaryIO
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Delete:
    """Delete an object if it exists."""

    name: str


@dataclasses.dataclass(frozen=True)
class Wait:
    """Wait for some seconds."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class Locate:
    """The reply is the store's URL, for a message."""


Request = Create | Put | Get | List | Upload | Delete | Wait | Locate
Transition = Generator[Request, Any, T]


def run(
    transition: Transition[T], store: ObjectStore, wait: Callable[[float], object] = time.sleep
) -> T:
    """Perform the requests of a transition and return its result.

    An exception of the store or of `wait` is raised in the transition, which ends it unless it is
    handled there.
    """
    try:
        request = next(transition)
        while True:
            try:
                reply = _perform(request, store, wait)
            except Exception as error:
                request = transition.throw(error)
            else:
                request = transition.send(reply)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        transition.close()


def _perform(request: Request, store: ObjectStore, wait: Callable[[float], object]) -> Any:
    match request:
        case Create(name, content):
            return store.create(name, content)
        case Put(name, content):
            return store.put(name, content)
        case Get(name, max_bytes):
            return store.get(name, max_bytes)
        case List(prefix, after):
            return _names(store, prefix, after)
        case Upload(name, file, size, sha256):
            return store.upload(name, file, size, sha256)
        case Delete(name):
            return store.delete(name)
        case Wait(seconds):
            return wait(seconds)
        case Locate():
            return store.url


def _names(store: ObjectStore, prefix: str, after: str) -> list[str]:
    found: list[str] = []
    for name, _ in store.list(prefix, after):
        found.append(name)
        if len(found) > _MAX_NAMES:
            raise CheckpointError(
                "mirror",
                f"{store.url}/{prefix}: has more than {_MAX_NAMES:,} objects, which no mirror has; "
                "use another URL",
            )
    return found


# --- single requests, with the types of their replies


def get(name: str, max_bytes: int) -> Transition[bytes | None]:
    """Return an object's content, None if it is absent; CheckpointError if it is larger."""
    content: bytes | None = yield Get(name, max_bytes)
    return content


def exists(name: str) -> Transition[bool]:
    """Tell whether there is an object, which is never deleted.

    A faulty proxy can answer with a page of its own: a yes is asked for again.
    """
    for _ in range(2):
        try:
            content = yield from get(name, 0)
        except CheckpointError:  # it is not empty
            continue
        if content is None:
            return False
    return True


def holds(name: str, content: bytes) -> Transition[bool | None]:
    """Tell whether an object has this content; None if it is absent."""
    try:
        found = yield from get(name, len(content))
    except CheckpointError:  # it is larger
        return False
    return None if found is None else found == content


def list_names(prefix: str, after: str = "") -> Transition[list[str]]:
    """Return the names below a prefix that are greater than `after`, in any order."""
    found: list[str] = yield List(prefix, after)
    return found


def url() -> Transition[str]:
    """Return the store's URL."""
    place: str = yield Locate()
    return place


def create(name: str, content: bytes) -> Transition[bool]:
    """Create an object, and tell whether it then has this content.

    It may have it from an earlier attempt whose reply was lost: hence the look at an object that
    exists. A store also reports that an object exists if two requests collide and neither succeeds.
    """
    for _ in range(_ATTEMPTS):
        created: bool = yield Create(name, content)
        if created:
            return True
        is_own = yield from holds(name, content)
        if is_own is not None:
            return is_own
    raise StoreUnavailable(
        f"{(yield from url())}/{name}: the store reports it as present and as absent"
    )
