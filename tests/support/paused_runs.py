"""A run that pauses at a chosen step, with its lock held, until the test continues it."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import Process, start, until
from tests.support.run_checks import Trial, ledger, make_trial, random_config

GATE_AT = 5  # step 4 is saved before, step 8 after
# A learning rate that waits for a file to appear: in the midst of training, and if asked when it is built for the
# so-manieth time. It may start a process that outlives its own, too.
_GATE = """
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from stepctl.optimizers.schedules import Schedule

def stay():
    while True:
        signal.pause()

def by_fork():
    pid = os.fork()
    return pid if pid else stay()

def by_command():
    return subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], close_fds=False).pid

built = 0

def wait_for(door):
    end = time.monotonic() + 600  # nobody will come
    while not os.path.exists(door) and time.monotonic() < end:
        time.sleep(0.001)

@dataclass(frozen=True, kw_only=True)
class Gate(Schedule):
    at: int

    def __post_init__(self):
        global built
        built += 1
        if built == int(os.environ.get("BUILD_AT", 0)):
            Path(os.environ["DOOR"] + "-waiting").touch()
            wait_for(os.environ["DOOR"] + "-built")

    def after_warmup(self, step: int) -> float:
        if step == self.at and "ORPHAN" in os.environ:
            pid = globals()[os.environ["ORPHAN"]]()
            Path(os.environ["ORPHAN_PID"]).write_text(f"{pid}\\n")
        if step == self.at and "DOOR" in os.environ:
            Path(os.environ["DOOR"] + "-reached").touch()
        if step == self.at:
            wait_for(os.environ.get("DOOR", "gate.py"))
        return 0.01
"""
ORPHANS = ("by_fork", "by_command")


@dataclass(frozen=True)
class Gated:
    """A trial whose processes wait at the gate for the door that they are given."""

    trial: Trial
    killed: Path  # a run that was killed at the gate

    def environment(self, run: Path) -> dict[str, str]:
        """Return what makes a process wait for the run's own door."""
        return {"DOOR": str(run.with_name("door"))}

    def open(self, run: Path) -> None:
        """Continue the run."""
        run.with_name("door").touch()

    def start(self, arguments: Sequence[object], run: Path, **variables: str) -> Process:
        """Start a process that waits at the gate."""
        return start(arguments, cwd=self.trial.folder, env=self.environment(run) | variables)

    @contextlib.contextmanager
    def building(self, arguments: Sequence[object], run: Path, at: int) -> Iterator[Process]:
        """Start a process, and return once it waits in its n-th construction of the gate."""
        with self.start(arguments, run, BUILD_AT=str(at)) as process:
            until(lambda: run.with_name("door-waiting").exists() or not process.running())
            yield process

    def let_build(self, run: Path) -> None:
        """Continue a process that waits in a construction."""
        run.with_name("door-built").touch()

    def copy_of_killed(self, number: object) -> Path:
        """Return a run as one that was killed left it, its lock file included."""
        run = self.trial.new_run(number)
        shutil.copytree(self.killed, run)
        return run


def make_gated(folder: Path, chance: random.Random, **sections: Any) -> Gated:
    """Make a small config with a gate, its undisturbed run, and one that was killed at the gate."""
    folder.mkdir()
    (folder / "gate.py").write_text(_GATE)
    config = random_config(
        chance,
        initial_step=0,
        optimizer={"name": "adam", "learning_rate": {"name": "gate:Gate", "at": GATE_AT}},
        stop={"last_step": 9},
        log={"every": 1},
        checkpoint={"every": 4, "keep_last": 2},
    )
    trial = make_trial(folder, config | sections)
    gated = Gated(trial, trial.new_run("killed"))
    with gated.start(trial.begin(gated.killed), gated.killed) as child:
        until(lambda: at_the_gate(gated.killed))
        child.kill()
        assert child.wait() == -9, child.said()
    return gated


def at_the_gate(run: Path) -> bool:
    """Tell whether a run has come to the gate, and all that it is to save before is saved."""
    arrived = run.with_name("door-reached").exists()
    return arrived and GATE_AT - 1 in (line["step"] for line in ledger(run, "checkpoint"))
