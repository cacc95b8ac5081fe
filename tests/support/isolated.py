"""Run a function in a separate process with its own mounts, limits and children.

    outcome = apart(attack, tmp_path, seed)    # returns or raises as the function does

A command forked off a process that has run one before starts within milliseconds, and is otherwise
an ordinary process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import pytest

from tests.support import processes  # noqa: F401  (it says what the server loads before it forks)

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Refused(Exception):
    """The machine does not let an attack be made; the test is skipped."""


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), called in a separate process; Refused skips the test."""
    server = multiprocessing.get_context("forkserver")
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        kind = "error"
        value = "it ended without an answer"
    process.join()
    if kind == "refused":
        pytest.skip(value)
    if kind == "error":
        pytest.fail(value, pytrace=False)
    return value


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = "value", function(*arguments)
    except Refused as error:
        answer = "refused", str(error)
    except BaseException:
        answer = "error", traceback.format_exc()
    sender.send(answer)


def nothing() -> None:
    """Do nothing."""


def ended(pid: int) -> int:
    """Wait for a forked process; return its exit code, or -N if signal N ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork(words: Sequence[object], before: Callable[[], None] = nothing) -> tuple[int, int]:
    """Fork `stepctl *words`, which calls `before` first; return its pid and its output's descriptor."""
    hearing, saying = os.pipe()
    pid = os.fork()
    if not pid:
        _become(words, saying, before)
    os.close(saying)
    return pid, hearing


def command(
    words: Sequence[object],
    before: Callable[[], None] = nothing,
    follow: Callable[[int], int] = ended,
) -> tuple[int, str]:
    """Run `stepctl *words` to its end; return its exit code and its short output."""
    pid, hearing = fork(words, before)
    code = follow(pid)
    with open(hearing) as file:
        return code, file.read()


def warm_up(words: Sequence[object]) -> None:
    """Run `stepctl *words` in this process, so that commands forked later find modules loaded."""
    from stepctl.cli.main import cli

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    code = cli.main([str(word) for word in words], prog_name="stepctl", standalone_mode=False)
    assert code in (0, None), f"exit code {code}"
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    gc.freeze()  # the forks share what is here


def _become(words: Sequence[object], saying: int, before: Callable[[], None]) -> NoReturn:
    code = 70
    try:
        for number in (1, 2):
            os.dup2(saying, number)
        os.close(saying)
        sys.argv = ["stepctl", *map(str, words)]
        before()
        from stepctl.__main__ import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
