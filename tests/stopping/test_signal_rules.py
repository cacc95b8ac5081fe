"""Which signals stop a training, which are ignored, and the exit codes for schedulers."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import stepctl
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import create_run, resume_run
from stepctl.state.train_state import TrainState
from stepctl.stopping.rules import TimeLimit
from tests.support.mpi_jobs import environment
from tests.support.runs import BASE, make_config, resume, train
from tests.support.user_model import TwoLayers

README = (Path(stepctl.__file__).parent / "cli" / "README.md").read_text()
SIGNALS = [
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGXCPU,
]


def write(folder: Path, **sections: Any) -> None:
    (folder / "config.yaml").write_text(json.dumps(BASE | sections))


def command(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "stepctl",
        *arguments,
        "--config",
        "config.yaml",
        "--run-dir",
        "run",
    ]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )


class Signalled(TwoLayers):
    """Sends its own process a signal at each training pass, one after another, and then SIGTERM."""

    def __init__(self, *, numbers: list[int], input_shape: Any, n_outputs: int) -> None:
        super().__init__(input_shape=input_shape, n_outputs=n_outputs)
        self.numbers = iter([0, *numbers, signal.SIGTERM])  # the first pass is a trial

    def forward(self, params: Any, x: Any, workspace: Any) -> Any:
        if workspace.rng is not None:
            os.kill(os.getpid(), next(self.numbers))
        return super().forward(params, x, workspace)


# --- a terminal that goes


class Tells(TwoLayers):
    """Says on stderr that it is in a training pass."""

    def forward(self, params: Any, x: Any, workspace: Any) -> Any:
        if workspace.rng is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"[in a pass]")
        return super().forward(params, x, workspace)


def take_the_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.process
def test_a_terminal_that_is_closed_stops_with_a_durable_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, model={"name": f"{__name__}:Tells"}, stop={"last_step": 10**9})
    terminal, inside = pty.openpty()
    ends = {"stdin": inside, "stdout": inside, "stderr": inside}
    with subprocess.Popen(
        command("train"),
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,
        preexec_fn=take_the_terminal,
        **ends,
    ) as process:
        try:
            os.close(inside)
            said = b""
            while said.count(b"[in a pass]") < 5:
                said += os.read(terminal, 1 << 16)
            os.close(terminal)
            assert process.wait(60) == 75
        finally:
            process.kill()
    end = RunDirectory(tmp_path / "run").read_ledger().events[-1]
    assert end["reason"] == "signal SIGHUP"
    assert (tmp_path / "run" / "checkpoints" / f"step-{end['step']:08d}.h5").exists()


# --- ignored at the start


@pytest.mark.process
def test_signals_ignored_at_the_start_stay_ignored(tmp_path: Path) -> None:
    """As by nohup, and in a shell script's background job, where Ctrl-C is meant for others."""
    numbers = [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    write(
        tmp_path,
        model={
            "name": f"{__name__}:Signalled",
            "numbers": [int(number) for number in numbers],
        },
    )
    done = run(
        ["sh", "-c", 'trap "" INT HUP USR1 USR2; exec "$@"', "sh", *command("train")], tmp_path
    )
    assert done.returncode == 75, done.stderr
    assert f"stopped at global step {len(numbers) + 1} (signal SIGTERM)" in done.stderr
    saves = [
        row["step"]
        for row in RunDirectory(tmp_path / "run").read_ledger()
        if row["event"] == "checkpoint"
    ]
    assert saves == [0, len(numbers) + 1]


# --- forked children


class Forks(Hook):
    """Forks after a step, and notes what the child does by default at each signal, and which are blocked there."""

    name = "forks"

    def __init__(self) -> None:
        self.codes: list[int] = []

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == 2:
            self.codes = [child(lambda number=number: has_default(number)) for number in SIGNALS]


def child(ask: Callable[[], bool]) -> int:
    """Return 0 if the answer in a forked child is yes."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if ask() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_default(number: int) -> bool:
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return signal.getsignal(number) is default and number not in blocked


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("library", [False, True])
def test_a_forked_child_answers_signals_as_any_process(library: bool, tmp_path: Path) -> None:
    hook, before = Forks(), {number: signal.getsignal(number) for number in SIGNALS}
    if library:
        with stepctl.create(
            BASE, tmp_path / "run", overrides={"stop.last_step": 3}, hooks=[hook]
        ) as run:
            run.train()
    else:
        train(make_config(stop={"last_step": 3}), tmp_path / "run", (hook,))
    assert hook.codes == [0] * len(SIGNALS)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


class TrainsAnother(Hook):
    """Trains another run from within a step."""

    name = "trains_another"

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == 2:
            train(make_config(stop={"last_step": 2}), self.path)


def test_a_run_within_a_run_leaves_every_handler_as_it_was(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    hook = TrainsAnother(tmp_path / "inner")
    train(make_config(stop={"last_step": 3}), tmp_path / "outer", (hook,))
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


POOLS = """
import multiprocessing, signal, sys
from stepctl.data.digits import digits
from tests.support.user_model import TwoLayers

def double(x):
    return 2 * x

def pooled(n):
    with multiprocessing.get_context("fork").Pool(1) as pool:  # which is terminated at its end
        assert pool.map(double, [n]) == [2 * n]

def source(*, targets, dtype):
    pooled(1)
    return digits(targets=targets, dtype=dtype)

class Pooled(TwoLayers):
    def forward(self, params, x, workspace):
        if workspace.rng is not None:
            pooled(2)
        return super().forward(params, x, workspace)
"""


@pytest.mark.process
def test_a_pool_of_processes_in_each_of_60_steps(tmp_path: Path) -> None:
    """Their workers end by SIGTERM, also those of a pool that is made where data are loaded."""
    (tmp_path / "pools.py").write_text(POOLS)
    data = {"name": "pools:source", "batch_size": 48}
    write(
        tmp_path,
        data=data,
        model={"name": "pools:Pooled"},
        evaluate={"every": None},
        stop={"last_step": 60},
    )
    done = run(command("train", "-q"), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


POOL_THAT_STAYS = """
import multiprocessing
import os
import signal
from stepctl.data.digits import digits
from tests.support.user_model import TwoLayers


def double(n):
    return 2 * n


def source(*, targets: str, dtype: str):
    global pool
    pool = multiprocessing.get_context("fork").Pool(2)
    assert pool.map(double, [1]) == [2]
    return digits(targets=targets, dtype=dtype)


class SignalsItsGroup(TwoLayers):
    passes = 0

    def forward(self, params, x, workspace):
        self.passes += workspace.rng is not None
        if self.passes == 5:  # the first is a trial, before signals are answered
            os.killpg(0, signal.SIGTERM)
        return super().forward(params, x, workspace)
"""
EXITS_SOON = """
from stepctl.cli import main
main.STOPPED_EXIT_SECONDS = 0.2
main.main()
"""


@pytest.mark.process
def test_a_pool_whose_workers_a_signal_ended_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    (tmp_path / "stays.py").write_text(POOL_THAT_STAYS)
    data = {"name": "stays:source", "batch_size": 48}
    stop = {"last_step": 10**9}
    own = {"data": data, "model": {"name": "stays:SignalsItsGroup"}, "check_determinism": False}
    write(tmp_path, **own, evaluate={"every": None}, stop=stop)
    words = [
        sys.executable,
        "-c",
        EXITS_SOON,
        "train",
        "-q",
        "--config",
        "config.yaml",
        "--run-dir",
        "run",
    ]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert done.returncode == 75, done.stderr


@pytest.mark.process
def test_a_child_that_was_forked_off_does_not_close_the_run(tmp_path: Path) -> None:
    """At its own end it would write into what its parent writes."""
    program = (
        "import os, stepctl\n"
        "run = stepctl.create('config.yaml', 'run', say=lambda text: None)\n"
        "run.step(3)\n"
        "if os.fork() == 0: raise SystemExit\n"
        "os.wait()\n"
        "print(sorted(os.listdir('run/checkpoints')), flush=True)\n"
    )
    write(tmp_path)
    done = run([sys.executable, "-W", "ignore", "-c", program], tmp_path)
    assert (done.stdout, done.stderr) == ("['step-00000000.h5']\n", "")


# --- a limit of time


@pytest.mark.training
def test_a_job_whose_time_is_over_at_its_first_step_makes_that(tmp_path: Path) -> None:
    """It is started again and again, and would never progress."""
    long_ago = TimeLimit(1, float("-inf"))
    with create_run(make_config(), RunDirectory(tmp_path / "run")) as segment:
        assert segment.train(stop=[long_ago]).step == 1
    for step in (2, 3):
        with resume_run(RunDirectory(tmp_path / "run"), ResumeOptions()) as segment:
            outcome = segment.train(stop=[TimeLimit(1, float("-inf"))])
        assert (outcome.step, outcome.reason.text, outcome.reason.done) == (
            step,
            "max_time 1 s",
            False,
        )
    assert resume(tmp_path / "run").same_bits(train(make_config(), tmp_path / "unbroken"))


# --- schedulers


@pytest.mark.process
@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 15, 75, 129, 130, 138, 140, 143, 152])
def test_the_slurm_script_requeues_runs_that_can_resume(code: int, tmp_path: Path) -> None:
    found = re.search(r"^```sh\n(#!/bin/bash\n#SBATCH.*?)^```", README, re.M | re.S)
    assert found is not None
    for name, text in {"srun": f"exit {code}", "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = environment({"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"})
    done = subprocess.run(["bash", "-c", found[1]], cwd=tmp_path, env=env, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == (code in (15, 75, 129, 138, 140, 143, 152))


def test_the_kubernetes_job_retries_runs_that_can_resume() -> None:
    found = re.search(r"^```yaml\n(apiVersion.*?)^```", README, re.M | re.S)
    assert found is not None
    rules = yaml.safe_load(found[1])["spec"]["podFailurePolicy"]["rules"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule
    }
    assert codes == {"FailJob": [2, 3], "Ignore": [15, 75, 143]}


FORKED_BY_A_THREAD = """
import os
import signal
import threading
from stepctl.system import process_signals

go = threading.Event()
codes = []


def fork():
    go.wait()
    child = os.fork()
    if child == 0:
        os._exit(len(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


process_signals.block([signal.SIGTERM])
thread = threading.Thread(target=fork)
thread.start()
process_signals.unblock([signal.SIGTERM])
go.set()
thread.join()
print(codes)
"""


@pytest.mark.process
def test_a_child_of_a_thread_started_while_signals_were_blocked_has_none_blocked(
    tmp_path: Path,
) -> None:
    """As the workers that a pool starts in the place of others."""
    done = run([sys.executable, "-c", FORKED_BY_A_THREAD], tmp_path)
    assert (done.stdout, done.stderr) == ("[0]\n", "")


@pytest.mark.process
def test_a_mask_of_the_program_s_own_is_inherited_by_its_children(tmp_path: Path) -> None:
    program = FORKED_BY_A_THREAD.replace(
        "process_signals.block(", "signal.pthread_sigmask(signal.SIG_BLOCK, "
    )
    done = run(
        [sys.executable, "-c", program.replace("process_signals.unblock(", "tuple(")], tmp_path
    )
    assert (done.stdout, done.stderr) == ("[1]\n", "")
