"""A thread that writes checkpoints, one job at a time, while training continues."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs one job at a time. An error of the job is raised by the next `check` or `finish`."""

    def __init__(self) -> None:
        # The thread is kept: starting one blocks the caller until the system has scheduled it.
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self.job: Future[None] | None = None  # until its result was checked
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """Tell whether a job is running."""
        return self.job is not None and not self.job.done()

    def start(self, job: Callable[[], None]) -> None:
        """Start a job. The previous one must be done."""
        assert not self.busy, "the previous job must be done"
        try:
            self.job = self._executor.submit(self._run, job)
        except RuntimeError:  # the interpreter is shutting down: executors accept no jobs
            self.run(job)

    def run(self, job: Callable[[], None]) -> None:
        """Run a job on the calling thread. The previous one must be done.

        KeyboardInterrupt is raised at once.
        """
        assert not self.busy, "the previous job must be done"
        future: Future[None] = Future()
        try:
            self._run(job)
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        self.job = future

    def check(self) -> None:
        """Raise the error of a job that is done, once."""
        if self.job is not None and self.job.done():
            self._take_result()

    def finish(self) -> None:
        """Wait until the job is done, and raise its error."""
        if self.job is not None:
            wait([self.job])
            self._take_result()

    def close(self) -> None:
        """Wait until the job is done, and accept no more; its error is dropped."""
        self._executor.shutdown()

    def abandon(self) -> None:
        """Ask the job to give up, wait until it has, and accept no more."""
        self._abandoned.set()
        self.close()

    def abandoned(self) -> bool:
        """Tell the job whether to give up."""
        return self._abandoned.is_set()

    def _take_result(self) -> None:
        assert self.job is not None
        job = self.job
        self.job = None
        job.result()

    def _run(self, job: Callable[[], None]) -> None:
        if not self.abandoned():
            job()
