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
import time
from collections.abc import Callable, Generator
from typing import Any, BinaryIO, TypeVar

from stepctl.errors import RunInUseError
from stepctl.mirror.manifest import Contents, Manifest, Owner, StoredObject
from stepctl.mirror.names import Key
from stepctl.mirror.store import ObjectStore

T = TypeVar("T")


class OwnedByAnother(RunInUseError):
    """Another process owns the mirror, and may be alive."""


class Deposed(RunInUseError):
    """Another process has taken over the mirror; this one must not write to it any more."""


@dataclasses.dataclass(frozen=True)
class Create:
    """Create an object if absent; the reply is a bool."""

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
    """List names; the reply is a list of them."""

    prefix: str


@dataclasses.dataclass(frozen=True)
class Upload:
    """Upload a file."""

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


Request = Create | Put | Get | List | Upload | Delete | Wait
Transition = Generator[Request, Any, T]


@dataclasses.dataclass(frozen=True)
class Claim:
    """An epoch that this process owns, and the newest commit that it knows."""

    epoch: int
    owner: Owner
    newest: Manifest | None  # at first that of an earlier epoch; None: the mirror holds no run

    @property
    def next_key(self) -> Key:
        """The key of the next commit, and of objects uploaded for it."""
        raise NotImplementedError


def run(
    transition: Transition[T], store: ObjectStore, wait: Callable[[float], None] = time.sleep
) -> T:
    """Perform the requests of a transition and return its result.

    What `wait` and the store raise ends the transition and passes through.
    """
    raise NotImplementedError


def claim_mirror(
    owner: Owner,
    *,
    take_over: bool = False,
    announce: Callable[[str], None] = lambda message: None,
) -> Transition[Claim]:
    """Become the owner of the mirror, and return the newest commit as of then.

    If another owner may be alive, wait for two of its beat intervals, after one line to
    `announce`; with `take_over`, do not wait.

    Raises OwnedByAnother (exit 4) if it is alive or another process was faster; ConfigError (exit
    2) if the mirror holds another run or the store has no conditional writes; CheckpointError
    (exit 3) if no commit of a mirror that has some can be read.
    """
    raise NotImplementedError


def read_newest() -> Transition[Manifest | None]:
    """Return the newest commit that can be read, None if there is none.

    CheckpointError if there are commits and all are damaged.
    """
    raise NotImplementedError


def read_owner() -> Transition[tuple[int, Owner, bool] | None]:
    """Return the newest epoch, its owner, and whether it was released; None without any."""
    raise NotImplementedError


def read_kept(manifest: Manifest) -> Transition[list[Manifest]]:
    """Return the earlier commits that a manifest keeps and that can be read, newest first.

    For a reader that finds an object of `manifest` damaged, and for a resume at an earlier step.
    """
    raise NotImplementedError


def upload(claim: Claim, file: BinaryIO, size: int, sha256: str) -> Transition[StoredObject]:
    """Upload the next `size` bytes of a file for the next commit."""
    raise NotImplementedError


def commit(claim: Claim, contents: Contents, keep_last: int) -> Transition[Claim]:
    """Make `contents` the newest commit, and return the claim with it.

    Its objects are those uploaded with this claim and those of `claim.newest`; no others. Commits
    of the same or a later step are no longer kept, and of the others the newest `keep_last - 1`.
    Raises Deposed if another process has taken over; the commit may then be lost.
    """
    raise NotImplementedError


def beat(claim: Claim, count: int) -> Transition[None]:
    """Show that the owner is alive: `count` must differ from that of the beat before.

    Raises Deposed if another process has taken over.
    """
    raise NotImplementedError


def release(claim: Claim) -> Transition[None]:
    """End the epoch: the next owner need not wait. The claim must not be used after it."""
    raise NotImplementedError


def collect_garbage(claim: Claim) -> Transition[int]:
    """Delete what `claim.newest` does not keep; return the number of objects deleted.

    Only for a claim that `commit` returned.
    """
    raise NotImplementedError
