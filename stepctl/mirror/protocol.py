"""The transitions of a mirror, without input and output. PROTOCOL.md says why they are safe.

    claim = run(claim_mirror(Owner.this_process(run_id)), store)
    checkpoint = run(upload(claim, file, size, sha256), store)
    claim = run(commit(claim, Contents(...), keep_last=3), store)
    run(collect_garbage(claim), store)
    run(release(claim), store)

A transition is a generator: it yields requests and receives the replies. `run` performs them on a
store. After StoreUnavailable, in a request or in its reply, the same transition with the same
arguments can be run again at any time: each is idempotent.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from typing import BinaryIO

from stepctl.errors import CheckpointError, ConfigError, RunInUseError, StepctlError
from stepctl.mirror import names
from stepctl.mirror.manifest import (
    MAX_MANIFEST_BYTES,
    Contents,
    Kept,
    Manifest,
    Owner,
    StoredObject,
)
from stepctl.mirror.names import Key
from stepctl.mirror.reading import read_log, read_manifest, read_newest, read_owner_of
from stepctl.mirror.store import StoreUnavailable
from stepctl.mirror.transition import (
    Delete,
    Put,
    Transition,
    Upload,
    Wait,
    create,
    exists,
    get,
    holds,
    list_names,
    url,
)

_MAX_BEAT_BYTES = 100
_POLLS = 4  # of a beat, in the two intervals that a newcomer waits
_ATTEMPTS = 100


class OwnedByAnother(RunInUseError):
    """Another process owns the mirror, and may be alive."""


class Deposed(RunInUseError):
    """Another process has taken over the mirror; this one must not write to it any more."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """An epoch that this process owns, and the newest commit that it knows."""

    epoch: int
    owner: Owner
    newest: Manifest | None  # at first that of an earlier epoch; None: the mirror holds no run

    @property
    def next_key(self) -> Key:
        """The key of the next commit, and of objects uploaded for it."""
        if self.newest is None or self.newest.key.epoch != self.epoch:
            return Key(self.epoch, 1)
        return Key(self.epoch, self.newest.key.seq + 1)


# --- becoming the owner


def claim_mirror(
    owner: Owner,
    *,
    take_over: bool = False,
    announce: Callable[[str], None] = lambda message: None,
) -> Transition[Claim]:
    """Become the owner of the mirror, and return the newest commit as of then.

    If another owner may be alive, wait for two of its beat intervals, after one line to
    `announce`; with `take_over`, do not wait.

    Raises OwnedByAnother (exit 4) if it is alive or another process was faster, Deposed (exit 4) if
    yet another one has taken over meanwhile; ConfigError (exit 2) if the mirror holds another run
    or the store has no conditional writes; CheckpointError (exit 3) if no commit of a mirror that
    has some can be read.
    """
    yield from _check_store(secrets.token_hex(16))
    keys = yield from read_log()
    epoch = keys[-1].epoch if keys else 0
    if not epoch or not (yield from holds(names.owner(epoch), owner.to_bytes())):
        # no earlier attempt of this claim has succeeded
        yield from _refuse_another_run(owner, (yield from read_newest()))
        if epoch and not take_over:
            yield from _wait_until_free(epoch, announce)
        epoch += 1
        yield from _create_owner(epoch, owner)
    # Not before the owner exists: an earlier owner may have committed until then.
    newest = yield from read_newest(announce, expected=Key(epoch, 0))
    claim = Claim(epoch, owner, newest)
    if newest is not None and newest.key.epoch > epoch:
        raise (yield from _deposed(claim))
    try:
        yield from _refuse_another_run(owner, newest)
    except ConfigError:
        yield from release(claim)
        raise
    return claim


def _check_store(nonce: str) -> Transition[None]:
    """Raise ConfigError if the store creates an object that exists."""
    name = names.probe(nonce)
    yield from create(name, b"1")
    was_replaced = yield from create(name, b"2")
    yield Delete(name)
    if was_replaced:
        raise ConfigError(
            f"{(yield from url())}: the store replaced an object that it was to create only if "
            "absent, so that two writers could overwrite each other; use a store with conditional "
            "writes (If-None-Match)"
        )


def _refuse_another_run(owner: Owner, newest: Manifest | None) -> Transition[None]:
    if newest is not None and newest.run_id != owner.run_id:
        raise ConfigError(
            f"{(yield from url())}: is the mirror of another run ({newest.run_id}, at step "
            f"{newest.step}); give this run ({owner.run_id}) a URL of its own"
        )


def _wait_until_free(epoch: int, announce: Callable[[str], None]) -> Transition[None]:
    """Wait until the owner of an epoch has ended, for certain or in all likelihood.

    OwnedByAnother if it overwrites its beat meanwhile.
    """
    if (yield from exists(names.released(epoch))):
        return
    other = yield from read_owner_of(epoch)
    if other.is_known_dead():
        return
    first = yield from get(names.beat(epoch), _MAX_BEAT_BYTES)
    seconds = 2 * other.beat_seconds
    place = yield from url()
    announce(f"{place}: in use by {other}; waiting {seconds:g} s to see whether it is alive")
    for _ in range(_POLLS):
        yield Wait(seconds / _POLLS)
        if (yield from exists(names.released(epoch))):
            return
        if (yield from get(names.beat(epoch), _MAX_BEAT_BYTES)) != first:
            raise OwnedByAnother(_in_use(place, other))


def _create_owner(epoch: int, owner: Owner) -> Transition[None]:
    """Create the owner of an epoch; OwnedByAnother if another process was faster."""
    if epoch > names.MAX_NUMBER:
        raise CheckpointError("mirror", f"{(yield from url())}: has no epoch after {epoch - 1}")
    if (yield from create(names.owner(epoch), owner.to_bytes())):
        return
    other = yield from read_owner_of(epoch)
    if other != owner:
        raise OwnedByAnother(_in_use((yield from url()), other))


def _in_use(place: str, other: Owner) -> str:
    return f"{place}: in use by {other}; wait for it, stop it, or add --take-over if it has ended"


# --- operations of the owner


def upload(claim: Claim, file: BinaryIO, size: int, sha256: str) -> Transition[StoredObject]:
    """Upload the next `size` bytes of a file for the next commit."""
    stored = StoredObject(claim.next_key, sha256, size)
    yield Upload(stored.name, file, size, sha256)
    return stored


def commit(claim: Claim, contents: Contents, keep_last: int) -> Transition[Claim]:
    """Make `contents` the newest commit, and return the claim with it.

    Its objects are those uploaded with this claim and those of `claim.newest`; ValueError for any
    other. Commits of the same or a later step are no longer kept, and of the others the newest
    `keep_last - 1`. Raises Deposed if another process has taken over; the commit may then be lost.
    """
    _check_objects(claim, contents)
    manifest = Manifest(
        key=claim.next_key,
        run_id=claim.owner.run_id,
        nonce=claim.owner.nonce,
        contents=contents,
        previous=_kept_by(claim.newest, contents.step, keep_last),
    )
    for _ in range(_ATTEMPTS):
        name = names.log(manifest.key)
        content = manifest.to_bytes()
        if len(content) > MAX_MANIFEST_BYTES:
            raise StepctlError(f"{(yield from url())}: the run has too many files to mirror")
        if (yield from create(name, content)):
            break
        # an earlier attempt, with other contents, whose reply was lost
        manifest = dataclasses.replace(manifest, key=manifest.key.next)
    else:
        raise StoreUnavailable(f"{(yield from url())}/{name}: the store has other contents")
    # After the manifest, not before: a successor that does not exist yet will read the manifest.
    keys = yield from read_log(manifest.key, after=names.owner(claim.epoch))
    if keys[-1].epoch > claim.epoch:
        raise (yield from _deposed(claim))
    return dataclasses.replace(claim, newest=manifest)


def _check_objects(claim: Claim, contents: Contents) -> None:
    """Raise ValueError if a commit names an object that may be deleted at any time."""
    carried_over = set() if claim.newest is None else set(claim.newest.contents.objects())
    for stored in contents.objects():
        is_uploaded = stored.key.epoch == claim.epoch and stored.key >= claim.next_key
        if not is_uploaded and stored not in carried_over:
            raise ValueError(f"{stored.name} is neither uploaded nor of the commit before")


def _kept_by(newest: Manifest | None, step: int, keep_last: int) -> tuple[Kept, ...]:
    """Return the earlier commits that a commit of a step keeps: only such as `newest` keeps."""
    if newest is None:
        return ()
    kept = [Kept(newest.key, newest.step), *newest.previous]
    earlier = [one for one in kept if one.step < step]
    return tuple(earlier[: keep_last - 1])


def beat(claim: Claim, count: int) -> Transition[None]:
    """Show that the owner is alive: `count` must differ from that of the beat before.

    Raises Deposed if another process has taken over.
    """
    yield Put(names.beat(claim.epoch), str(count).encode())
    try:
        yield from read_owner_of(claim.epoch + 1)
    except CheckpointError:
        return  # there is none, or the answer is not the store's: the next commit decides
    raise (yield from _deposed(claim))


def _deposed(claim: Claim) -> Transition[Deposed]:
    """Return the error of an owner that has a successor."""
    try:
        successor = str((yield from read_owner_of(claim.epoch + 1)))
    except CheckpointError:
        successor = "another process"
    return Deposed(
        f"{(yield from url())}: was taken over by {successor}; this process must not write to it "
        "any more"
    )


def release(claim: Claim) -> Transition[None]:
    """End the epoch: the next owner need not wait. The claim must not be used after it."""
    yield from create(names.released(claim.epoch), claim.owner.nonce.encode())


def collect_garbage(claim: Claim) -> Transition[int]:
    """Delete what `claim.newest` does not keep; return the number of objects deleted.

    Raises Deposed if another process has taken over.
    """
    newest = claim.newest
    if newest is None:
        return 0
    keys = yield from read_log(newest.key)
    if keys[-1].epoch > claim.epoch:
        raise (yield from _deposed(claim))
    # From here on, a successor continues from `newest` or a later commit, and this deletes nothing
    # of those: only names that are older, and that `newest` does not keep.
    kept = [one.key for one in newest.previous]
    old = [key for key in keys if key.seq and key < newest.key and key not in kept]
    for key in old:
        yield Delete(names.log(key))
    # Data last: a manifest that can be read has all its objects.
    used = {stored.name for stored in newest.contents.objects()}
    for key in kept:
        try:
            manifest = yield from read_manifest(key)
        except CheckpointError:
            return len(old)  # it names data that cannot be known
        if manifest is None and key in keys:
            raise StoreUnavailable(f"{(yield from url())}/{names.log(key)}: cannot be found")
        if manifest is not None:
            used.update(stored.name for stored in manifest.contents.objects())
    unused = [
        name
        for name in (yield from list_names(names.DATA))
        if _is_older_data(name, newest.key) and name not in used
    ]
    for name in unused:
        yield Delete(name)
    return len(old) + len(unused)


def _is_older_data(name: str, newest: Key) -> bool:
    """Tell whether an object is not one that was uploaded for the next commit."""
    parsed = names.parse_data(name)
    return parsed is not None and parsed[0] <= newest
