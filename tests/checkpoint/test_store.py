"""The checkpoint store: an acknowledged checkpoint is never lost, a damaged one never loaded."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint import codec, retention, user_block
from stepctl.checkpoint.names import step_of
from stepctl.checkpoint.store import Store
from stepctl.config.model import CheckpointConfig
from stepctl.errors import CheckpointError, Exit, StepctlError
from stepctl.state.arena import Arena
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from tests.support.messages import without_paths
from tests.support.runs import RUN_ID, file_bytes


def parts(step: int) -> codec.Image:
    params = Arena({"weight": (2,)}, "float32")
    params["weight"][:] = step
    counters = Counters({"global_step": step, "samples_seen": 8 * step})
    state = TrainState(counters, {"params": params})
    return codec.encode(state, run="moon", run_id=RUN_ID, config="seed: 0\n", numerics="{}")


def make_store(folder: Path, *steps: int) -> Store:
    store = Store(folder / "checkpoints")
    store.path.mkdir()
    for step in steps:
        store.publish(step, parts(step))
    return store


def contents(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path.iterdir()}


def names(store: Store) -> list[str]:
    return sorted(os.listdir(store.path))


def damage(store: Store, step: int) -> None:
    path = store.file(step)
    data = bytearray(path.read_bytes()) if path.exists() else bytearray(file_bytes(parts(step)))
    data[-1] ^= 1
    path.write_bytes(data)


def newest_step(store: Store, report: Callable[[str], None] = print) -> int:
    with store.newest(report) as reader:
        weight = np.empty(2, np.float32)
        reader.read_into("params/weight", weight)
        assert weight.tolist() == [reader.header.global_step] * 2
        return reader.header.global_step


class Calls:
    """Replaces the os functions that publish uses by ones that log each call, and fail a chosen one."""

    NAMES = ("open", "write", "fsync", "rename", "close")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.log: list[tuple[str, str]] = []  # (function, file name it acts on)
        self.flags: dict[str, int] = {}
        self.failing: tuple[int, int] | None = None  # (number of the call, errno)
        self.fsync_failed: set[int] = set()  # descriptors, until they are closed
        self._names: dict[int, str] = {}
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def fail(self, number: int, error: int) -> None:
        self.log.clear()
        self.failing = (number, error)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            on = self._acts_on(name, arguments[0])
            if on is None:
                return real(*arguments, **options)
            if name == "fsync":
                assert arguments[0] not in self.fsync_failed, (
                    "fsync tried again on a descriptor where it failed"
                )
            if name != "close":
                self.log.append((name, on))
                if self.failing is not None and len(self.log) == self.failing[0]:
                    if name == "fsync":
                        self.fsync_failed.add(arguments[0])
                    raise OSError(self.failing[1], os.strerror(self.failing[1]))
            result = real(*arguments, **options)
            if name == "open":
                self._names[result], self.flags[on] = on, arguments[1]
            elif name == "close":
                self.fsync_failed.discard(arguments[0])
                del self._names[arguments[0]]
            return result

        return call

    def _acts_on(self, name: str, first: Any) -> str | None:
        if isinstance(first, int):
            return self._names.get(first)
        path = Path(first)
        if path == self.folder:
            return "the directory"
        return path.name if path.parent == self.folder and name in ("open", "rename") else None


def test_publish_is_durable_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    data = file_bytes(parts(5))
    calls = Calls(monkeypatch, store.path)
    digest = store.publish(5, parts(5))
    calls.log.append(("acknowledged", ""))
    temporary = calls.log[0][1]
    assert step_of(temporary) is None
    assert calls.flags[temporary] & (os.O_EXCL | os.O_CREAT) == os.O_EXCL | os.O_CREAT
    without_repeats = [
        call for at, call in enumerate(calls.log) if at == 0 or calls.log[at - 1] != call
    ]
    assert without_repeats == [
        ("open", temporary),
        ("write", temporary),
        ("fsync", temporary),
        ("rename", temporary),
        ("open", "the directory"),
        ("fsync", "the directory"),
        ("open", "step-00000005.h5"),  # read back
        ("acknowledged", ""),
    ]
    assert store.file(5).read_bytes() == data
    assert digest == hashlib.sha256(data[512:]).hexdigest()
    assert names(store) == ["step-00000005.h5"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = make_store(tmp_path), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1000]))
    store.publish(5, parts(5))
    assert store.file(5).read_bytes() == file_bytes(parts(5))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_no_failure_harms_an_older_checkpoint(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, 3, 4)
    before = contents(store)
    calls = Calls(monkeypatch, store.path)
    store.publish(5, parts(5))
    steps_of_a_publish = [call for call in calls.log if call != ("open", "step-00000005.h5")]
    assert {name for name, _ in steps_of_a_publish} == {"open", "write", "fsync", "rename"}
    os.unlink(store.file(5))
    for number, (name, _) in enumerate(steps_of_a_publish, start=1):
        calls.fail(number, error)
        with pytest.raises(StepctlError) as caught:
            store.publish(5, parts(5))
        assert len(calls.log) >= number, "the failure was met"
        assert caught.value.exit_code == Exit.NEGATIVE
        assert "step-00000005.h5" in str(caught.value)
        assert os.strerror(error) in str(caught.value)
        left = contents(store)
        renamed = left.pop("step-00000005.h5", None)  # when only the directory's fsync failed
        assert left == before, f"after a failed {name}"
        assert renamed is None or renamed == file_bytes(parts(5))
        assert newest_step(store) == (4 if renamed is None else 5)
        store.file(5).unlink(missing_ok=True)
    calls.failing = None
    store.publish(5, parts(5))
    assert newest_step(store) == 5
    assert {
        name: data for name, data in contents(store).items() if name != "step-00000005.h5"
    } == before


def test_the_next_publish_of_a_step_succeeds_after_any_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, 4)
    calls = Calls(monkeypatch, store.path)
    for number in range(1, 7):
        calls.fail(number, errno.EIO)
        with pytest.raises(StepctlError):
            store.publish(5, parts(5))
        calls.failing = None
        assert store.publish(5, parts(5)) == hashlib.sha256(file_bytes(parts(5))[512:]).hexdigest()
        assert newest_step(store) == 5
        store.file(5).unlink()


def test_a_checkpoint_that_reads_back_damaged_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    store = make_store(tmp_path, 4)
    real = os.write

    def damaging(descriptor: int, data: memoryview) -> int:
        return real(descriptor, data if len(data) <= 512 else bytes(data[:-1]) + b"?")

    monkeypatch.setattr(os, "write", damaging)
    with pytest.raises(StepctlError) as caught:
        store.publish(5, parts(5))
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert newest_step(store, lambda message: None) == 4


@pytest.mark.parametrize("at", [0, 511, 512, (1 << 18) + 511, (1 << 18) + 512, 300_000, 599_999])
def test_one_wrong_byte_anywhere_is_seen_as_the_file_reads_back(at: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = bytes(range(256)) * 2400
    chunks = [data[:512], memoryview(data)[512:600_000]]
    written = bytearray(data[:600_000])
    path.write_bytes(written)
    user_block.check_content(path, chunks)
    written[at] ^= 1
    path.write_bytes(written)
    with pytest.raises(CheckpointError, match="other bytes"):
        user_block.check_content(path, chunks)


@pytest.mark.parametrize("length", [599_999, 600_001])
def test_a_file_of_another_length_is_seen_as_it_reads_back(
    length: int, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "file").write_bytes(bytes(length))
    with pytest.raises(CheckpointError) as caught:
        user_block.check_content(tmp_path / "file", [bytes(600_000)])
    assert str(caught.value) == snapshot


# --- the newest good one


def test_the_newest_is_the_highest_step_not_the_latest_name_or_time(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path, 100_000_000, 99_999_999, 5)
    os.utime(store.file(5), (2e9, 2e9))
    for stranger in (
        "step-00000200.h5.aside-1",
        ".step-00000300.h5.tmp-1",
        "step-400.h5",
        "step-000000500.h5",
        "latest",
    ):
        (store.path / stranger).write_bytes(b"junk")
    assert store.steps() == [5, 99_999_999, 100_000_000]
    assert newest_step(store, pytest.fail) == 100_000_000


BAD_STEPS = range(11, 19)
FILE_SIZES = (r"\d+(?= bytes instead of)", r"(?<=bytes instead of )\d+")


def write_bad_files(store: Store) -> None:
    """Write a bad file of every kind, one at each of BAD_STEPS; there may be a good one of step 10."""
    damage(store, 11)
    store.file(12).write_bytes(file_bytes(parts(12))[:-100])
    store.file(13).write_bytes(b"")
    store.file(14).write_bytes(file_bytes(parts(14)).replace(b"checkpoint 2", b"checkpoint 0", 1))
    store.file(15).symlink_to(store.file(10))
    store.file(16).mkdir()
    os.mkfifo(store.file(17))
    store.file(18).write_bytes(file_bytes(parts(10)))


def test_bad_newer_files_are_reported_and_left_in_place(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    store = make_store(tmp_path, 9, 10)
    write_bad_files(store)
    before = names(store)
    said: list[str] = []
    assert newest_step(store, said.append) == 10
    said.sort()
    assert [line.partition(":")[0] for line in said] == [store.file(i).name for i in BAD_STEPS]
    assert [without_paths(line, FILE_SIZES) for line in said] == snapshot
    assert names(store) == before


def test_older_files_are_not_reported(tmp_path: Path) -> None:
    store = make_store(tmp_path, 9, 10)
    damage(store, 9)
    assert newest_step(store, pytest.fail) == 10


def test_without_a_good_checkpoint_the_exit_code_is_3_and_every_reason_is_listed(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    store = make_store(tmp_path)
    write_bad_files(store)
    with pytest.raises(CheckpointError) as caught:
        store.newest(pytest.fail)
    assert (caught.value.exit_code, caught.value.code) == (3, "none")
    assert all(store.file(step).name in str(caught.value) for step in BAD_STEPS)
    assert without_paths(str(caught.value), FILE_SIZES, HERE=tmp_path) == snapshot


@pytest.mark.parametrize("exists", [True, False], ids=["an empty folder", "no folder"])
def test_without_any_checkpoint_the_exit_code_is_3(
    exists: bool, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    store = make_store(tmp_path) if exists else Store(tmp_path / "nowhere")
    with pytest.raises(CheckpointError) as caught:
        store.newest(pytest.fail)
    assert caught.value.exit_code == 3
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


def test_a_missing_step_is_refused_and_the_available_ones_are_listed(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    store = make_store(tmp_path, 3, 5)
    with pytest.raises(CheckpointError) as caught:
        store.open(4)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    with store.open(3) as reader:
        assert reader.header.global_step == 3


# --- setting aside


def test_a_damaged_file_in_the_way_is_set_aside_not_replaced(tmp_path: Path) -> None:
    store = make_store(tmp_path, 5)
    for number in (1, 2):
        damage(store, 5)
        damaged = store.file(5).read_bytes()
        store.publish(5, parts(5))
        assert (store.path / f"step-00000005.h5.aside-{number}").read_bytes() == damaged
    assert newest_step(store, pytest.fail) == 5
    assert names(store) == [
        "step-00000005.h5",
        "step-00000005.h5.aside-1",
        "step-00000005.h5.aside-2",
    ]
    assert store.steps() == [5]


@pytest.mark.parametrize("step", [15, 16, 17], ids=["symbolic link", "directory", "fifo"])
def test_any_file_under_a_checkpoints_name_is_set_aside(step: int, tmp_path: Path) -> None:
    store = make_store(tmp_path, 10)
    write_bad_files(store)
    store.publish(step, parts(step))
    assert store.file(step).is_file()
    assert not store.file(step).is_symlink()
    assert os.path.lexists(store.path / f"{store.file(step).name}.aside-1")
    assert store.file(10).read_bytes() == file_bytes(parts(10))


@pytest.mark.parametrize("number", [1, 2, 3], ids=["rename", "open", "fsync"])
def test_a_failure_to_set_aside_harms_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, 4, 5)
    damage(store, 5)
    damaged = store.file(5).read_bytes()
    calls = Calls(monkeypatch, store.path)
    calls.fail(number, errno.EIO)
    with pytest.raises(StepctlError, match=os.strerror(errno.EIO)):
        store.publish(5, parts(5))
    calls.failing = None
    assert damaged in contents(store).values()
    assert newest_step(store, lambda message: None) == 4
    store.publish(5, parts(5))
    assert newest_step(store, pytest.fail) == 5


# --- retention

KEPT: list[tuple[list[int], int | None, list[int]]] = [
    ([], 3, []),
    ([], None, []),
    ([5], 1, []),
    ([5], 3, []),
    ([1, 2, 3], 3, []),
    ([1, 2, 3, 4], 3, [1]),
    ([0, 50, 100, 150, 200], 3, [0, 50]),
    ([200, 0, 150, 50, 100], 3, [0, 50]),
    ([1, 2, 3, 4], 1, [1, 2, 3]),
    ([1, 2, 3, 4], None, []),
    ([9, 10, 100_000_000], 1, [9, 10]),
]


@pytest.mark.parametrize(("steps", "keep_last", "pruned"), KEPT)
def test_retention(steps: list[int], keep_last: int | None, pruned: list[int]) -> None:
    keep = CheckpointConfig(keep_last=keep_last)
    assert retention.to_prune(steps, keep, {}) == pruned
    assert retention.to_prune(iter(steps), keep, {}) == pruned
    assert not steps or max(steps) not in pruned


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_prune_removes_the_oldest_and_nothing_else(keep_last: int, tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, 10, 20, 30)
    (store.path / "step-00000005.h5.aside-1").write_bytes(b"kept")
    store.remove(retention.to_prune(store.steps(), CheckpointConfig(keep_last=keep_last), {}))
    assert store.steps() == [0, 10, 20, 30][-keep_last:]
    assert (store.path / "step-00000005.h5.aside-1").read_bytes() == b"kept"
    assert newest_step(store, pytest.fail) == 30


@pytest.mark.parametrize("keep_last", [1, 2, 8])
def test_a_bad_newer_file_never_costs_a_good_one(keep_last: int, tmp_path: Path) -> None:
    store = make_store(tmp_path, 8, 9)
    write_bad_files(store)
    store.publish(10, parts(10))
    good = [step for step in store.steps() if step <= 10]
    store.remove(retention.to_prune(good, CheckpointConfig(keep_last=keep_last), {}))
    assert store.steps() == [8, 9, 10][-keep_last:] + list(BAD_STEPS)
    assert newest_step(store, lambda message: None) == 10
