"""Files that cannot be read at the moment are neither damaged nor missing: exit 1, nothing set aside."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stepctl.checkpoint import codec
from stepctl.checkpoint.store import Store
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.errors import Exit, NonFiniteError, UnreadableError
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.arena import Arena
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from tests.support.checkpoints import STEP, written
from tests.support.failing_reads import NAMES, refuse
from tests.support.run_files import file_contents
from tests.support.runs import BASE, make_config, resume, train

NEWEST = "checkpoints/step-00000004.h5"
SMALL = {
    **BASE,
    "stop": {"last_step": 4},
    "log": {"every": 2},
    "evaluate": {"every": 2},
    "checkpoint": {"every": 2, "keep_last": None},
}
COMMANDS: dict[str, list[str]] = {
    "resume": ["resume", "run", "--num-steps", "2"],
    "train --or-resume": [
        "train",
        "--config",
        "c.yaml",
        "--run-dir",
        "run",
        "--or-resume",
        "--last-step",
        "6",
    ],
    "fork": ["fork", "run", "--run-dir", "new"],
    "plan": ["plan", "run"],
    "prune": ["prune", "run", "--keep-last", "1"],
    "replay": ["verify", "run", "--replay", "2:4"],
    "runs": ["runs", "run"],
}
READS_NO_METRICS = ("fork", "plan", "replay")  # and needs none


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Path:
    """A working directory with a run of steps 0, 2 and 4, and its config."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.yaml").write_text(yaml.dumps(SMALL))
    train(make_config(**SMALL), folder / "run")
    return folder


def call(command: str) -> Result:
    return CliRunner().invoke(cli, COMMANDS[command])


def assert_said(code: int, stderr: str, name: str) -> None:
    assert code == Exit.NEGATIVE, stderr
    (line,) = [line for line in stderr.splitlines() if "cannot be read now" in line]
    assert name in line
    assert "start" not in line
    assert "damaged" not in stderr
    assert "using" not in stderr


@pytest.mark.training
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", [NEWEST, "checkpoints", "ledger.jsonl", "metrics.jsonl", "config.yaml"]
)
def test_a_failed_read_ends_the_command_and_changes_nothing(
    name: str, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "metrics.jsonl" and command in READS_NO_METRICS:
        return
    if name == "config.yaml" and command == "runs":
        return  # it only tells which metric to show
    before = file_contents(folder)
    with monkeypatch.context() as patch:
        failures = refuse(patch, folder / "run" / name)
        done = call(command)
    assert failures(), "the failure was met"
    assert_said(done.exit_code, done.stderr, f"run/{name}")
    assert file_contents(folder) == before


@pytest.mark.training
@pytest.mark.parametrize(
    "code",
    [errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EMFILE],
    ids=errno.errorcode.get,
)
def test_a_resume_is_exact_once_the_newest_checkpoint_can_be_read_again(
    code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(make_config(**{**SMALL, "stop": {"last_step": 6}}), folder / "unbroken")
    with monkeypatch.context() as patch:
        refuse(patch, folder / "run" / NEWEST, code)
        with pytest.raises(UnreadableError, match=os.strerror(code)):
            resume(folder / "run", last_step=6)
    assert resume(folder / "run", last_step=6).same_bits(expected)
    assert not list((folder / "run" / "checkpoints").glob("*.aside*"))


@pytest.mark.training
def test_a_checkpoint_that_stays_unreadable_can_be_passed_by_from_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(make_config(**{**SMALL, "stop": {"last_step": 6}}), folder / "unbroken")
    content = (folder / "run" / NEWEST).read_bytes()
    with monkeypatch.context() as patch:
        refuse(patch, folder / "run" / NEWEST)
        with pytest.raises(UnreadableError, match=r"with: stepctl resume .*run --from-step N"):
            resume(folder / "run", last_step=6)
    with monkeypatch.context() as patch:
        real = os.rename

        def rename(*arguments: object, **options: object) -> None:
            real(*arguments, **options)  # type: ignore[arg-type]
            patch.undo()  # under its new name nobody reads it, and under the old one is a new file

        refuse(patch, folder / "run" / NEWEST)
        patch.setattr(os, "rename", rename)
        assert resume(folder / "run", from_step=2, last_step=6).same_bits(expected)
    assert (folder / "run" / f"{NEWEST}.aside-1").read_bytes() == content


@pytest.mark.training
@pytest.mark.parametrize("command", ["resume", "train --or-resume", "runs"])
def test_without_a_ledger_no_run_starts_while_the_checkpoints_are_unreadable(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "run" / "ledger.jsonl").unlink()
    before = file_contents(folder)
    with monkeypatch.context() as patch:
        refuse(patch, folder / "run" / "checkpoints", errno.ESTALE, (*NAMES, "stat", "lstat"))
        done = call(command)
    assert_said(done.exit_code, done.stderr, "run/checkpoints")
    assert file_contents(folder) == before


LINKS = {
    "the checkpoints": "run/checkpoints",
    "the run": "run",
    "the newest records": "run/ledger.jsonl",
}
WITH_A_SANDBOX = {
    "inspect": ["inspect", "run"],
    "verify": ["verify", "run"],
    "diff": ["diff", "run", "run"],
}


@pytest.mark.training
@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("command", [*COMMANDS, *WITH_A_SANDBOX])
def test_a_link_to_an_unmounted_disk_is_not_an_empty_run(
    command: str, name: str, folder: Path
) -> None:
    if (command, name) == ("runs", "the run"):
        return  # a folder that is a link to nothing: see below
    disk = folder / "disk"
    os.rename(folder / LINKS[name], disk)
    (folder / LINKS[name]).symlink_to(disk)
    os.rename(disk, folder / "unmounted")
    before = file_contents(folder)
    done = CliRunner().invoke(cli, {**COMMANDS, **WITH_A_SANDBOX}[command])
    assert_said(
        done.exit_code,
        done.stderr + done.stdout,
        f"it is a link to {disk}, which does not exist; mount its disk",
    )
    assert file_contents(folder) == before
    assert not (folder / "new" / "config.yaml").exists()


@pytest.mark.training
def test_runs_in_a_folder_that_cannot_be_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, folder)
        assert_said((done := CliRunner().invoke(cli, ["runs", "."])).exit_code, done.stderr, ".: ")


@pytest.mark.training
def test_runs_shows_the_others_beside_one_that_cannot_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "run", folder / "second")
    with monkeypatch.context() as patch:
        refuse(patch, folder / "run" / NEWEST)
        done = CliRunner().invoke(cli, ["runs", "."])
    assert done.exit_code == Exit.NEGATIVE
    states = {line.split()[0]: line.split()[-3] for line in done.stdout.splitlines()[1:]}
    assert states == {"run": "unreadable", "second": "finished"}


def large_state() -> TrainState:
    """A state whose file no buffer holds whole."""
    params = Arena({"weight": (100_000,)}, "float32")
    return TrainState(Counters({"global_step": STEP, "samples_seen": 1}), {"params": params})


def test_a_checkpoint_in_the_way_that_cannot_be_read_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, large_state())
    with monkeypatch.context() as patch:
        refuse(patch, path)
        with pytest.raises(UnreadableError):
            Store(tmp_path).publish(STEP, [b"another file"])
    assert os.listdir(tmp_path) == [path.name]


def test_a_read_that_fails_inside_the_hdf5_library(tmp_path: Path) -> None:
    path = written(tmp_path, large_state())

    def break_reading(digest: str) -> None:
        """Exchange the open file for one that cannot be read."""
        write_only = os.open(path, os.O_WRONLY)
        for name in os.listdir("/proc/self/fd"):
            if int(name) != write_only and os.path.realpath(f"/proc/self/fd/{name}") == str(path):
                os.dup2(write_only, int(name), inheritable=False)
        os.close(write_only)

    with pytest.raises(UnreadableError, match=f"{path}: cannot be read now: Bad file descriptor"):
        codec.Reader(path, break_reading)


@pytest.mark.process
@pytest.mark.parametrize("command", ["resume", *WITH_A_SANDBOX])
def test_a_checkpoint_that_this_user_may_not_read(command: str, folder: Path) -> None:
    """With real permissions, in the process that reads what may be hostile too."""
    without_rights = (
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    )
    if without_rights and shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing: root may read any file")
    (folder / "run" / NEWEST).chmod(0)
    arguments = {**COMMANDS, **WITH_A_SANDBOX}[command]
    done = subprocess.run(
        [*without_rights, sys.executable, "-m", "stepctl", *arguments],
        capture_output=True,
        text=True,
    )
    said = done.stderr + "".join(
        line for line in done.stdout.splitlines(keepends=True) if "unreadable" in line
    )
    assert_said(
        done.returncode,
        said,
        f"run/{NEWEST}: cannot be read now: Permission denied; make it readable for this user",
    )


@pytest.mark.training
def test_a_config_file_that_cannot_be_read_now_is_not_a_usage_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, folder / "c.yaml", errno.EACCES)
        done = CliRunner().invoke(cli, ["train", "--config", "c.yaml", "--run-dir", "another"])
    assert_said(done.exit_code, done.stderr, "c.yaml")


DATA = {
    "csv": {"name": "csv", "path": "a"},
    "arrays": {"name": "arrays", "path": "a"},
    "hdf5": {"name": "hdf5", "path": "a"},
    "idx": {"name": "idx", "images": "a", "labels": "a"},
}


@pytest.mark.training
@pytest.mark.parametrize("kind", DATA)
def test_data_that_cannot_be_read_now_are_not_called_wrong(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a").write_bytes(b"some content")
    (folder / "d.yaml").write_text(yaml.dumps({**SMALL, "data": DATA[kind]}))
    with monkeypatch.context() as patch:
        refuse(patch, folder / "a", errno.ESTALE)
        done = CliRunner().invoke(cli, ["train", "--config", "d.yaml", "--run-dir", "another"])
    assert_said(done.exit_code, done.stderr, "a: cannot be read now: Stale file handle")
    assert not (folder / "another").exists()


@pytest.mark.training
def test_a_non_finite_loss_is_reported_although_the_checkpoints_cannot_be_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = make_config(**{**SMALL, "optimizer": {"name": "sgd", "learning_rate": 1e30}})
    real, listed = os.listdir, []

    def listdir(path: str | int = ".") -> list[str]:
        where = (
            os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(path)
        )
        if where.endswith("new/checkpoints") and listed:
            raise OSError(errno.EIO, os.strerror(errno.EIO), where)
        return real(path)

    class Breaks(Hook):
        """Breaks the disk after the first step."""

        name = "breaks"

        def after_step(self, state: TrainState, metrics: Metrics) -> None:
            listed.append(metrics)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(NonFiniteError, match=r"lower the learning rate or clip the gradient"):
        train(diverging, folder / "new", hooks=(Breaks(),))
