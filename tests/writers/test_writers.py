"""metrics.csv and TensorBoard hold each step once, with the values of metrics.jsonl."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.config.model import Config
from stepctl.errors import ConfigError, Exit, StepctlError
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.rundir.directory import RunDirectory
from stepctl.state.train_state import TrainState
from stepctl.system import optional
from stepctl.system.folder import Folder
from stepctl.writers.csv import CSV
from stepctl.writers.jsonl import JSONLines
from stepctl.writers.tensorboard import TensorBoard
from tests.support.messages import without_paths
from tests.support.runs import make_config, resume, train

LOG = {"every": 3, "csv": True, "tensorboard": True, "histograms": 5}


class Killed(BaseException):
    """Stands for a kill."""


class Kill(Hook):
    name = "kill"
    essential = True  # a kill leaves nothing to save

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self._step:
            raise Killed


def small(last_step: int, **sections: Any) -> Config:
    sections = {
        "log": LOG,
        "evaluate": {"every": 4},
        "checkpoint": {"every": 10, "keep_last": None},
        **sections,
    }
    return make_config(stop={"last_step": last_step}, **sections)


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def table(path: Path) -> list[dict[str, str]]:
    with open(path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def curves(path: Path) -> dict[str, dict[int, float]]:
    """Return tag -> step -> value as TensorBoard's own reader has them; no step may come twice."""
    reader = optional.require(
        "tensorboard.backend.event_processing.event_accumulator", "tensorboard"
    )
    found = reader.EventAccumulator(str(path / "tensorboard"), {"scalars": 0, "histograms": 0})
    found.Reload()
    points = {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }
    for tag in found.Tags()["histograms"]:
        points[tag] = [(event.step, event.histogram_value.num) for event in found.Histograms(tag)]
    for tag, each in points.items():
        steps = [step for step, _ in each]
        assert steps == sorted(set(steps)), tag
    return {tag: dict(each) for tag, each in points.items()}


def expected_curves(path: Path) -> dict[str, dict[int, float]]:
    """Return the same of metrics.jsonl, in the 32 bits that TensorBoard keeps."""
    found: dict[str, dict[int, float]] = {}
    for row in metrics(path):
        folder = {"train": "train", "eval": "validation"}[row["kind"]]
        for name in row.keys() - {"step", "kind", "extra"} if not row.get("extra") else ():
            found.setdefault(f"{folder}/{name}", {})[row["step"]] = float(np.float32(row[name]))
    return found


def check_curves(path: Path) -> None:
    found = {
        tag: each for tag, each in curves(path).items() if tag.startswith(("train/", "validation/"))
    }
    seconds = found.pop("train/step_seconds")
    rates = {
        row["step"]: row["samples_per_second"] for row in metrics(path) if row["kind"] == "train"
    }
    assert all(value == pytest.approx(48 / rates[step]) for step, value in seconds.items())
    assert found == expected_curves(path)
    assert seconds.keys() == found["train/loss"].keys()


def check_table(path: Path) -> None:
    rows = table(path)
    expected = [
        {key: str(item).lower() if item is True else str(item) for key, item in row.items()}
        for row in metrics(path)
    ]
    assert [{key: cell for key, cell in row.items() if cell} for row in rows] == expected
    columns = list(
        dict.fromkeys(["step", "kind", "extra", *(name for row in metrics(path) for name in row)])
    )
    assert list(rows[0]) == columns


@pytest.mark.training
def test_stopped_off_the_grid_and_resumed_each_step_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(20), path)  # 20 is off the training rows' grid, and on the others'
    check_curves(path)
    resume(path, last_step=31)
    check_curves(path)
    check_table(path)
    resume(path, last_step=35, from_step=10)
    check_curves(path)
    check_table(path)
    assert list(curves(path)["train/loss"]) == [1, *range(3, 36, 3)]
    assert list(curves(path)["validation/accuracy"]) == list(range(4, 36, 4))
    assert curves(path)["dense0/weight"] == dict.fromkeys(range(5, 36, 5), 64 * 16)


@pytest.mark.training
def test_a_lost_tail_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Killed):
        train(small(40), path, (Kill(18),))
    assert max(curves(path)["train/loss"]) == 18
    for torn in ("metrics.jsonl", "metrics.csv"):
        with open(path / torn, "ab") as file:
            file.write(b'{"step": 1')
    (events,) = (path / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-7])
    resume(path, last_step=17)
    check_curves(path)
    check_table(path)
    assert max(curves(path)["train/loss"]) == 15
    resume(path, last_step=40)
    check_curves(path)
    check_table(path)


def test_files_of_two_segments_are_read_in_order_even_if_clocks_disagree(
    tmp_path: Path,
) -> None:
    row = {"step": 7, "kind": "train", "loss": 1.0}
    for segment, (start, loss, now) in enumerate([(0, 1.0, 2e9), (5, 2.0, 1e9), (5, 3.0, 1e9)]):
        writer = TensorBoard(
            Folder(tmp_path / "tensorboard"),
            segment=1,
            start=start,
            batch_size=1,
            clock=lambda now=now: now,  # type: ignore[misc]
        )
        writer.write([{**row, "loss": loss}])
        writer.close()
        assert len(list((tmp_path / "tensorboard").iterdir())) == segment + 1
    assert curves(tmp_path) == {"train/loss": {7: 3.0}}


def test_a_nan_value_is_saved_as_nan(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    jsonl, lines = JSONLines(directory), CSV(directory)
    board = TensorBoard(directory.folder.subfolder("tensorboard"), segment=1, start=0, batch_size=1)
    rows = [
        {"step": 1, "kind": "train", "loss": float("nan"), "samples_per_second": 0.0},
        {"step": 2, "kind": "train", "loss": -float("inf"), 'odd, "name"': 0.1},
    ]
    for writer in (jsonl, lines, board):
        writer.write(rows)
    board.write_histograms(
        1,
        {
            "w": np.array([1, np.nan, 2], "f4"),
            "empty": np.zeros(0, "f4"),
            "huge": np.array([-1e308, 1e308]),
        },
    )
    for writer in (jsonl, lines, board):
        writer.sync()
        writer.close()
    check_table(tmp_path)
    found = curves(tmp_path)
    assert np.isnan(found["train/loss"][1])
    assert found["train/loss"][2] == -float("inf")
    assert found["w"] == {1: 2}
    assert not found.keys() & {"empty", "huge", "train/step_seconds"}


@pytest.mark.parametrize("writer", [CSV, TensorBoard])
def test_a_full_disk_ends_training_with_a_plain_line(
    writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    def full(descriptor: int, chunk: bytes) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if (".csv" in name if writer is CSV else "tfevents" in name) and (
            b"5" in chunk or b"loss" in chunk
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.write(descriptor, chunk)

    monkeypatch.setattr("stepctl.writers.base.write_all", full)
    with pytest.raises(StepctlError) as caught:
        train(small(20), tmp_path / "run")
    assert (
        without_paths(str(caught.value), (r"(?<=tfevents\.)\S+(?=:)",), HERE=tmp_path) == snapshot
    )


@pytest.mark.training
def test_a_stillborn_start_leaves_nothing_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"

    def cut(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("stepctl.checkpoint.store.Store.publish", cut)
        with pytest.raises(Killed):
            train(small(20), path)
    assert (path / "metrics.csv").exists()
    train(small(20), path)
    check_curves(path)
    check_table(path)
    assert len(list((path / "tensorboard").iterdir())) == 1


def test_histograms_need_tensorboard(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(log={"histograms": 5})
    assert str(caught.value) == snapshot


@pytest.mark.training
@pytest.mark.parametrize("resumed", [False, True])
def test_a_missing_package_is_reported_before_any_work(
    resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "run"
    if resumed:
        train(small(10, log={"every": 3}), path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for name in ("event_pb2", "summary_pb2"):
        monkeypatch.setitem(sys.modules, f"tensorboard.compat.proto.{name}", None)
    with pytest.raises(ConfigError) as caught:
        resume(path, last_step=20, assignments=("log.tensorboard=true",)) if resumed else train(
            small(10), path
        )
    assert without_paths(str(caught.value), (r"(?<=imported \().*(?=\); )",)) == snapshot
    assert caught.value.exit_code == Exit.USAGE
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.process
def test_tensorboard_says_nothing_to_the_user_of_stepctl() -> None:
    code = "from stepctl.writers import tensorboard; tensorboard.load()"
    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.training
def test_a_table_is_rewritten_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    train(small(20), path)
    before = table(path)

    def cut(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", cut)
        with pytest.raises(Killed):
            CSV(RunDirectory(path))
    assert table(path) == before
    check_table(path)


def test_warnings_of_packages_are_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy_package.py").write_text(
        "import warnings\nwarnings.warn('pkg_resources is deprecated')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    optional.require("noisy_package", "noise")


@pytest.mark.parametrize("fails", [False, True])
def test_written_rows_are_synced_once(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        if fails and len(synced) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("stepctl.writers.base.fsync", fsync)
    (tmp_path / "run").mkdir()
    writer = JSONLines(RunDirectory(tmp_path / "run"))
    writer.sync()  # rows of an earlier segment
    writer.sync()
    writer.write([{"step": 1, "kind": "train"}])
    if fails:
        with pytest.raises(StepctlError):
            writer.sync()
    writer.sync()
    writer.sync()
    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert synced == [0] + [size] * (1 + fails)
    writer.close()


def long_table(path: Path) -> tuple[RunDirectory, bytes]:
    """Write metrics.jsonl with rows of the steps 1 to 9,000, and metrics.csv; return the table."""
    directory = RunDirectory(path)
    rows = ({"step": step, "kind": "train", "loss": step / 7} for step in range(1, 9_001))
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    CSV(directory).close()
    return directory, directory.csv.read_bytes()


def test_a_long_table_is_cut_after_the_newest_rows_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, whole = long_table(tmp_path)
    directory.metrics_after(8_990).cut(pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr(CSV, "_rewrite", pytest.fail)
        writer = CSV(directory)
    assert directory.csv.read_bytes() == b"".join(whole.splitlines(keepends=True)[:8_991])
    writer.write([{"step": 8_991, "kind": "train", "loss": 8_991 / 7}])
    writer.close()
    assert directory.csv.read_bytes() == b"".join(whole.splitlines(keepends=True)[:8_992])


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "rows are missing at the end": lambda table: table[:-40],
    "another newest row": lambda table: table.replace(b"\n9000,", b"\n9001,"),
    "a column is missing": lambda table: table.replace(b",loss", b"", 1),
    "another first column": lambda table: table.replace(b"step,kind", b"kind,step", 1),
    "not UTF-8": lambda table: b"\xff" + table,
    "empty": lambda table: b"",
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_long_table_without_the_newest_rows_is_rewritten(
    spoil: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    directory, whole = long_table(tmp_path)
    directory.csv.write_bytes(spoil(whole))
    CSV(directory).close()
    assert directory.csv.read_bytes() == whole
