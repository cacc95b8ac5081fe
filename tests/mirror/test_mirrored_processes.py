"""Processes with a mirror: signals, take-overs, ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from stepctl.config import yaml
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.mirror_status import read_status
from tests.support.mpi_jobs import job, needs_mpi
from tests.support.processes import Process, start, until
from tests.support.runs import BASE, content, rows

LAST = 2000


def write_config(folder: Path, **sections: Any) -> None:
    config = {**BASE, "stop": {"last_step": LAST}, "checkpoint": {"every": 100}, **sections}
    (folder / "c.yaml").write_text(yaml.dumps(config))


def command(folder: Path, run: str, *more: object) -> list[object]:
    url = f"file://{folder}/store"
    return ["train", "c.yaml", "-q", "--mirror", url, "--or-resume", "--run-dir", run, *more]


def until_mirrored(process: Process, run: Path, step: int) -> None:
    """Wait until a step of a run is mirrored."""

    def is_mirrored() -> bool:
        assert process.running(), process.said()
        status = read_status(RunDirectory(run).folder)
        return status is not None and (status.step or 0) >= step

    until(is_mirrored)


def newest(run: Path) -> int:
    return max(RunDirectory(run).read_ledger().acknowledged.values())


def assert_same(run: Path, other: Path) -> None:
    """Compare the last checkpoints; their configs name different mirrors."""
    name = f"checkpoints/step-{LAST:08d}.h5"
    found, expected = content(run / name), content(other / name)
    for contents in (found, expected):
        del contents["config"], contents["@run"]
    assert found == expected
    assert rows(run) == rows(other)


@pytest.mark.process
def test_after_a_signal_the_last_step_is_in_the_mirror(tmp_path: Path) -> None:
    write_config(tmp_path)
    with start(["train", "c.yaml", "-q", "--run-dir", "once"], cwd=tmp_path) as process:
        assert process.wait() == 0
    run = tmp_path / "here"
    with start(command(tmp_path, "here"), cwd=tmp_path) as process:
        until_mirrored(process, run, 100)
        process.kill(signal.SIGTERM)
        assert process.wait() == 75, process.said()
    stopped = newest(run)
    assert 100 <= stopped < LAST
    shutil.rmtree(run)
    with start(command(tmp_path, "here"), cwd=tmp_path) as process:
        assert process.wait() == 0, process.said()
        assert f"fetched step {stopped} from" in process.said()
    assert_same(run, tmp_path / "once")


@pytest.mark.process
def test_a_process_that_was_replaced_saves_its_state_and_exits_with_4(tmp_path: Path) -> None:
    write_config(tmp_path, stop={"last_step": 10**7})
    with start(command(tmp_path, "here"), cwd=tmp_path) as first:
        until_mirrored(first, tmp_path / "here", 100)
        more = ("--take-over", "--last-step", 200)
        with start(command(tmp_path, "there", *more), cwd=tmp_path) as second:
            assert first.wait() == 4, first.said()
            assert second.wait() == 0, second.said()
        assert f"was taken over by process {second.pid} on {os.uname().nodename}" in first.said()
        assert "is saved" in first.said()
    ledger = RunDirectory(tmp_path / "here").read_ledger()
    assert ledger.events[-1]["event"] == "end"
    assert ledger.events[-1]["step"] == newest(tmp_path / "here")


@pytest.mark.mpi
@needs_mpi
def test_ranks_continue_on_a_blank_machine(tmp_path: Path) -> None:
    data = {"name": "digits", "batch_size": 48, "shards": 2, "validation_fraction": 0.5}
    write_config(tmp_path, data=data, stop={"last_step": 20}, checkpoint={"every": 5})
    done = job(2, *command(tmp_path, "here"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    shutil.rmtree(tmp_path / "here")
    done = job(2, *command(tmp_path, "here", "--last-step", 30), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fetched step 20 from" in done.stderr
    done = job(2, "train", "c.yaml", "-q", "--run-dir", "once", "--last-step", 30, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = "checkpoints/step-00000030.h5"
    found, expected = content(tmp_path / "here" / name), content(tmp_path / "once" / name)
    for contents in (found, expected):
        del contents["config"], contents["@run"]
    assert found == expected
    starts = RunDirectory(tmp_path / "here").read_ledger().starts
    assert [json.loads(json.dumps(start))["mirror"]["epoch"] for start in starts] == [1, 2]
