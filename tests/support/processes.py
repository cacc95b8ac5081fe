"""`stepctl` processes that start within milliseconds, forked off a server with all imports done.

    with start(["train", "--config", "c.yaml"], cwd=tmp_path) as child:
        child.kill(signal.SIGTERM)
        assert child.wait() == 75

A child has its own pid, descriptors, folder, environment and signal handlers, and inherits none
from the test. It ends as `python -m stepctl` ends. `start_cold` starts an interpreter instead,
which takes half a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import stepctl

DEADLINE = 120.0  # seconds: only a hang comes near it
ROOT = Path(stepctl.__file__).parents[1]
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
_MODULES = [
    found.name
    for found in pkgutil.walk_packages(stepctl.__path__, "stepctl.")
    if "__main__" not in found.name
]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [__name__, *_MODULES, "threadpoolctl", "rich.console", "rich.progress", "tests.support.preload"]
)


class Process:
    """A started process. As a context manager it is killed at the end, if it still runs."""

    def __init__(
        self, pid: int, descriptor: int, wait: Callable[[float], int | None], output: Path
    ) -> None:
        self.pid = pid
        self.output = output
        self._descriptor = descriptor
        self._wait = wait
        self._code: int | None = None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        os.close(self._descriptor)

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal; return whether the process still existed. It never reaches another one."""
        if self._code is not None:
            return False
        try:
            signal.pidfd_send_signal(self._descriptor, number)
        except ProcessLookupError:
            return False
        return True

    def running(self, after: float = 0.0) -> bool:
        """Tell whether it still runs after some seconds; return False as soon as it ends."""
        return not select.select([self._descriptor], [], [], after)[0]

    def wait(self, timeout: float = DEADLINE) -> int:
        """Return the exit code, -N for signal N; TimeoutError with its output if it does not end."""
        if self._code is None:
            self._code = self._wait(timeout)
        if self._code is None:
            raise TimeoutError(
                f"process {self.pid} still runs after {timeout} s; it said: {self.said()}"
            )
        return self._code

    def said(self) -> str:
        """Return all that it has written to stdout and stderr so far."""
        return self.output.read_text(errors="replace")


class Held(Process):
    """A process that waits before its first line until `release`."""

    def __init__(self, door: Connection, *rest: Any) -> None:
        super().__init__(*rest)
        self._door = door

    def release(self) -> None:
        """Let it go."""
        self._door.send(None)
        self._door.close()


def hold(
    arguments: Sequence[object],
    *,
    cwd: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    output: str | os.PathLike[str] | None = None,
    call: Callable[[], None] | None = None,
) -> Held:
    """Fork a process for `stepctl *arguments` that waits to be released.

    `env` is added to the environment; `output` takes stdout and stderr (by default
    a file of its own in `cwd`). Another function of a module that the server can import may be called instead.
    """
    path = _output_file(Path(cwd), output)
    door, inside = multiprocessing.Pipe()
    words = [str(argument) for argument in arguments]
    process = _server.Process(
        target=_enter,
        args=(inside, words, os.fspath(cwd), dict(env or {}), os.fspath(path), call),
        daemon=True,
    )
    process.start()
    inside.close()
    assert door.poll(DEADLINE), "a forked process never came to its first line"
    pid = door.recv()

    def wait(timeout: float) -> int | None:
        process.join(timeout)
        return process.exitcode

    return Held(door, pid, os.pidfd_open(pid), wait, path)


def start(arguments: Sequence[object], **options: Any) -> Process:
    """Start `stepctl *arguments`, as `hold` does, and let it go at once."""
    process = hold(arguments, **options)
    process.release()
    return process


def start_cold(
    arguments: Sequence[object],
    *,
    cwd: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    output: str | os.PathLike[str] | None = None,
    before: Sequence[str] = (),
    program: Sequence[object] = ("-m", "stepctl"),
) -> Process:
    """Start `python *program *arguments` in a new interpreter, prefixed by the command `before`."""
    path = _output_file(Path(cwd), output)
    command = [*before, sys.executable, *map(str, (*program, *arguments))]
    with open(path, "ab") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=_environment(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )

    def wait(timeout: float) -> int | None:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    return Process(process.pid, os.pidfd_open(process.pid), wait, path)


def until(condition: Callable[[], Any], deadline: float = DEADLINE, every: float = 0.0005) -> Any:
    """Return the condition's first true value; AssertionError if none comes before the deadline."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"still false after {deadline} s: {condition}"
        time.sleep(every)
    return value


def _enter(
    inside: Connection,
    words: list[str],
    cwd: str,
    env: dict[str, str],
    output: str,
    call: Callable[[], None] | None,
) -> None:
    """Become what a shell would have started, wait at the door, and run."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    os.chdir(cwd)
    environment = _environment(env)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["stepctl", *words]
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            inside.send(os.getpid())
            inside.recv()
            inside.close()
            (call or _stepctl)()
        finally:  # as the interpreter does at its end
            if callable(signal.getsignal(signal.SIGINT)):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        while True:  # another may come before it is out of Python's hands
            try:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass


def rows_at_once() -> None:
    """A `call` for `stepctl` that writes each row at once, so that its progress is seen."""
    from stepctl.writers import row_buffer

    row_buffer.HOLD_SECONDS = 0.0
    _stepctl()


def _stepctl() -> None:
    from stepctl.__main__ import main

    main()


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def _output_file(folder: Path, name: str | os.PathLike[str] | None) -> Path:
    return folder / (name or f"said-{time.monotonic_ns()}.txt")
