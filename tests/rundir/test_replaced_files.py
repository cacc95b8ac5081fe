"""Files of a run that are removed or replaced during training admit no second trainer and lose no row."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.errors import Exit, RunInUseError, RunMovedError, StepctlError
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run
from stepctl.writers.jsonl import JSONLines
from tests.support.act_at import ActAt
from tests.support.messages import without_paths
from tests.support.runs import make_config, rows, train

CONFIG: dict[str, Any] = {
    "model": {"name": "linear"},
    "log": {"every": 1, "csv": True},
    "checkpoint": {"every": 2},
    "stop": {"last_step": 12},
}


def train_with(path: Path, act: Callable[[], object], **sections: Any) -> None:
    config = make_config(**{**CONFIG, **sections})
    with create_run(config, RunDirectory(path), hooks=[ActAt(5, act)]) as segment:
        segment.train()


# --- the lock


@pytest.mark.training
def test_a_lock_that_was_removed_admits_no_second_trainer(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def start_another() -> None:
        (path / "lock").unlink()
        with (
            pytest.raises(RunInUseError, match="run: in use by another process"),
            RunDirectory(path).lock(),
        ):
            pass

    train_with(path, start_another)
    assert verify(str(path))[1] == []
    with RunDirectory(path).lock():
        pass


@pytest.fixture
def no_lock_on_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.training
@pytest.mark.usefixtures("no_lock_on_directories")
@pytest.mark.parametrize("again", [False, True], ids=["removed", "taken by another process"])
def test_without_directory_locks_the_first_trainer_stops_at_its_next_write(
    again: bool, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path, ledger = tmp_path / "run", list[bytes]()

    def remove() -> None:
        (path / "lock").unlink()
        if again:
            with RunDirectory(path).lock():
                pass
        ledger.append((path / "ledger.jsonl").read_bytes())

    with pytest.raises(RunMovedError) as caught:
        train_with(path, remove, checkpoint={"every": 1000})
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert caught.value.exit_code == Exit.NEGATIVE
    assert (path / "ledger.jsonl").read_bytes() == ledger[0]


@pytest.mark.usefixtures("no_lock_on_directories")
def test_without_directory_locks_the_file_excludes(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).lock(), pytest.raises(RunInUseError), RunDirectory(tmp_path).lock():
        pass


def test_a_lock_that_is_a_fifo_is_named(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    os.mkfifo(tmp_path / "lock")
    with (
        pytest.raises(StepctlError) as caught,
        RunDirectory(tmp_path).lock(),
    ):
        pass
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


# --- the rows

EDITS: dict[str, Callable[[bytes], bytes]] = {
    "unchanged": lambda data: data,
    "with a line more": lambda data: data + b'{"note": "lower the rate?"}\n',
}


@pytest.mark.training
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_rows_continue_in_a_file_that_an_editor_rewrote(
    edit: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    train(make_config(**CONFIG), tmp_path / "unbroken")

    def replace() -> None:
        new = path / "sed12345"
        new.write_bytes(edit((path / "metrics.jsonl").read_bytes()))
        new.rename(path / "metrics.jsonl")

    train_with(path, replace)
    assert [row for row in rows(path) if "step" in row] == rows(tmp_path / "unbroken")
    assert verify(str(path))[1] == []


@pytest.mark.training
def test_rows_that_were_removed_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(make_config(**CONFIG), tmp_path / "unbroken")
    train_with(path, (path / "metrics.jsonl").unlink)
    assert rows(path) == rows(tmp_path / "unbroken")


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "a row less": lambda data: data.split(b"\n", 1)[1],
    "another value": lambda data: data.replace(b'"loss": ', b'"loss": 1', 1),
    "cut in a line": lambda data: data[:-3],
    "an unfinished line more": lambda data: data + b"{",
}


@pytest.mark.training
@pytest.mark.parametrize("edit", CUTS.values(), ids=CUTS.keys())
def test_a_file_that_lost_rows_stops_the_run_and_the_rows_are_kept(
    edit: Callable[[bytes], bytes], tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path, written = tmp_path / "run", list[bytes]()

    def replace() -> None:
        written.append((path / "metrics.jsonl").read_bytes())
        (path / "new").write_bytes(edit(written[0]))
        (path / "new").rename(path / "metrics.jsonl")

    with pytest.raises(StepctlError) as caught:
        train_with(path, replace)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert caught.value.exit_code == Exit.NEGATIVE
    assert (path / "metrics.jsonl.aside-1").read_bytes().startswith(written[0])
    assert (path / "metrics.jsonl").read_bytes() == edit(written[0])


@pytest.mark.training
def test_rows_that_were_cut_off_in_place_stop_the_run(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "run"
    with pytest.raises(StepctlError) as caught:
        train_with(path, lambda: os.truncate(path / "metrics.jsonl", 0))
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


@pytest.mark.training
def test_a_removed_table_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_with(path, (path / "metrics.csv").unlink)
    lines = (path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + len(
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    )


@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl"])
def test_records_are_not_written_through_a_link(
    name: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    elsewhere, directory = tmp_path / "elsewhere", RunDirectory(tmp_path / "run")
    elsewhere.write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(elsewhere)
    with (
        directory.lock(),
        pytest.raises(StepctlError) as caught,
    ):
        JSONLines(directory) if name == "metrics.jsonl" else directory.append_ledger(
            "end", reason="x"
        )
    assert without_paths(str(caught.value), (r"(?<=written: )[^;]*",), HERE=tmp_path) == snapshot
    assert elsewhere.read_text() == ""
