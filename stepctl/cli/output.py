"""Output that never holds up the thread that prints: another thread writes it, and drops what nobody reads.

A pipe whose reader hangs, or a terminal stopped by Ctrl-S, blocks whoever writes to it. `queue_output` puts a queue
in front of stdout and stderr; `drain_output` waits, for a bounded time, until the queues are empty.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from typing import Any, TextIO

import click

from stepctl.cli.options import WHOLE_PROCESS

_LIMIT = 1 << 20  # bytes that wait for a reader; what comes after them is dropped
_PIECE = 4096  # bytes of one write: at most PIPE_BUF, so that the progress of a slow reader can be seen
_PATIENCE = 0.5  # seconds without progress at the end, after which the reader is given up
_LONGEST = 5.0  # seconds at the end, however slowly it reads


class OutputQueue:
    """Writes to a descriptor in a thread of its own, in order; `put` never waits for the reader.

    Once more than `limit` bytes wait, everything is dropped until the reader has taken them. It then gets one line
    that says how many lines are missing there. A forked child writes without a queue: the thread is not in it.
    """

    def __init__(self, descriptor: int, limit: int = _LIMIT) -> None:
        self._descriptor, self._limit = descriptor, limit
        self._chunks = deque[bytes]()
        self._queued = 0  # bytes, with those of the write in flight
        self._written = 0  # bytes since the start
        self._dropped = 0  # lines since the queue was empty
        self._direct = False
        self._patience = _PATIENCE
        self._changed = threading.Condition()
        os.register_at_fork(after_in_child=self._continue_without_thread)
        threading.Thread(target=self._run, name="output", daemon=True).start()

    def put(self, data: bytes) -> None:
        """Queue some bytes, or count them as dropped."""
        if self._direct:
            self._write(data)
            return
        with self._changed:
            if self._dropped or (self._queued and self._queued + len(data) > self._limit):
                self._dropped += max(1, data.count(b"\n"))
                return
            self._chunks.append(data)
            self._queued += len(data)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything is written, for as long as the reader makes progress, but not for ever."""
        end = time.monotonic() + _LONGEST
        with self._changed:
            while self._waiting() and time.monotonic() < end:
                before = self._written
                # the progress within a chunk notifies nobody: it is looked at when the time is over
                self._changed.wait_for(lambda: not self._waiting(), self._patience)
                # a reader that takes more is not to blame: on a busy machine the writing thread has not run yet
                if self._written == before and not self._reader_takes_more():
                    self._patience = 0.0  # this reader was waited for: not again at the interpreter's exit
                    return

    def _waiting(self) -> bool:
        return not self._direct and bool(self._queued or self._dropped)

    def _reader_takes_more(self) -> bool:
        return bool(select.select([], [self._descriptor], [], 0)[1])

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        line_ended = True
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                data = self._chunks.popleft() if self._chunks else self._notice(line_ended)
            self._write(data)
            line_ended = data.endswith(b"\n")
            with self._changed:
                self._queued -= len(data)
                self._changed.notify_all()

    def _has_work(self) -> bool:
        return bool(self._chunks or self._dropped)

    def _notice(self, line_ended: bool) -> bytes:
        start = "" if line_ended else "\n"
        lines = "1 line" if self._dropped == 1 else f"{self._dropped:,} lines"
        data = f"{start}[{lines} dropped here: this output was not read for a while]\n".encode()
        self._dropped = 0
        self._queued += len(data)
        return data

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                count = os.write(self._descriptor, rest[:_PIECE])
            except BlockingIOError:  # another process made the pipe or the terminal non-blocking
                select.select([], [self._descriptor], [])
                continue
            except OSError:  # the reader is gone, or the disk is full: training goes on all the same
                return
            self._written += count
            rest = rest[count:]

    def _continue_without_thread(self) -> None:
        self._direct = True
        self._chunks.clear()  # the parent writes them
        self._changed = threading.Condition()  # another thread may have held the old one


class _QueuedFile(io.RawIOBase):
    """The binary file below a text stream whose output goes through a queue."""

    def __init__(self, queue: OutputQueue, descriptor: int, name: str) -> None:
        self._queue, self._descriptor, self.name = queue, descriptor, name

    def write(self, data: Any) -> int:
        self._queue.put(bytes(data))
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


_queues: list[OutputQueue] = []


def queue_output() -> None:
    """Put a queue in front of stdout and stderr; one for both where they are the same file, so that order is kept.

    Where a program calls the command, its streams are left alone.
    """
    if click.get_current_context().find_root().obj is not WHOLE_PROCESS:
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        descriptor = _descriptor(stream)
        if descriptor is None:
            continue
        stream.flush()
        shared = name == "stderr" and _queues and os.path.sameopenfile(1, 2)
        if not shared:
            _queues.append(OutputQueue(descriptor))
        file = _QueuedFile(_queues[-1], descriptor, f"<{name}>")
        buffer: Any = file  # all that a text stream for writing asks of it
        by_line = stream.line_buffering or stream.write_through  # the latter under PYTHONUNBUFFERED
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=by_line))
    atexit.register(drain_output)  # a traceback is printed after `main`


def _descriptor(stream: TextIO | None) -> int | None:
    """Return the descriptor that a stream writes to; None for no stream, or one that is in memory or queued."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream.buffer, _QueuedFile):
        return None
    try:
        return stream.fileno()
    except OSError:
        return None


def drain_output() -> None:
    """Wait until what was printed is written, or its reader is given up."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    for queue in _queues:
        queue.drain()
