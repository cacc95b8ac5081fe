"""The background thread that keeps the mirror of a segment up to date.

    uploader = Uploader(mirror, restored, settings)
    uploader.wait_for_claim(5.0, say)    # raises if another process owns the mirror
    uploader.begin()
    uploader.offer(Checkpoint(100, sha256))
    behind = uploader.close(60.0)

It claims the mirror, and then mirrors the newest checkpoint that was offered. While the store fails
it tries again, less and less often, and never gives up before it is closed.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

from stepctl.errors import ConfigError, RunInUseError, StepctlError
from stepctl.mirror.heartbeat import Heartbeat
from stepctl.mirror.journal import Journal
from stepctl.mirror.manifest import Manifest, Owner
from stepctl.mirror.protocol import Claim, claim_mirror, release
from stepctl.mirror.store import ObjectStore, StoreUnavailable
from stepctl.mirror.transition import run
from stepctl.mirror.writer import Checkpoint, Pruned, RunWriter
from stepctl.rundir.directory import RunDirectory
from stepctl.system.user_code import describe_with_type

THREAD = "mirror-upload"  # name of the thread
_ANNOUNCE_SECONDS = 3.0  # that `close` waits without a word
_UNUSED_SECONDS = 5.0  # that `close` waits for the release of a mirror that was not used
_random = secrets.SystemRandom()  # the global generator may be part of a user's state


class Delays(NamedTuple):
    """Seconds between two attempts: the first delay, and the longest; each is twice the one before."""

    first: float = 0.5
    longest: float = 60.0


DELAYS = Delays()


@dataclass(frozen=True)
class Behind:
    """The checkpoint that is not mirrored when a segment ends, and the reason."""

    mirrored: int | None  # step; None: there is no checkpoint in the mirror
    step: int
    error: str


class _GaveUp(Exception):
    """The uploader was closed, and the time to wait for it is over."""


@final
class Uploader:
    """Mirrors the checkpoints of one segment.

    `check` is called with a new claim, before anything is written with it, and raises ConfigError
    if the local run must not continue there. `deposed` is the error that the training thread has to
    raise: another process owns the mirror. `has_news` tells whether `deposed` is set, or
    `take_messages` returns something.
    """

    def __init__(
        self,
        store: ObjectStore,
        directory: RunDirectory,
        *,
        owner: Owner,
        keep_last: int,
        every: int | None,
        restored: Checkpoint | None,
        check: Callable[[Claim], None],
        take_over: bool = False,
        claim: Claim | None = None,
        going_back: bool = False,
        is_damaged: bool = False,
        delays: Delays = DELAYS,
    ) -> None:
        """Start the thread. The run must be locked until `close` returns.

        `restored` is the newest checkpoint at the start. `claim` is given if the mirror is owned
        already. With `going_back`, later checkpoints in the mirror are given up. If its newest
        commit `is_damaged`, that too, and none of its objects is used again.
        """
        self.deposed: RunInUseError | None = None
        self._store = store
        self._journal = Journal(directory, store.url)
        self._folder = directory.folder
        self._owner = owner
        self._keep_last = keep_last
        self._every = every
        self._check_claim = check
        self._take_over = take_over
        self._going_back = going_back or is_damaged
        self._is_damaged = is_damaged
        self._delays = delays
        self._condition = threading.Condition()
        self._claim = claim
        self._heartbeat: Heartbeat | None = None
        self._writer: RunWriter | None = None
        self._refused: StepctlError | None = None
        self._in_foreground = True  # `wait_for_claim` raises a refused claim
        self._offered = restored
        self._due = False
        self._mirrored: Checkpoint | None = None
        self._has_begun = False
        self._closing = False
        self._gave_up = False
        self._ended = False
        self._waits_for_owner = False
        # a daemon: a request may hang when the process ends
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    # --- called by the segment

    def wait_for_claim(self, seconds: float, say: Callable[[str], None]) -> None:
        """Wait until the mirror is claimed, or cannot be reached; show the messages meanwhile.

        It takes longer while another owner of the mirror may be alive. Raises the error of a claim
        that is refused: OwnedByAnother, ConfigError or CheckpointError.
        """
        deadline = time.monotonic() + seconds
        while self._is_claiming(deadline):
            for message in self.take_messages():
                say(message)
        with self._condition:
            self._in_foreground = False
            error = self.deposed or self._refused
        if error is not None:
            raise error
        if self._writer is None and not self._journal.is_failing:
            self._journal.fail(f"no answer within {seconds:g} s", at_once=True)
        for message in self.take_messages():
            say(message)

    def _is_claiming(self, deadline: float) -> bool:
        """Wait for news of the claim; return False if there is nothing more to wait for."""
        with self._condition:
            if self._ended or self._writer is not None or self._journal.is_failing:
                return False
            remaining = deadline - time.monotonic()
            if remaining <= 0 and not self._waits_for_owner:
                return False
            self._condition.wait(max(remaining, 0.1))
            return True

    @property
    def claim(self) -> Claim | None:
        """The newest claim; None before the mirror is owned."""
        return self._claim

    def begin(self) -> None:
        """Begin to mirror: the run's files have been cut back to the segment's start."""
        with self._condition:
            self._has_begun = True
            self._condition.notify_all()

    def offer(self, checkpoint: Checkpoint) -> None:
        """Mirror an acknowledged checkpoint, unless a newer one is offered first."""
        with self._condition:
            before = self._offered
            self._offered = checkpoint
            self._due = self._due or self._is_due_after(before, checkpoint.step)
            if self._due:
                self._condition.notify_all()

    def _is_due_after(self, before: Checkpoint | None, step: int) -> bool:
        if before is None or self._every is None:
            return True
        return step // self._every != before.step // self._every

    @property
    def has_news(self) -> bool:
        """Tell whether there are messages, or another process owns the mirror."""
        return self.deposed is not None or self._journal.has_messages

    def take_messages(self) -> list[str]:
        """Return the messages since the last call."""
        return self._journal.take_messages()

    def close(
        self, seconds: float, announce: Callable[[float], None] = lambda seconds: None
    ) -> Behind | None:
        """Upload the run's files within `seconds`; return the checkpoint that is missing, or None.

        `announce` gets the seconds that are left if it takes long. KeyboardInterrupt ends the wait.
        The directory is not written to afterwards.
        """
        with self._condition:
            if not self._has_begun:
                seconds = min(seconds, _UNUSED_SECONDS)
            self._closing = True
            self._due = self._offered is not None
            self._condition.notify_all()
        with contextlib.suppress(KeyboardInterrupt):
            if not self._has_ended_within(min(seconds, _ANNOUNCE_SECONDS)):
                remaining = seconds - _ANNOUNCE_SECONDS
                if remaining > 0:
                    announce(remaining)
                    self._has_ended_within(remaining)
        with self._condition:
            self._gave_up = True
            self._condition.notify_all()
        self._journal.close()
        return self._behind()

    def _has_ended_within(self, seconds: float) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: self._ended, seconds)

    def _behind(self) -> Behind | None:
        if self._offered is None or self._mirrored == self._offered:
            return None
        mirrored = None if self._mirrored is None else self._mirrored.step
        error = self._journal.error or "the upload takes longer than mirror.wait_at_stop"
        return Behind(mirrored, self._offered.step, str(self.deposed or self._refused or error))

    # --- the thread

    def _run(self) -> None:
        try:
            self._own()
            while self._wait_until_due():
                self._until_it_works(self._mirror_newest)
            if self._claim is not None:
                run(release(self._claim), self._store)
        except _GaveUp:
            pass
        except StoreUnavailable:
            pass  # not released: a newcomer waits for its beat
        except RunInUseError as error:
            self._depose(error)
        except StepctlError as error:
            self._refuse(error)
        except Exception as error:  # training goes on whatever it is
            self._refuse(StepctlError(f"unexpected {describe_with_type(error)}"))
        finally:
            if self._heartbeat is not None:
                self._heartbeat.stop()
            if self._writer is not None:
                self._writer.close()
            with self._condition:
                self._ended = True
                self._condition.notify_all()

    def _depose(self, error: RunInUseError) -> None:
        with self._condition:
            if self.deposed is not None:
                return
            self.deposed = error
            if self._in_foreground:
                return
        self._journal.lose(error)

    def _refuse(self, error: StepctlError) -> None:
        with self._condition:
            self._refused = error
            if self._in_foreground:
                return
        self._journal.refuse(error)

    def _own(self) -> None:
        """Claim the mirror, and prepare writing to it."""
        if self._claim is None:
            self._until_it_works(self._make_claim)
        claim = self._claim
        assert claim is not None
        self._heartbeat = Heartbeat(self._store, claim, self._depose)
        self._journal.own(claim, self._offered)
        with self._condition:
            self._compare_with_newest(claim.newest)
            self._writer = RunWriter(
                self._store, claim, self._folder, self._check, upload_all=self._is_damaged
            )
            self._condition.notify_all()

    def _compare_with_newest(self, newest: Manifest | None) -> None:
        """Decide whether the checkpoint that the segment started from is to be mirrored."""
        restored = self._offered
        if restored is None:
            return
        if newest is None or newest.step < restored.step or self._going_back:
            self._due = True
        elif newest.step == restored.step:
            self._mirrored = restored
        else:  # the local files of a later step are damaged: its mirror is kept until it is passed
            self._offered = None

    def _make_claim(self) -> None:
        claim = run(
            claim_mirror(self._owner, take_over=self._take_over, announce=self._announce_wait),
            self._store,
            wait=self._wait_for_owner,
        )
        try:
            self._check_claim(claim)
        except StoreUnavailable:
            raise
        except StepctlError:
            run(release(claim), self._store)
            raise
        self._claim = claim

    def _announce_wait(self, message: str) -> None:
        with self._condition:
            self._waits_for_owner = True
            self._journal.tell(message)
            self._condition.notify_all()

    def _wait_for_owner(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._condition:
            while not self._gave_up and time.monotonic() < deadline:
                self._condition.wait(deadline - time.monotonic())
        self._check()

    def _wait_until_due(self) -> bool:
        """Wait for a checkpoint that is to be mirrored; return False if the uploader is closed."""
        with self._condition:
            while not self._closing and not (self._due and self._has_begun):
                self._condition.wait()
            self._check()
            return self._due and self._has_begun

    def _mirror_newest(self) -> None:
        writer = self._writer
        assert writer is not None
        with self._condition:
            checkpoint = self._offered
            self._due = False
        assert checkpoint is not None
        try:
            writer.write(checkpoint, self._keep_last)
        except Pruned:
            with self._condition:
                newer = self._offered != checkpoint
                self._due = True
            if newer:
                return
            raise StepctlError(f"the checkpoint of step {checkpoint.step} is gone") from None
        except BaseException:
            with self._condition:
                self._due = True
            raise
        self._claim = writer.claim
        self._mirrored = checkpoint
        assert writer.claim.newest is not None
        self._journal.commit(writer.claim.newest, checkpoint)

    def _until_it_works(self, attempt: Callable[[], None]) -> None:
        """Repeat an attempt until it succeeds; errors that no repetition can change are raised."""
        delay = self._delays.first
        while True:
            try:
                attempt()
            except (_GaveUp, RunInUseError, ConfigError):
                raise
            except StepctlError as error:
                self._fail(str(error))
            except Exception as error:  # training goes on whatever it is
                self._fail(f"unexpected {describe_with_type(error)}")
            else:
                self._journal.succeed()
                return
            self._pause(delay * _random.uniform(0.5, 1.5))
            delay = min(2 * delay, self._delays.longest)

    def _fail(self, error: str) -> None:
        self._journal.fail(error)
        with self._condition:
            self._waits_for_owner = False
            self._condition.notify_all()

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; the first one after `close` is made at once."""
        deadline = time.monotonic() + seconds
        with self._condition:
            was_closing = self._closing
            while not self._gave_up and self._closing == was_closing:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._condition.wait(remaining)
        self._check()

    def _check(self) -> None:
        if self._gave_up:
            raise _GaveUp
