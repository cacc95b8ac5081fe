"""Leftover lock files never block a run, and never admit a second process."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paused_runs import ORPHANS, Gated, make_gated
from tests.support.processes import start, until
from tests.support.run_checks import ledger

DONE, IN_USE, STOPPED = 0, 4, 75


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    return make_gated(tmp_path_factory.mktemp("locks") / "gated", random.Random(1))


@pytest.fixture
def run(gated: Gated, tmp_path: Path) -> Path:
    """A run that was killed, for this test alone."""
    return gated.copy_of_killed(tmp_path.name)


def some(names: Iterable[str], quick: str) -> list[Any]:
    """Return the names as parameters of which only the quick one is not a long attack."""
    return [
        pytest.param(name, marks=[] if name == quick else [pytest.mark.faults]) for name in names
    ]


def resume(gated: Gated, run: Path, *more: object, code: int = DONE) -> str:
    """Resume a run whose door is no hindrance; return what it said."""
    with start(["resume", run, *more], cwd=gated.trial.folder) as child:
        assert child.wait() == code, child.said()
        return child.said()


def test_taking_over_from_a_killed_holder_is_reported_once(gated: Gated, run: Path) -> None:
    (dead,) = (line["pid"] for line in ledger(run, "start"))
    words = f"{run}: removed a stale lock left by process {dead} on {socket.gethostname()}"
    assert resume(gated, run).splitlines()[0] == words
    gated.trial.assert_finished(run)
    assert "stale lock" not in resume(gated, run, "--num-steps", 1)


# --- what a lock file may hold


def rewritten(run: Path, **facts: object) -> str:
    return json.dumps(json.loads((run / "lock").read_text()) | facts)


LOCKS: dict[str, Callable[[Path], str]] = {
    "the pid of a process that lives": lambda run: rewritten(run, pid=os.getpid()),
    "the pid of a process that is gone": lambda run: rewritten(
        run, pid=ledger(run, "start")[0]["pid"]
    ),
    "the pid of the first process": lambda run: rewritten(run, pid=1),
    "another host": lambda run: rewritten(run, host="elsewhere", pid=os.getpid()),
    "another boot": lambda run: rewritten(run, boot_id="before", pid=os.getpid()),
    "no pid": lambda run: rewritten(run, pid=None),
    "an odd pid": lambda run: rewritten(run, pid=-1),
    "a huge pid": lambda run: rewritten(run, pid=1 << 80),
    "nothing": lambda run: "",
    "half a line": lambda run: (run / "lock").read_text()[:20],
    "another thing": lambda run: "[1, 2]\n",
    "no text": lambda run: "\0\ufffd" * 5000,
}


@pytest.mark.parametrize("left", some(LOCKS, "the pid of a process that lives"))
def test_a_leftover_lock_file_blocks_no_run(left: str, gated: Gated, run: Path) -> None:
    (run / "lock").write_text(LOCKS[left](run))
    resume(gated, run)
    gated.trial.assert_finished(run)


@pytest.mark.parametrize("forged", some(LOCKS, "the pid of a process that is gone"))
def test_the_content_of_a_lock_file_admits_no_second_process(
    forged: str, gated: Gated, run: Path
) -> None:
    with gated.start(["resume", run], run) as holder:
        until(lambda: len(ledger(run, "start")) == 2)
        (run / "lock").write_text(LOCKS[forged](run))
        assert ": in use by " in resume(gated, run, code=IN_USE)
        gated.open(run)
        assert holder.wait() == DONE, holder.said()
    gated.trial.assert_finished(run)


# --- processes that a run left behind


ENDS = {"killed": (signal.SIGKILL, -9), "stopped": (signal.SIGTERM, STOPPED), "finished": (0, DONE)}


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Path]:
    """The file into which a process that outlives its run writes its pid; it is ended with the test."""
    path = tmp_path / "orphan"
    yield path
    if path.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("how", some(ORPHANS, "by_fork"))
@pytest.mark.parametrize("end", some(ENDS, "killed"))
def test_a_child_that_outlives_its_run_does_not_bar_it(
    how: str, end: str, gated: Gated, run: Path, orphan: Path
) -> None:
    number, code = ENDS[end]
    with gated.start(["resume", run], run, ORPHAN=how, ORPHAN_PID=str(orphan)) as parent:
        until(
            lambda: not parent.running() or (orphan.exists() and orphan.read_text().endswith("\n"))
        )
        assert ": in use by " in resume(gated, run, code=IN_USE)
        parent.kill(number)
        gated.open(run)
        assert parent.wait() == code, parent.said()
    os.kill(int(orphan.read_text()), 0)  # it lives
    resume(gated, run)
    gated.trial.assert_finished(run)
