"""Ranks must run the same software; rank 0 names a rank that does not answer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.config import yaml
from stepctl.config.model import parse_config
from stepctl.distributed import heartbeat
from stepctl.distributed.heartbeat import Heartbeat
from stepctl.errors import RankUnresponsive
from stepctl.rundir.directory import RunDirectory
from tests.support.messages import normalize, without_paths
from tests.support.mpi_jobs import LONGEST, ROOT, environment, launcher, run_python
from tests.support.runs import make_config, resume, rows, train

LAST = 9
# Rank 1 finds other packages than rank 0.
OTHER_IN_RANK_1 = "import os, sys; os.environ['PMI_RANK'] == '1' and sys.path.insert(0, 'other'); "
IMPATIENT = (
    "from stepctl.distributed import heartbeat; "
    "heartbeat.PING_AFTER, heartbeat.RESPONSE_TIMEOUT = 0.5, 0.2; "
)
MAIN = "from stepctl.__main__ import main; main()"


def write(folder: Path, model: dict[str, object]) -> Path:
    data = {"name": "digits", "batch_size": 48, "validation_fraction": 0.9, "shards": 2}
    config = make_config(
        data=data,
        model=model,
        stop={"last_step": LAST},
        log={"every": 1},
        evaluate={},
        checkpoint={"every": 1000},
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
    with open(copy_of_stepctl(folder) / "tasks" / "losses.py", "a") as file:
        file.write("# edited on one host\n")


def other_numpy(folder: Path) -> None:
    metadata = folder / "other" / "numpy-1.2.3.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.2.3\n")


@pytest.mark.mpi
@pytest.mark.parametrize("difference", [other_version, other_sources, other_numpy])
def test_a_rank_with_other_software_is_refused(
    difference: Callable[[Path], None], tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    difference(tmp_path)
    write(tmp_path, MLP)
    arguments = ("train", "--config", "config.yaml", "--run-dir", "run")
    done = run_python(launcher(2), "-c", OTHER_IN_RANK_1 + MAIN, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    paths_and_digests = (r"(?<=\()[^)]*(?=\))",)
    here = {"HOST": os.uname().nodename, "THIS": stepctl.__version__, "INSTALLED": np.__version__}
    assert normalize(done.stderr, paths_and_digests, **here) == snapshot
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def stopped_job(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a job whose rank 1 has stopped before it contributed to step 5, and the pid that rank 0 names."""
    time = 1 + 4 + 1
    fails = {"name": "tests.support.failing_ranks:Fails", "rank": 1, "time": time, "error": "stop"}
    write(folder, fails)
    arguments = ("train", "--config", "config.yaml", "--run-dir", "run", "-q")
    command = [*launcher(2), sys.executable, "-c", IMPATIENT + MAIN, *arguments]
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            host = re.escape(os.uname().nodename)
            match = re.match(
                rf"no response from rank 1 on {host} \(pid (\d+)\) for .* SIGTERM to pid (\d+)$",
                line,
            )
            assert match, line + process.stderr.read()
            assert Path(f"/proc/{match[1]}/stat").read_text().split()[2] == "T"
            os.kill(int(match[2]), 0)
            yield process, int(match[1])
        finally:
            process.kill()


def rank_0(folder: Path) -> int:
    start = next(
        row for row in RunDirectory(folder / "run").read_ledger() if row["event"] == "start"
    )
    return int(start["pid"])


@pytest.mark.mpi
def test_sigterm_ends_a_job_with_a_stopped_rank_and_it_resumes_exactly(
    tmp_path: Path,
) -> None:
    with stopped_job(tmp_path) as (process, _):
        os.kill(rank_0(tmp_path), signal.SIGTERM)
        _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == 75, said
    assert "run: the state of global step 4 is saved" in said
    assert "stopped while rank 1 on " in said
    resume(tmp_path / "run")
    config = parse_config(yaml.load(str(tmp_path / "config.yaml")))
    train(config, tmp_path / "unbroken")
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


@pytest.mark.mpi
def test_a_stopped_rank_that_continues_lets_the_job_finish(tmp_path: Path) -> None:
    with stopped_job(tmp_path) as (process, pid):
        os.kill(pid, signal.SIGCONT)
        _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, said
    assert rows(tmp_path / "run")[-1]["step"] == LAST


class FakeRanks:
    """Four ranks, of which some answer; a stop may be asked for."""

    rank, size = 0, 4

    def __init__(self, answering: set[int]) -> None:
        self.answering, self.stopping, self.questions = answering, False, 0

    def poll_messages(self) -> None:
        return

    def send_pings(self) -> int:
        self.questions += 1
        return self.questions

    def receive_responses(self, ping: int) -> set[int]:
        return self.answering if ping == self.questions else set()

    def describe_rank(self, rank: int) -> str:
        return f"rank {rank}"

    def raise_if_stop_requested(self, missing: str) -> None:
        if self.stopping:
            raise RankUnresponsive(missing)


def test_the_ranks_that_do_not_answer_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    times = [0.0]
    ranks = FakeRanks({1})
    pulse = Heartbeat(ranks, lambda: times[-1])
    for time in (
        1.0,
        heartbeat.PING_AFTER - 0.1,
        heartbeat.PING_AFTER,
        heartbeat.PING_AFTER + heartbeat.RESPONSE_TIMEOUT - 0.1,
    ):
        times.append(time)
        pulse.poll()
    assert capsys.readouterr().err == ""
    for time in (heartbeat.PING_AFTER + heartbeat.RESPONSE_TIMEOUT, 1000.0):
        times.append(time)
        pulse.poll()
    assert capsys.readouterr().err.startswith("no response from rank 2, rank 3 for 30 s; ")
    ranks.stopping = True
    with pytest.raises(RankUnresponsive, match="rank 2, rank 3"):
        pulse.poll()


def test_ranks_that_answer_are_not_named_and_a_stop_is_left_to_the_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = [0.0]
    ranks = FakeRanks({1, 2, 3})
    ranks.stopping = True
    pulse = Heartbeat(ranks, lambda: times[-1])
    for time in (31.0, 34.0, 65.0, 68.0):
        times.append(time)
        pulse.poll()
    assert capsys.readouterr().err == ""
    assert ranks.questions == 2


@pytest.mark.training
def test_a_resume_by_another_version_says_so_and_records_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "run"
    config = make_config(stop={"last_step": 3})
    with monkeypatch.context() as patch:
        patch.setattr("stepctl.checkpoint.layout.__version__", "0.0.1")
        train(config, path)
    said: list[str] = []
    resume(path, last_step=5, say=said.append)
    (note,) = said
    assert without_paths(note, THIS=stepctl.__version__) == snapshot
    starts = [row for row in RunDirectory(path).read_ledger() if row["event"] == "start"]
    assert starts[-1]["version_before"] == "stepctl 0.0.1"
