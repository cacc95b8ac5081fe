"""One job at a time on a thread of its own, so that training goes on while a checkpoint is written."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs a job; what it raised reaches the thread that looks next."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """Tell whether a job is being done."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, once the one before is finished."""
        assert not self.busy, "the job before must be finished"
        thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread = thread
        thread.start()

    def check(self) -> None:
        """Raise the error of a job that has ended, once."""
        if not self.busy and self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until the job is done; raise its error if it had one."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def abandon(self) -> None:
        """Have the job give up, and wait until it has; its error is nobody's any more."""
        self._abandoned.set()
        if self._thread is not None and self._thread.ident is not None:  # else an interrupt came before it began
            self._thread.join()

    def abandoned(self) -> bool:
        """Tell the job whether it should give up."""
        return self._abandoned.is_set()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            if not self.abandoned():
                job()
        except BaseException as error:
            self._error = error
