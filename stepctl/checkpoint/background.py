"""One job at a time on a thread of its own, so that training goes on while a checkpoint is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs a job; what it raised reaches the thread that looks next."""

    def __init__(self) -> None:
        # one thread that stays: to start one holds the caller until the system has run it
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self.job: Future[None] | None = None  # until somebody has looked at its end
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """Tell whether a job is being done."""
        return self.job is not None and not self.job.done()

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, once the one before is finished."""
        assert not self.busy, "the job before must be finished"
        try:
            self.job = self._executor.submit(self._run, job)
        except RuntimeError:  # the interpreter ends, and takes no more for another thread
            self.job = _done(self._run, job)

    def check(self) -> None:
        """Raise the error of a job that has ended, once."""
        if self.job is not None and self.job.done():
            ended, self.job = self.job, None
            ended.result()

    def finish(self) -> None:
        """Wait until the job is done; raise its error if it had one."""
        if self.job is not None:
            wait([self.job])
            ended, self.job = self.job, None
            ended.result()

    def close(self) -> None:
        """Wait until the job is done, and take no more; its error is nobody's any more."""
        self._executor.shutdown()

    def abandon(self) -> None:
        """Have the job give up, wait until it has, and take no more."""
        self._abandoned.set()
        self.close()

    def abandoned(self) -> bool:
        """Tell the job whether it should give up."""
        return self._abandoned.is_set()

    def _run(self, job: Callable[[], None]) -> None:
        if not self.abandoned():
            job()


def _done(function: Callable[[Callable[[], None]], None], job: Callable[[], None]) -> Future[None]:
    future: Future[None] = Future()
    try:
        function(job)
        future.set_result(None)
    except BaseException as error:
        future.set_exception(error)
    return future
