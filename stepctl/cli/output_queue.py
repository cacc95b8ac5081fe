"""Queues in front of stdout and stderr, so that a slow reader never delays the thread that prints.

A pipe whose reader hangs, or a terminal stopped by Ctrl-S, blocks its writer. `queue_output` lets a
thread do the writing; `drain_output` waits, for a bounded time, until the queues are empty.
"""

import atexit
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

from stepctl.cli.interrupts import WHOLE_PROCESS
from stepctl.cli.output import redirect_to_null
from stepctl.system.text import counted

_LIMIT = 1 << 20  # bytes that may wait; later ones are dropped
_CHUNK = 4096  # bytes of one write, at most PIPE_BUF: shows the progress of a slow reader
_STALL_SECONDS = 0.5  # without progress, after which `drain` gives up
_DRAIN_SECONDS = 5.0  # after which `drain` gives up in any case


class OutputQueue:
    """Writes to a descriptor in a thread of its own, in order; `put` never waits for the reader.

    When more than `limit` bytes wait, everything is dropped until the reader has taken them. It
    then gets one line with the number of lines that are missing. A forked child, which lacks the
    thread, writes directly.
    """

    def __init__(self, descriptor: int, limit: int = _LIMIT) -> None:
        self._descriptor = descriptor
        self._limit = limit
        self._chunks = deque[bytes]()
        self._queued = 0  # bytes, including the write in flight
        self._written = 0  # bytes since the start
        self._dropped = 0  # lines since the queue was empty
        self._direct = False
        self._stall_seconds = _STALL_SECONDS
        self._changed = threading.Condition()
        os.register_at_fork(after_in_child=self._continue_without_thread)
        threading.Thread(target=self._run, name="output", daemon=True).start()

    def put(self, data: bytes) -> None:
        """Queue some bytes, or count them as dropped."""
        if self._direct:
            self._write(data)
            return
        with self._changed:
            is_full = self._queued > 0 and self._queued + len(data) > self._limit
            if self._dropped or is_full:
                self._dropped += max(1, data.count(b"\n"))
                return
            self._chunks.append(data)
            self._queued += len(data)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything is written, while the reader makes progress, for a bounded time."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        with self._changed:
            while self._is_waiting() and time.monotonic() < deadline:
                before = self._written
                # progress within a chunk notifies nobody, so it is compared after the timeout
                self._changed.wait_for(lambda: not self._is_waiting(), self._stall_seconds)
                # on a busy machine the thread may not have run, though the reader is ready
                if self._written == before and not self._is_reader_ready():
                    self._stall_seconds = 0.0  # do not wait again at the interpreter's exit
                    return

    def _is_waiting(self) -> bool:
        return not self._direct and bool(self._queued or self._dropped)

    def _is_reader_ready(self) -> bool:
        return bool(select.select([], [self._descriptor], [], 0)[1])

    def _run(self) -> None:
        # signals are handled by the main thread
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        line_ended = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._chunks or self._dropped))
                data = self._chunks.popleft() if self._chunks else self._take_notice(line_ended)
            self._write(data)
            line_ended = data.endswith(b"\n")
            with self._changed:
                self._queued -= len(data)
                self._changed.notify_all()

    def _take_notice(self, line_ended: bool) -> bytes:
        """Return the line about dropped lines, and reset their count."""
        notice = f"[{counted(self._dropped, 'line')} dropped here: this output was not read for a while]\n"
        if not line_ended:
            notice = f"\n{notice}"
        data = notice.encode()
        self._dropped = 0
        self._queued += len(data)
        return data

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                count = os.write(self._descriptor, rest[:_CHUNK])
            except BlockingIOError:  # another process made the pipe or the terminal non-blocking
                select.select([], [self._descriptor], [])
                continue
            except OSError:
                return  # the reader has left, or the disk is full: training continues
            self._written += count
            rest = rest[count:]

    def _continue_without_thread(self) -> None:
        self._direct = True
        self._chunks.clear()  # the parent writes them
        self._changed = threading.Condition()  # another thread may have held the old one


class _QueuedFile(io.RawIOBase):
    """The binary file of a text stream whose output goes through a queue."""

    def __init__(self, queue: OutputQueue, descriptor: int, name: str) -> None:
        self.name = name
        self._queue = queue
        self._descriptor = descriptor

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
    """Put a queue in front of stdout and stderr: one for both if they are the same file.

    The streams of a program that calls the command as a function are left alone.
    """
    if click.get_current_context().find_root().obj is not WHOLE_PROCESS:
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        descriptor = _descriptor_of(stream)
        if descriptor is None:
            continue
        stream.flush()
        is_shared = name == "stderr" and _queues and os.path.sameopenfile(1, 2)
        if not is_shared:
            _queues.append(OutputQueue(descriptor))
        file: Any = _QueuedFile(_queues[-1], descriptor, f"<{name}>")
        # `write_through` is set by PYTHONUNBUFFERED
        line_buffering = stream.line_buffering or stream.write_through
        queued = io.TextIOWrapper(
            file, stream.encoding, stream.errors, line_buffering=line_buffering
        )
        setattr(sys, name, queued)
    atexit.register(drain_output)  # a traceback is printed after `main`


def _descriptor_of(stream: TextIO | None) -> int | None:
    """Return the descriptor of a stream; None if it has none, or is queued already."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream.buffer, _QueuedFile):
        return None
    try:
        return stream.fileno()
    except OSError:
        return None


def drain_output() -> None:
    """Wait until the output is written, for a bounded time.

    What cannot be written is discarded, or Python's own flush would set exit code 120.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                redirect_to_null(stream.fileno())
    for queue in _queues:
        queue.drain()
