"""As process 1 of a container, where no signal has a default action and every run has the same pid."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest

from tests.support.paused_runs import GATE_AT, Gated, at_the_gate, make_gated
from tests.support.processes import start_cold, until
from tests.support.run_checks import acknowledged, assert_nothing_lost, checkpoints, ledger

Figure = Callable[[str, int], None]
STOPPED, IN_USE = 75, 4
LONG = pytest.mark.faults
ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.fixture(autouse=True, scope="module")
def _namespaces() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("process 1: unshare (util-linux) is not there")
    done = subprocess.run([*ALONE, "true"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"process 1: no right to make a pid namespace ({done.stderr.strip()})")


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    return make_gated(tmp_path_factory.mktemp("first") / "gated", random.Random(1))


class First:
    """`stepctl` as process 1 of a namespace of its own, below a process that ends as it does."""

    def __init__(self, gated: Gated, run: Path, *arguments: object) -> None:
        self.outer = start_cold(
            arguments, cwd=gated.trial.folder, env=gated.environment(run), before=ALONE
        )
        self._descriptor = os.pidfd_open(until(self._pid))

    def __enter__(self) -> First:
        return self

    def __exit__(self, *_: object) -> None:
        self.outer.__exit__()  # and what is below it is killed with it
        os.close(self._descriptor)

    def kill(self, number: int) -> None:
        """Send process 1 a signal from the outside, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def wait(self) -> int:
        return self.outer.wait()

    def said(self) -> str:
        return self.outer.said()

    def _pid(self) -> int:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, _, rest = path.read_text().partition(" ")
                if int(rest.rpartition(")")[2].split()[1]) == self.outer.pid:
                    return int(pid)
        return 0


@pytest.mark.parametrize(
    "number", [SIGTERM, pytest.param(SIGINT, marks=LONG), pytest.param(SIGUSR1, marks=LONG)]
)
def test_a_signal_to_process_1_stops_it_with_a_durable_checkpoint(
    number: signal.Signals, gated: Gated, tmp_path: Path, figure: Figure
) -> None:
    run = gated.trial.new_run(tmp_path.name)
    with First(gated, run, *gated.trial.begin(run)) as first:
        until(lambda: at_the_gate(run))
        first.kill(number)
        gated.open(run)
        assert first.wait() == STOPPED, first.said()
        newest = max(checkpoints(run))
        assert f"stopped at global step {newest} (signal {number.name})" in first.said()
    assert newest in (GATE_AT, GATE_AT + 1)
    assert_nothing_lost(run, gated.trial.keep_last)
    with First(gated, run, "resume", run) as first:
        assert first.wait() == 0, first.said()
        assert "stale lock" not in first.said()
    assert [line["pid"] for line in ledger(run, "start")] == [1, 1]
    gated.trial.assert_finished(run)
    figure("signals to process 1", 1)


def test_the_lock_of_a_killed_process_1_does_not_bar_the_next(
    gated: Gated, tmp_path: Path, figure: Figure
) -> None:
    run = gated.trial.new_run(tmp_path.name)
    with First(gated, run, *gated.trial.begin(run)) as first:
        until(lambda: at_the_gate(run))
        with First(gated, run, "resume", run) as second:
            assert second.wait() == IN_USE, second.said()
            assert f"{run}: in use by process 1 on {socket.gethostname()}; " in second.said()
        first.kill(signal.SIGKILL)
        assert first.wait() != 0
    assert_nothing_lost(run, gated.trial.keep_last)
    gated.open(run)
    with First(gated, run, "resume", run) as first:
        assert first.wait() == 0, first.said()
        assert "process 1 on" in first.said()
        assert "removed a stale lock" in first.said()
    gated.trial.assert_finished(run)
    figure("kills", 1)


@pytest.mark.faults
def test_a_process_1_that_is_signalled_all_the_time_stops_with_a_durable_checkpoint(
    gated: Gated, tmp_path: Path
) -> None:
    run = gated.trial.new_run(tmp_path.name)
    with First(gated, run, *gated.trial.begin(run)) as first:
        until(lambda: list(acknowledged(run)))  # before training begins, a signal ends it at once
        while first.outer.running(after=0.001):
            first.kill(SIGTERM)
        assert first.wait() == STOPPED, first.said()
    assert_nothing_lost(run, gated.trial.keep_last)
    assert list(acknowledged(run))
    gated.trial.finish(run)
