"""A stop signal before training begins ends the command at once, even inside a long C call."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mpi_jobs import environment, launcher
from tests.support.runs import BASE, make_config, train

DEADLINE = 60  # seconds: only a hang comes near it

# A source that is in C for longer than anybody waits: no handler of Python's runs before it returns. Its last line
# says where: in the n-th of the calls that read the data.
SOURCE = """
import os
from stepctl.data.digits import digits
from stepctl.data.memory import InMemory

class Slow(InMemory):
    where: str

    def _read_for_long(self, where):
        if where == self.where and os.environ.get("PMI_RANK", "0") == os.environ.get("SLOW_RANK", "0"):
            os.write(2, b"in C\\n")
            sum(range(10**12))

    def n_classes(self):
        self._read_for_long("n_classes")
        return super().n_classes()

    def slices(self):
        self._read_for_long("slices")
        return super().slices()

    def fingerprint(self):
        self._read_for_long("fingerprint")
        return super().fingerprint()

def slow(*, where: str, targets, dtype):
    sources = digits(targets=targets, dtype=dtype)
    sources.train.__class__ = Slow
    sources.train.where = where
    sources.train._read_for_long("open")
    return sources
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(SOURCE)
    return tmp_path


def config(folder: Path, where: str, **data: object) -> str:
    data = {"name": "slow:slow", "where": where, "batch_size": 8, **data}
    path = folder / "config.yaml"
    path.write_text(
        json.dumps(BASE | {"data": data, "evaluate": {"every": None}, "stop": {"last_step": 3}})
    )
    return str(path)


def end_in_c(number: signal.Signals, folder: Path, *command: str, **variables: str) -> int:
    """Start a command, signal it once it says that it is in C, and return its exit code."""
    with subprocess.Popen(
        command, cwd=folder, env=environment(variables), stderr=subprocess.PIPE
    ) as child:
        try:
            assert child.stderr is not None
            assert b"in C\n" in iter(child.stderr.readline, b"")
            child.send_signal(number)
            child.communicate(timeout=DEADLINE)
            return child.returncode
        finally:
            child.kill()


def stepctl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "stepctl", *arguments]


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGTERM, "open"),
        (signal.SIGINT, "open"),
        (signal.SIGUSR1, "n_classes"),
        (signal.SIGHUP, "slices"),
        (signal.SIGTERM, "fingerprint"),
    ],
)
def test_a_signal_ends_the_command_in_the_middle_of_a_call(
    number: signal.Signals, where: str, folder: Path
) -> None:
    command = stepctl("train", "--config", config(folder, where), "--run-dir", "run")
    assert end_in_c(number, folder, *command) == -number
    assert not (folder / "run").exists(), "nothing was begun"


@pytest.mark.process
def test_a_resume_is_interrupted_too_and_the_next_one_is_exact(folder: Path) -> None:
    train(make_config(stop={"last_step": 3}), folder / "run")
    before = sorted(path.name for path in (folder / "run").rglob("*"))
    name = config(folder, "open")
    change = [
        "--set",
        f"data={json.dumps(json.loads(Path(name).read_text())['data'])}",
        "--allow-change",
        "data",
    ]
    command = stepctl("resume", "run", "--last-step", "5", *change)
    assert end_in_c(signal.SIGTERM, folder, *command) == -signal.SIGTERM
    assert sorted(path.name for path in (folder / "run").rglob("*")) == before
    done = subprocess.run(
        stepctl("resume", "run", "--last-step", "5"),
        cwd=folder,
        env=environment(),
        timeout=DEADLINE,
    )
    assert done.returncode == 0


@pytest.mark.process
def test_one_that_comes_before_the_data_are_read_ends_the_command_there(folder: Path) -> None:
    (folder / "early.py").write_text(
        "import os, signal\n"
        "from stepctl.models.mlp import mlp as Early\n"  # imported when the config is checked
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    path = config(folder, "never")
    text = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(text | {"model": {"name": "early:Early", "hidden": [4]}}))
    done = subprocess.run(
        stepctl("train", "--config", path), cwd=folder, env=environment(), timeout=DEADLINE
    )
    assert done.returncode == -signal.SIGTERM
    assert not list(folder.glob("runs/*"))


@pytest.mark.process
def test_an_ignored_signal_stays_ignored(folder: Path) -> None:
    """As in a background job of a script, or below nohup."""
    path = config(folder, "never")
    ignore = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    text = SOURCE.replace('sources.train._read_for_long("open")', "os.kill(os.getpid(), 1)")
    (folder / "slow.py").write_text(text)
    command = [sys.executable, "-c", ignore, *stepctl("train", "--config", path)]
    assert subprocess.run(command, cwd=folder, env=environment(), timeout=DEADLINE).returncode == 0


@pytest.mark.mpi
def test_a_rank_that_reads_its_data_does_not_hold_up_the_job(folder: Path) -> None:
    command = [*launcher(2), *stepctl("train", "--config", config(folder, "open", shards=2))]
    code = end_in_c(signal.SIGTERM, folder, *command, SLOW_RANK="1")
    assert code == signal.SIGTERM, "what mpiexec says of a rank that a signal ended"
