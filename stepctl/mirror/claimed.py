"""A mirror that a process owns before its segment starts: to fetch the run, or to push it.

NumPy is not imported here: the config that is fetched decides how many threads it uses.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar, final

from stepctl.errors import CheckpointError, RunExistsError, StepctlError
from stepctl.mirror import fetch
from stepctl.mirror.heartbeat import Heartbeat
from stepctl.mirror.manifest import Manifest, Owner
from stepctl.mirror.protocol import Claim, claim_mirror, release
from stepctl.mirror.reading import read_kept, read_newest
from stepctl.mirror.store import ObjectStore, StoreUnavailable, open_store
from stepctl.mirror.transition import run
from stepctl.mirror.uploader import THREAD
from stepctl.rundir.directory import RunDirectory
from stepctl.stopping.signals import default_signal_actions
from stepctl.system.shell import command

_ANSWER_SECONDS = 3.0  # that the start of a run waits for the store
_RELEASE_SECONDS = 5.0

T = TypeVar("T")
Say = Callable[[str], None]


@final
class ClaimedMirror:
    """A mirror that this process owns before its segment starts.

    `is_damaged` tells whether an object of its newest commit was found damaged.
    """

    def __init__(self, store: ObjectStore, claim: Claim) -> None:
        self.store = store
        self.claim = claim
        self._heartbeat = Heartbeat(store, claim)
        self.is_damaged = False
        self._is_taken = False

    def report_damage(self) -> None:
        """Note that the newest commit is damaged: nothing of it may be used again."""
        self.is_damaged = True

    def take(self) -> Claim:
        """Return the claim: the caller beats and releases it from now on."""
        self._is_taken = True
        self._heartbeat.stop()
        return self.claim

    def close(self) -> None:
        """Release the mirror, unless the claim was taken."""
        self._heartbeat.stop()
        if not self._is_taken:
            with contextlib.suppress(StepctlError):
                _within(_RELEASE_SECONDS, lambda: run(release(self.claim), self.store))


@contextlib.contextmanager
def claimed_mirror(
    store: ObjectStore, run_id: str, say: Say, *, take_over: bool
) -> Iterator[ClaimedMirror]:
    """Own a mirror, and release it at the end, unless its claim was taken.

    Raises OwnedByAnother if another process owns it, ConfigError if it holds another run,
    StoreUnavailable if the store does not answer.
    """
    owner = Owner.this_process(run_id)
    claim = fetch.with_attempts(
        lambda: run(claim_mirror(owner, take_over=take_over, announce=say), store)
    )
    with contextlib.closing(ClaimedMirror(store, claim)) as claimed:
        yield claimed


@contextlib.contextmanager
def pulled_run(
    url: str,
    directory: RunDirectory,
    say: Say,
    *,
    take_over: bool,
    step: int | None = None,
) -> Iterator[ClaimedMirror | None]:
    """Own a mirror and fetch its run into a new directory; None if the mirror holds no run.

    The newest commit is fetched, or that of a `step`. Errors as in `claimed_mirror` and `fetch.pull`.
    """
    store = open_store(url)
    newest = fetch.read_mirror(store)
    if newest is None:
        yield None
        return
    directory.refuse_foreign_files()
    with contextlib.ExitStack() as held:
        with default_signal_actions():
            claimed = held.enter_context(
                claimed_mirror(store, newest.run_id, say, take_over=take_over)
            )
            assert claimed.claim.newest is not None
            manifest = commit_of(store, claimed.claim.newest, step)
            fetched = fetch.pull(store, manifest, directory, say)
        if fetched.key != manifest.key:
            claimed.report_damage()
        say(f"{directory.path}: fetched step {fetched.step} from {store.url}")
        yield claimed


def commit_of(store: ObjectStore, newest: Manifest, step: int | None) -> Manifest:
    """Return the newest commit, or the kept one of a step; CheckpointError if there is none."""
    if step is None or step == newest.step:
        return newest
    kept = fetch.with_attempts(lambda: run(read_kept(newest), store))
    for manifest in kept:
        if manifest.step == step:
            return manifest
    steps = ", ".join(str(manifest.step) for manifest in [newest, *kept])
    raise CheckpointError(
        "none", f"{store.url}: no checkpoint of step {step}; available steps: {steps}"
    )


def refuse_mirrored_run(url: str) -> None:
    """Raise RunExistsError if the mirror of a new run holds a run.

    A store that does not answer is not an error: the segment reports it.
    """
    store = open_store(url)
    try:
        newest = _within(_ANSWER_SECONDS, lambda: run(read_newest(), store))
    except StoreUnavailable:
        return
    if newest is not None:
        raise RunExistsError(
            f"{store.url}: already contains a run, at step {newest.step}; continue with: "
            f"{command('resume', store.url)}"
        )


def _within(seconds: float, action: Callable[[], T]) -> T:
    """Return the result of an action; StoreUnavailable if it takes longer."""
    results: list[T] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, name=THREAD, daemon=True)  # a request may hang
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise StoreUnavailable(f"no answer within {seconds:g} s")
    return results[0]
