"""Removed checkpoints, locks of another host, and other files in a run directory."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from syrupy.assertion import SnapshotAssertion

from stepctl.cli.main import cli
from stepctl.errors import ConfigError, Exit
from stepctl.reports import verify
from stepctl.reports.run_table import list_runs
from stepctl.rundir.directory import RunDirectory
from tests.support.failing_reads import refuse
from tests.support.messages import without_paths
from tests.support.runs import BASE, make_config, resume, train

SMALL = {
    **BASE,
    "stop": {"last_step": 6},
    "log": {"every": 3},
    "checkpoint": {"every": 2, "keep_last": None},
}
NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    train(make_config(**SMALL), path)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Path:
    """A run of steps 0, 2, 4 and 6, in the working directory."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def remove(run: Path, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / f"step-{step:08d}.h5").unlink()


def states(folder: Path) -> dict[str, str]:
    return {found.name: found.state for found in list_runs(str(folder), NOW)}


# --- prune --forget-missing


@pytest.mark.training
@pytest.mark.parametrize("steps", [(0,), (2, 6), (0, 2, 4, 6)], ids=str)
def test_checkpoints_removed_on_purpose_can_be_acknowledged(
    steps: tuple[int, ...], run: Path, snapshot: SnapshotAssertion
) -> None:
    remove(run, *steps)
    checked = call("verify", "run")
    assert checked.exit_code == Exit.NEGATIVE
    assert "stepctl prune run --forget-missing" in checked.stderr
    assert states(run.parent) == {"run": "damaged"}
    done = call("prune", "run", "--forget-missing")
    assert done.exit_code == Exit.DONE
    assert done.stdout.splitlines() == [f"forgot step-{step:08d}.h5" for step in steps]
    assert call("verify", "run").exit_code == Exit.DONE
    assert states(run.parent) == {"run": "finished"}
    assert call("prune", "run", "--forget-missing").stdout == snapshot


@pytest.mark.training
def test_nothing_else_is_removed_or_changed(run: Path) -> None:
    remove(run, 4)
    left = sorted(os.listdir(run / "checkpoints"))
    before = (run / "ledger.jsonl").read_bytes()
    dry = call("prune", "run", "--forget-missing", "--dry-run", "--json")
    assert json.loads(dry.stdout) == {"forgotten": [4], "dry_run": True}
    assert (run / "ledger.jsonl").read_bytes() == before
    call("prune", "run", "--forget-missing")
    assert (run / "ledger.jsonl").read_bytes().startswith(before)
    assert sorted(os.listdir(run / "checkpoints")) == left
    assert call("prune", "run", "--forget-missing", "--keep-last", "1").exit_code == Exit.USAGE


@pytest.mark.training
def test_a_run_whose_missing_files_come_back_is_good(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "disk")
    remove(run, 0, 2, 4, 6)
    call("prune", "run", "--forget-missing")
    shutil.copytree(tmp_path / "disk", run / "checkpoints", dirs_exist_ok=True)
    assert verify.verify(str(run))[1] == []
    expected = train(make_config(**{**SMALL, "stop": {"last_step": 8}}), tmp_path / "unbroken")
    assert resume(run, last_step=8).same_bits(expected)


@pytest.mark.training
def test_unreadable_checkpoints_stay_acknowledged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "ledger.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        refuse(patch, run / "checkpoints")
        assert call("prune", "run", "--forget-missing").exit_code == Exit.NEGATIVE
    assert (run / "ledger.jsonl").read_bytes() == before


def test_a_folder_without_a_run_gets_no_ledger(tmp_path: Path) -> None:
    assert call("prune", str(tmp_path), "--forget-missing").exit_code == Exit.USAGE
    assert os.listdir(tmp_path) == []


# --- a lock that names another host


@pytest.mark.training
def test_a_run_held_by_another_host_shows_it_and_the_age_of_its_last_write(run: Path) -> None:
    (run / "lock").write_text(json.dumps({"host": "node7", "boot_id": "x", "pid": 12}))
    written = 1_700_000_000
    for path in (run / "metrics.jsonl", run / "ledger.jsonl", run / "checkpoints"):
        os.utime(path, (written, written))
    os.utime(run / "metrics.jsonl", (written + 3600, written + 3600))
    later = datetime.datetime.fromtimestamp(written + 4 * 3600, datetime.UTC)
    (found,) = list_runs(str(run), later)
    assert (found.state, found.host, found.step, found.age) == ("held", "node7", 6, 3 * 3600)
    done = call("runs", "run")
    assert done.exit_code == Exit.DONE
    assert "held by node7" in done.stdout
    assert "run: held by process 12 on node7 (last write " in done.stderr
    assert "if that process was killed, continue with stepctl resume" in done.stderr
    (plain,) = json.loads(call("runs", "run", "--json").stdout)
    assert (plain["state"], plain["host"]) == ("held", "node7")
    resume(run, last_step=7)
    assert states(run) == {"run": "finished"}


# --- what may lie in a run directory

ALLOWED = (
    "lost+found/",
    ".nfs0001",
    ".cache/",
    "train.log",
    "slurm-12.out",
    "job.err",
    "stdout.txt",
    "logs/",
    "run.log.1",
)


def put(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir(parents=True)
        else:
            (folder / name).write_text("mine")


@pytest.mark.training
def test_a_run_starts_and_resumes_beside_logs_hidden_files_and_lost_and_found(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    put(path, ALLOWED)
    expected = train(make_config(**SMALL), tmp_path / "unbroken")
    train(make_config(**{**SMALL, "stop": {"last_step": 3}}), path)
    (path / "checkpoints" / "lost+found").mkdir()
    assert resume(path, last_step=6).same_bits(expected)
    assert verify.verify(str(path))[1] == []
    assert states(tmp_path) == {"run": "finished", "unbroken": "finished"}
    for name in ALLOWED:
        assert (path / name).exists()
        assert name.endswith("/") or (path / name).read_text() == "mine"


@pytest.mark.training
@pytest.mark.parametrize(
    "name", ["thesis.tex", "config.yaml", "checkpoints", "data.csv", "catalog"]
)
def test_files_that_may_be_a_users_work_are_still_refused(
    name: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    put(tmp_path, (name, "train.log"))
    with pytest.raises(ConfigError) as caught:
        train(make_config(**SMALL), tmp_path)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert sorted(os.listdir(tmp_path)) == sorted([name, "train.log"])


@pytest.mark.training
def test_the_folder_of_runs_may_be_a_disk_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(**SMALL), tmp_path / "run")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".snapshots").mkdir()
    refuse(monkeypatch, tmp_path / "lost+found")
    refuse(monkeypatch, tmp_path / ".snapshots")
    done = call("runs", str(tmp_path))
    assert (done.exit_code, done.stderr, len(done.stdout.splitlines())) == (Exit.DONE, "", 2)


@pytest.mark.training
def test_a_killed_start_leaves_a_directory_that_can_be_used_again(
    tmp_path: Path,
) -> None:
    RunDirectory(tmp_path).create()
    put(tmp_path, ("metrics.jsonl.aside-1", "train.log"))
    train(make_config(**{**SMALL, "stop": {"last_step": 1}}), tmp_path)
