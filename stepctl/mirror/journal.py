"""The reports of an uploader: messages, lines of the ledger, and `mirror.json`."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections import deque
from typing import Any, final

from stepctl.errors import StepctlError
from stepctl.mirror.manifest import Manifest
from stepctl.mirror.protocol import Claim
from stepctl.mirror.writer import Checkpoint
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.mirror_status import MirrorStatus, read_status
from stepctl.system.text import in_one_line

_N_SILENT = 1  # failures in a row that are not reported: the next attempt may succeed
_MAX_ERROR = 300  # characters


@final
class Journal:
    """Reports when a mirror starts to fail, when it works again, and how far it has come.

    All methods may be called from any thread. After `close` nothing is written any more, since
    another process may hold the run. What cannot be written is left out: the training thread will
    report the same error.
    """

    def __init__(self, directory: RunDirectory, url: str) -> None:
        """Continue the `mirror.json` of a locked run, if it is of the same mirror."""
        self._directory = directory
        self._folder = directory.folder  # later, `directory` may have another
        self._url = url
        self._messages = deque[str]()
        self._lock = threading.RLock()
        self._is_closed = False
        self._n_failures = 0  # in a row
        self._is_failing = False  # which was reported
        before = read_status(directory.folder)
        self._status = MirrorStatus(url)
        if before is not None and before.url == url:
            self._status = before._replace(error=None, failing_since=None)

    @property
    def has_messages(self) -> bool:
        """Tell whether there are messages to show."""
        return bool(self._messages)

    @property
    def is_failing(self) -> bool:
        """Tell whether it was reported that the mirror fails."""
        return self._is_failing

    @property
    def error(self) -> str | None:
        """Why the mirror fails."""
        return self._status.error

    def take_messages(self) -> list[str]:
        """Return the messages since the last call."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def tell(self, message: str) -> None:
        """Leave a message for the training thread to show."""
        self._messages.append(message)

    def fail(self, error: str, *, at_once: bool = False) -> None:
        """Count a failure; report the first one of a row, unless it may be over `at_once`."""
        error = in_one_line(error.removeprefix(f"{self._url}: "), _MAX_ERROR)
        with self._lock:
            self._n_failures += 1
            if self._n_failures <= _N_SILENT and not at_once:
                return
            if not self._is_failing:
                self.tell(
                    f"warning: {self._url}: the mirror cannot be written ({error}); training goes "
                    "on, and the upload is tried again"
                )
                self._is_failing = True  # after the message, for `wait_for_claim`
                self._record("failing", error=error)
                self._set_status(error=error, failing_since=_now())
            elif self._status.error != error:
                self._set_status(error=error)

    def succeed(self) -> None:
        """Report that the mirror works again, if it was reported that it fails."""
        with self._lock:
            self._n_failures = 0
            if self._is_failing:
                self._is_failing = False
                self.tell(f"{self._url}: the mirror works again")
                self._record("working")
                self._set_status(error=None, failing_since=None)

    def lose(self, error: StepctlError) -> None:
        """Report that another process owns the mirror."""
        with self._lock:
            self._record("lost", error=in_one_line(str(error), _MAX_ERROR))

    def refuse(self, error: StepctlError) -> None:
        """Report that the mirror cannot be that of this run."""
        with self._lock:
            text = in_one_line(str(error), _MAX_ERROR)
            self._record("refused", error=text)
            self._set_status(error=text, failing_since=_now())
            self.tell(f"warning: {error}; training goes on without a mirror")

    def own(self, claim: Claim, start: Checkpoint | None) -> None:
        """Report what a claimed mirror holds; `start` is the checkpoint the segment started from."""
        newest = claim.newest
        if newest is None:
            self._set_status(epoch=claim.epoch, seq=None, step=None, sha256=None, time=None)
            return
        with self._lock:
            if (self._status.epoch, self._status.seq) == newest.key:
                self._set_status()  # the error of a segment that was killed is over
                return
            sha256 = start.sha256 if start is not None and start.step == newest.step else None
            self._set_status(
                epoch=newest.key.epoch,
                seq=newest.key.seq,
                step=newest.step,
                sha256=sha256,
                time=None,
            )

    def commit(self, newest: Manifest, checkpoint: Checkpoint) -> None:
        """Report the newest commit."""
        self._set_status(
            epoch=newest.key.epoch,
            seq=newest.key.seq,
            step=checkpoint.step,
            sha256=checkpoint.sha256,
            time=_now(),
        )

    def _set_status(self, **changes: Any) -> None:
        """Change `mirror.json`."""
        with self._lock:
            self._status = self._status._replace(**changes)
            if not self._is_closed:
                with contextlib.suppress(StepctlError):
                    self._status.write(self._folder)

    def close(self) -> None:
        """Write nothing more."""
        with self._lock:
            self._is_closed = True

    def _record(self, state: str, **facts: str) -> None:
        if not self._is_closed:
            with contextlib.suppress(StepctlError):
                self._directory.append_ledger("mirror", url=self._url, state=state, **facts)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
