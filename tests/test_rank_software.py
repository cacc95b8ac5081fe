"""Ranks of one job run the same software, and rank 0 names a rank that does not answer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stepctl
from helpers import make_config, resume, rows, train
from jobs import LONGEST, ROOT, environment, launcher, needs_mpi, run_python
from stepctl import comm
from stepctl.comm import RollCall
from stepctl.launcher import NoAnswer
from stepctl.rundir import RunDirectory

LAST = 9
# Rank 1 finds other packages than rank 0.
OTHER_IN_RANK_1 = "import os, sys; os.environ['PMI_RANK'] == '1' and sys.path.insert(0, 'other'); "
IMPATIENT = "from stepctl import comm; comm.ASK_AFTER, comm.ANSWER_WITHIN = 0.5, 0.2; "
MAIN = "from stepctl.__main__ import main; main()"


def write(folder: Path, model: dict[str, object]) -> Path:
    data = {"name": "digits", "batch_size": 48, "validation_fraction": 0.9, "shards": 2}
    config = make_config(
        data=data, model=model, stop={"last_step": LAST}, log={"every": 1}, evaluate={}, checkpoint={"every": 1000}
    )
    path = folder / "config.yaml"
    path.write_text(config.text)
    return path


MLP: dict[str, object] = {"name": "mlp", "hidden": [4]}


def copy_of_stepctl(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT / "stepctl", folder / "other" / "stepctl"))


def other_version(folder: Path) -> None:
    path = copy_of_stepctl(folder) / "__init__.py"
    path.write_text(path.read_text().replace(stepctl.__version__, "9.8.7"))


def other_sources(folder: Path) -> None:
    with open(copy_of_stepctl(folder) / "losses.py", "a") as file:
        file.write("# edited on one host\n")


def other_numpy(folder: Path) -> None:
    metadata = folder / "other" / "numpy-1.2.3.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.2.3\n")


@needs_mpi
@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (other_version, rf"runs stepctl 9.8.7 \(.*\), but rank 0 on .* runs stepctl {stepctl.__version__} "),
        (other_sources, rf"runs stepctl {stepctl.__version__} \(.*\), but rank 0 on .* runs stepctl "),
        (other_numpy, r"runs NumPy 1.2.3, but rank 0 on .* runs NumPy \d"),
    ],
)
def test_a_rank_with_other_software_is_refused(difference: object, text: str, tmp_path: Path) -> None:
    assert callable(difference)
    difference(tmp_path)
    write(tmp_path, MLP)
    arguments = ("train", "--config", "config.yaml", "--run-dir", "run")
    done = run_python(launcher(2), "-c", OTHER_IN_RANK_1 + MAIN, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(f"stepctl: rank 1 on .* {text}.*; install the same versions for all ranks", done.stderr)
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def stopped_job(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a job whose rank 1 has stopped before it contributed to step 5, and the pid that rank 0 names."""
    write(folder, {"name": "failing:Fails", "rank": 1, "time": 1 + 4 + 1, "error": "stop"})
    arguments = ("train", "--config", "config.yaml", "--run-dir", "run", "-q")
    command = [*launcher(2), sys.executable, "-c", IMPATIENT + MAIN, *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            host = re.escape(os.uname().nodename)
            match = re.match(rf"waiting for rank 1 on {host} \(pid (\d+)\): no answer .* SIGTERM to pid (\d+)$", line)
            assert match, line + process.stderr.read()
            assert Path(f"/proc/{match[1]}/stat").read_text().split()[2] == "T"
            os.kill(int(match[2]), 0)
            yield process, int(match[1])
        finally:
            process.kill()


def rank_0(folder: Path) -> int:
    start = next(row for row in RunDirectory(folder / "run").read_ledger() if row["event"] == "start")
    return int(start["pid"])


@needs_mpi
def test_sigterm_ends_a_job_with_a_stopped_rank_and_a_resume_goes_on_exactly(tmp_path: Path) -> None:
    with stopped_job(tmp_path) as (process, _):
        os.kill(rank_0(tmp_path), signal.SIGTERM)
        _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == 75, said
    assert "run: the state of global step 4 is saved" in said
    assert "stopped while rank 1 on " in said
    resume(tmp_path / "run")
    train(make_config_of(tmp_path), tmp_path / "unbroken")
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


def make_config_of(folder: Path) -> object:
    from stepctl import config as configs
    from stepctl import yamlio

    return configs.parse(yamlio.load(str(folder / "config.yaml")))


@needs_mpi
def test_a_stopped_rank_that_goes_on_lets_the_job_finish(tmp_path: Path) -> None:
    with stopped_job(tmp_path) as (process, pid):
        os.kill(pid, signal.SIGCONT)
        _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, said
    assert rows(tmp_path / "run")[-1]["step"] == LAST


class FakeWorld:
    """Four ranks, of which some answer; a stop may be asked for."""

    rank, size = 0, 4

    def __init__(self, answering: set[int]) -> None:
        self.answering, self.stopping, self.questions = answering, False, 0

    def hear(self) -> None:
        return

    def ask_who_is_there(self) -> int:
        self.questions += 1
        return self.questions

    def answers(self, number: int) -> set[int]:
        return self.answering if number == self.questions else set()

    def place(self, rank: int) -> str:
        return f"rank {rank}"

    def stop_if_asked(self, missing: str) -> None:
        if self.stopping:
            raise NoAnswer(missing)


def test_the_ranks_that_do_not_answer_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    times = [0.0]
    world = FakeWorld({1})
    roll_call = RollCall(world, lambda: times[-1])  # type: ignore[arg-type]
    for time in (1.0, comm.ASK_AFTER - 0.1, comm.ASK_AFTER, comm.ASK_AFTER + comm.ANSWER_WITHIN - 0.1):
        times.append(time)
        roll_call.check()
    assert capsys.readouterr().err == ""
    for time in (comm.ASK_AFTER + comm.ANSWER_WITHIN, 1000.0):
        times.append(time)
        roll_call.check()
    assert capsys.readouterr().err.startswith("waiting for rank 2, rank 3: no answer for 30 s; ")
    world.stopping = True
    with pytest.raises(NoAnswer, match="rank 2, rank 3"):
        roll_call.check()


def test_ranks_that_answer_are_not_named_and_a_stop_is_left_to_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    times = [0.0]
    world = FakeWorld({1, 2, 3})
    world.stopping = True
    roll_call = RollCall(world, lambda: times[-1])  # type: ignore[arg-type]
    for time in (31.0, 34.0, 65.0, 68.0):
        times.append(time)
        roll_call.check()
    assert capsys.readouterr().err == ""
    assert world.questions == 2


def test_a_resume_by_another_version_says_so_and_records_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    config = make_config(stop={"last_step": 3})
    with monkeypatch.context() as patch:
        patch.setattr("stepctl.checkpoint.layout.__version__", "0.0.1")
        train(config, path)
    said: list[str] = []
    resume(path, last_step=5, say=said.append)
    here = f"stepctl {stepctl.__version__}"
    assert said == [f"note: step-00000003.h5 was written by stepctl 0.0.1, this is {here}; the ledger records it"]
    starts = [row for row in RunDirectory(path).read_ledger() if row["event"] == "start"]
    assert starts[-1]["version_before"] == "stepctl 0.0.1"
