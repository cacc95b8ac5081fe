"""Reading a mirror: transitions that change nothing, and need no claim.

    newest = run(read_newest(), store)          # Manifest | None
    earlier = run(read_kept(newest), store)

An owner may delete what a reader without a claim is about to read. The reader then starts again
from `read_newest`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from stepctl.errors import CheckpointError
from stepctl.mirror import names
from stepctl.mirror.manifest import MAX_MANIFEST_BYTES, MAX_OWNER_BYTES, Manifest, Owner
from stepctl.mirror.names import Key
from stepctl.mirror.store import StoreUnavailable
from stepctl.mirror.transition import Transition, exists, get, list_names, url

T = TypeVar("T")

_ATTEMPTS = 10
_MAX_DAMAGED = 16  # manifests that are read at most


class Ownership(NamedTuple):
    """The newest epoch of a mirror."""

    epoch: int
    owner: Owner
    is_released: bool


def read_newest(
    announce: Callable[[str], None] = lambda message: None, *, expected: Key | None = None
) -> Transition[Manifest | None]:
    """Return the newest commit that can be read, None if there is none.

    `announce` gets a line for each damaged manifest that is skipped. CheckpointError if there are
    commits and none can be read. StoreUnavailable if the log lacks the entry `expected`, or is
    otherwise incomplete.
    """
    for _ in range(_ATTEMPTS):
        keys = yield from read_log(expected)
        commits = [key for key in reversed(keys) if key.seq]
        if not commits:
            return None
        for key in commits[:_MAX_DAMAGED]:
            try:
                manifest = yield from read_manifest(key)
            except CheckpointError as error:
                announce(f"{(yield from url())}/{error}; reading the commit before it")
                continue
            if manifest is not None:
                return manifest
            break  # a newer commit has replaced it: list again
        else:
            raise CheckpointError("mirror", f"{(yield from url())}: every manifest is damaged")
    raise StoreUnavailable(f"{(yield from url())}: a listed manifest cannot be found")


def read_log(expected: Key | None = None, after: str = "") -> Transition[list[Key]]:
    """Return the keys of the owners (`seq` 0) and of the manifests, in ascending order.

    A faulty proxy can make a listing empty. StoreUnavailable if the log has neither the entry
    `expected` nor one of a later epoch, whose owner may have deleted it; or if it is empty although
    an epoch was opened.
    """
    for _ in range(2):  # an entry may be created after the first listing
        found = [names.parse_log(name) for name in (yield from list_names(names.LOG, after))]
        keys = sorted(key for key in found if key is not None)
        if expected is not None:
            if expected in keys or (keys and keys[-1].epoch > expected.epoch):
                return keys
        elif keys or not (yield from exists(names.owner(1))):  # owners are never deleted
            return keys
    raise StoreUnavailable(
        f"{(yield from url())}: a listing lacks objects that exist; check the proxies between this "
        "machine and the store"
    )


def read_manifest(key: Key) -> Transition[Manifest | None]:
    """Return the manifest of a commit, None if it is absent; CheckpointError if it is damaged."""
    name = names.log(key)
    return (
        yield from _read(name, MAX_MANIFEST_BYTES, lambda content: Manifest.parse(content, key))
    )


def read_kept(manifest: Manifest) -> Transition[list[Manifest]]:
    """Return the earlier commits that a manifest keeps and that can be read, newest first.

    For a reader that finds an object of `manifest` damaged, and for a resume at an earlier step.
    """
    readable = []
    for kept in manifest.previous:
        try:
            earlier = yield from read_manifest(kept.key)
        except CheckpointError:
            continue
        if earlier is not None:
            readable.append(earlier)
    return readable


def read_owner() -> Transition[Ownership | None]:
    """Return the newest epoch and its owner, None if the mirror has none."""
    keys = yield from read_log()
    if not keys:
        return None
    epoch = keys[-1].epoch
    owner = yield from read_owner_of(epoch)
    return Ownership(epoch, owner, (yield from exists(names.released(epoch))))


def read_owner_of(epoch: int) -> Transition[Owner]:
    """Return the owner of an epoch; CheckpointError if it is damaged or absent."""
    name = names.owner(epoch)
    owner = yield from _read(name, MAX_OWNER_BYTES, lambda content: Owner.parse(content, epoch))
    if owner is None:  # owners are never deleted
        raise CheckpointError("mirror", f"{(yield from url())}/{name} was removed")
    return owner


def _read(name: str, max_bytes: int, parse: Callable[[bytes], T]) -> Transition[T | None]:
    """Read and parse an object, None if it is absent; CheckpointError if it is damaged."""
    content = yield from get(name, max_bytes)
    if content is None:
        return None
    try:
        return parse(content)
    except CheckpointError:
        content = yield from get(name, max_bytes)  # the damage may be the transmission's
    return None if content is None else parse(content)
