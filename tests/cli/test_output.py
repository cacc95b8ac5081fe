"""A stalled reader of stderr delays neither training nor signals, and dropped lines are counted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stepctl
from stepctl.checkpoint import names
from stepctl.cli import output_queue
from stepctl.cli.output_queue import OutputQueue
from stepctl.config import yaml
from tests.support.runs import BASE

pytestmark = pytest.mark.usefixtures("in_tmp_path")

COMMAND = [sys.executable, "-m", "stepctl"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(stepctl.__file__).parents[1]),
    "TERM": "xterm-256color",
}
FOREVER = 1_000_000_000
DEADLINE = 60  # seconds: only a hang comes near it


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def fill(descriptor: int) -> int:
    """Write to a pipe until it takes no more; return how many bytes that were."""
    os.set_blocking(descriptor, False)
    count = 0
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                count += os.write(descriptor, b"x" * size)
    os.set_blocking(descriptor, True)
    return count


def read_exactly(descriptor: int, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += os.read(descriptor, count - len(found))
    return found


def read_until(descriptor: int, end: bytes) -> bytes:
    found = b""
    while not found.endswith(end):
        found += os.read(descriptor, 1)
    return found


# --- the queue


def test_lines_come_in_order_and_none_is_lost(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    queue = OutputQueue(writer)
    lines = [f"line {i}\n".encode() * (i % 50 + 1) for i in range(2000)]
    sender = threading.Thread(target=lambda: [queue.put(line) for line in lines])
    sender.start()
    assert read_exactly(reader, sum(map(len, lines))) == b"".join(lines)
    sender.join()


def test_a_non_blocking_pipe_loses_nothing_either(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    full = fill(writer)
    os.set_blocking(writer, False)
    queue = OutputQueue(writer)
    queue.put(b"the end\n")
    assert read_exactly(reader, full) == b"x" * full
    assert read_until(reader, b"\n") == b"the end\n"


@pytest.mark.parametrize(("n_dropped", "words"), [(1, b"1 line"), (2345, b"2,345 lines")])
def test_a_stalled_reader_gets_the_count_and_place_of_the_missing_lines(
    n_dropped: int, words: bytes, pipe: tuple[int, int]
) -> None:
    reader, writer = pipe
    full = fill(writer)
    queue = OutputQueue(writer, limit=100)
    queue.put(b"first\n" + b"y" * 80)
    for _ in range(n_dropped):
        queue.put(b"a line that finds no room\n")
    assert read_exactly(reader, full) == b"x" * full
    assert read_until(reader, b"a while]\n") == (
        b"first\n"
        + b"y" * 80
        + b"\n["
        + words
        + b" dropped here: this output was not read for a while]\n"
    )
    queue.put(b"next\n")
    assert read_until(reader, b"next\n") == b"next\n"


def test_a_line_longer_than_the_queue_is_not_dropped(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    queue = OutputQueue(writer, limit=10)
    queue.put(b"z" * 200_000)
    assert read_exactly(reader, 200_000) == b"z" * 200_000


def test_a_reader_that_takes_all_is_waited_for_however_late_the_writing_thread_runs(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    may_write = threading.Event()
    looks = itertools.count(1)
    write, look = os.write, select.select

    def write_late(descriptor: int, data: bytes) -> int:
        may_write.wait(DEADLINE)
        return write(descriptor, data)

    def look_and_let_write(*arguments: Any) -> Any:
        if next(looks) == 3:
            may_write.set()
        return look(*arguments)

    monkeypatch.setattr(output_queue, "_STALL_SECONDS", 0.01)
    monkeypatch.setattr(output_queue.os, "write", write_late)
    monkeypatch.setattr(output_queue.select, "select", look_and_let_write)
    queue = OutputQueue(writer)
    queue.put(b"last words\n")
    queue.drain()
    monkeypatch.undo()
    arrived = bool(select.select([reader], [], [], 0)[0])
    may_write.set()
    assert arrived


@pytest.mark.process
def test_a_forked_child_writes_what_it_prints_and_nothing_else(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    full = fill(writer)
    queue = OutputQueue(writer)
    queue.put(b"parent\n")  # still queued when the child is forked
    pid = os.fork()
    if pid == 0:
        queue.put(b"child\n")
        queue.drain()
        os._exit(0)
    assert read_exactly(reader, full) == b"x" * full
    found = read_until(reader, b"\n") + read_until(reader, b"\n")
    assert sorted(found.splitlines()) == [b"child", b"parent"]
    assert os.waitpid(pid, 0)[1] == 0


# --- training

TALKATIVE = """
from dataclasses import dataclass
from stepctl.optimizers.schedules import Schedule

@dataclass(frozen=True, kw_only=True)
class Talkative(Schedule):
    def after_warmup(self, step: int) -> float:
        print("a user's own line, to stdout", flush=True)
        return 0.1
"""


def write_config(**sections: Any) -> str:
    data = {"name": "digits", "batch_size": 8}
    config = BASE | {"data": data, "log": {"every": 1}, "evaluate": {"every": None}}
    Path("c.yaml").write_text(yaml.dumps(config | {"stop": {"last_step": FOREVER}} | sections))
    return "c.yaml"


@contextlib.contextmanager
def training(*arguments: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    command = [*COMMAND, *arguments, "--run-dir", "run"]
    with subprocess.Popen(command, env=ENVIRONMENT, **streams) as child:
        watchdog = threading.Timer(DEADLINE, child.kill)
        watchdog.start()
        try:
            yield child
        finally:
            watchdog.cancel()
            child.kill()


def wait_for_rows(child: subprocess.Popen[bytes], count: int) -> None:
    """Wait until a run has written so many rows."""
    rows = Path("run/metrics.jsonl")
    while not rows.exists() or rows.read_bytes().count(b"\n") < count:
        assert child.poll() is None, "it ended, or was killed because it stalled"
        time.sleep(0.005)


def assert_stopped_with_a_checkpoint(child: subprocess.Popen[bytes]) -> None:
    assert child.wait() == 75
    end = json.loads(Path("run/ledger.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["reason"]) == ("end", "signal SIGTERM")
    assert (Path("run/checkpoints") / names.file_name(end["step"])).exists()


@pytest.mark.process
def test_training_continues_and_answers_signals_when_nobody_reads_a_full_pipe(
    pipe: tuple[int, int],
) -> None:
    """Neither what stepctl says nor what a user's model prints may wait for a reader."""
    fill(pipe[1])
    Path("talkative.py").write_text(TALKATIVE)
    name = write_config(optimizer={"name": "sgd", "learning_rate": {"name": "talkative:Talkative"}})
    with training("train", "--config", name, stdout=pipe[1], stderr=pipe[1]) as child:
        wait_for_rows(child, 50)
        child.send_signal(signal.SIGTERM)
        assert_stopped_with_a_checkpoint(child)


@pytest.mark.process
def test_training_continues_and_answers_signals_when_the_terminal_is_stopped() -> None:
    """As by Ctrl-S, while the progress bar is shown."""
    ours, theirs = pty.openpty()
    termios.tcflow(theirs, termios.TCOOFF)
    try:
        with training("train", "--config", write_config(), "-v", stderr=theirs) as child:
            wait_for_rows(child, 50)
            child.send_signal(signal.SIGTERM)
            assert_stopped_with_a_checkpoint(child)
    finally:
        os.close(theirs)
        os.close(ours)


@pytest.mark.process
def test_all_output_is_written_before_a_command_ends() -> None:
    with training(
        "train", "--config", write_config(stop={"last_step": 300}), stderr=subprocess.PIPE
    ) as child:
        assert child.stderr is not None
        said = child.stderr.read().decode().splitlines()
    assert [int(line[5 : line.index("/")]) for line in said if "  epoch " in line] == list(
        range(1, 301)
    )
    assert (said[0], said[-1]) == (
        "run: global step 0 to 300, from the initial state",
        "run: done at global step 300",
    )


@pytest.mark.process
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_is_written_at_once(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "PYTHONUNBUFFERED", unbuffered)
    with training(
        "train", "--config", write_config(log={"every": FOREVER}), stderr=subprocess.PIPE
    ) as child:
        assert child.stderr is not None
        assert (
            child.stderr.readline() == b"run: global step 0 to 1000000000, from the initial state\n"
        )
        assert child.poll() is None


@pytest.mark.process
def test_a_traceback_that_python_prints_at_its_exit_is_printed_too() -> None:
    name = write_config(data={"name": "arrays", "path": "nowhere.npz", "batch_size": 8})
    command = [*COMMAND, "--debug", "train", "--config", name]
    done = subprocess.run(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=DEADLINE
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert re.search(r"DataError: .*nowhere\.npz: no such file; .*\n$", done.stderr)
