"""The lock, the ledger and metrics.jsonl, which has at most one row of a kind per step."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint import user_block
from stepctl.config import yaml
from stepctl.config.model import Config
from stepctl.errors import CheckpointError, ConfigError, Exit, RunInUseError, StepctlError
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.rundir import json_lines
from stepctl.rundir.directory import RunDirectory
from stepctl.state.train_state import TrainState
from stepctl.system.folder import publish
from tests.support.messages import without_paths
from tests.support.run_files import file_contents
from tests.support.runs import make_config, resume, rows, train
from tests.support.stops import some_of


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set: 60 rows of 4 numbers, 3 classes."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, x=generator.normal(size=(60, 4)), y=generator.integers(0, 3, 60))
    return path


def small(samples: Path, **sections: Any) -> Config:
    data = {"name": "arrays", "path": str(samples), "batch_size": 8, "validation_fraction": 0.5}
    model = {"name": "mlp", "hidden": [3], "dropout": 0.2}
    return make_config(**{"data": data, "model": model, "stop": {"last_step": 12}, **sections})


def ledger(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


SYSTEM_WORDS = r"(?<=cannot be written: )[^;]*"


class Power(BaseException):
    """Stands for a power cut."""


class Cut(Hook):
    """Ends a segment at a step as abruptly as a process can end its own."""

    name = "cut"

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self.step:
            raise Power


# --- the lock

HOLDER = """
import sys
from stepctl.rundir.directory import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            yield child
        finally:
            child.kill()


@pytest.mark.process
def test_a_second_holder_gets_the_pid_and_host_of_the_first(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    directory = RunDirectory(tmp_path)
    with holder(tmp_path) as child:
        with pytest.raises(RunInUseError) as caught, directory.lock():
            pass
        assert caught.value.exit_code == Exit.IN_USE
        host = os.uname().nodename
        known = {"HERE": tmp_path, "PID": child.pid, "HOST": host}
        assert without_paths(str(caught.value), **known) == snapshot
        child.kill()  # SIGKILL: it cannot clean up
        child.wait()
        with directory.lock():
            said = json.loads((tmp_path / "lock").read_text())
    assert (said["host"], said["pid"]) == (host, os.getpid())
    assert said["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.process
def test_a_second_holder_started_by_srun_gets_the_option_for_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with holder(tmp_path) as child, pytest.raises(RunInUseError) as caught:
        RunDirectory(tmp_path).lock().__enter__()
    known = {"HERE": tmp_path, "PID": child.pid, "HOST": os.uname().nodename}
    assert without_paths(str(caught.value), **known) == snapshot
    monkeypatch.setenv("PMI_RANK", "1")  # it is one already
    with holder(tmp_path), pytest.raises(RunInUseError, match=r"or stop it$"):
        RunDirectory(tmp_path).lock().__enter__()


def test_the_lock_excludes_in_one_process_too_and_ends_with_its_block(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with directory.lock(), pytest.raises(RunInUseError), RunDirectory(tmp_path).lock():
        pass
    with pytest.raises(Power), directory.lock():
        raise Power
    with directory.lock():
        pass


def test_a_lock_that_is_a_link_harms_nothing(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    (tmp_path / "thesis.tex").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "thesis.tex")
    with (
        pytest.raises(StepctlError) as caught,
        RunDirectory(tmp_path / "run").lock(),
    ):
        pass
    assert without_paths(str(caught.value), (SYSTEM_WORDS,), HERE=tmp_path) == snapshot
    assert (tmp_path / "thesis.tex").read_text() == "text"


def test_a_lock_that_cannot_be_created_is_one_clear_line(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "lock").mkdir()
    with (
        pytest.raises(StepctlError) as caught,
        RunDirectory(tmp_path).lock(),
    ):
        pass
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


@pytest.mark.process
def test_a_run_in_use_is_neither_resumed_nor_started_nor_touched(
    samples: Path, tmp_path: Path
) -> None:
    train(small(samples, stop={"last_step": 3}), tmp_path / "run")
    before = file_contents(tmp_path / "run", "lock")
    with holder(tmp_path / "run"):
        with pytest.raises(RunInUseError):
            resume(tmp_path / "run", last_step=5)
        assert file_contents(tmp_path / "run", "lock") == before
    (tmp_path / "young").mkdir()
    with holder(tmp_path / "young"):
        with pytest.raises(RunInUseError):
            train(small(samples), tmp_path / "young")
        assert not (tmp_path / "young" / "config.yaml").exists()


# --- the ledger


@pytest.mark.training
def test_the_ledger_tells_each_segment(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(samples, stop={"last_step": 5}), path)
    resume(path, last_step=12)
    first, second = ledger(path, "start")
    events = [line["event"] for line in ledger(path)]
    assert events == ["start", "checkpoint", "checkpoint", "end", "start", "checkpoint", "end"]
    assert (first["segment"], first["step"], first["target"], first["restored"]) == (1, 0, 5, None)
    assert (second["segment"], second["step"], second["target"]) == (2, 5, 12)
    assert second["restored"] == "step-00000005.h5"
    for start in (first, second):
        assert (start["host"], start["pid"], start["argv"]) == (
            os.uname().nodename,
            os.getpid(),
            sys.argv,
        )
        assert start["numerics"]["threads"] == 1
        assert {"blas_kernel", "blas", "numpy", "simd", "machine"} <= start["numerics"].keys()
    assert second["exact"] is True
    ends = [
        {key: end[key] for key in ("segment", "step", "local_step", "reason")}
        for end in ledger(path, "end")
    ]
    assert ends == [
        {"segment": 1, "step": 5, "local_step": 5, "reason": "last_step 5"},
        {"segment": 2, "step": 12, "local_step": 7, "reason": "last_step 12"},
    ]


@pytest.mark.training
def test_the_digests_in_the_ledger_are_the_files_own(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(samples, checkpoint={"every": 4, "keep_last": None}), path)
    published = ledger(path, "checkpoint")
    assert [line["step"] for line in published] == [0, 4, 8, 12]
    for line in published:
        data = (path / "checkpoints" / line["file"]).read_bytes()
        assert hashlib.sha256(data[user_block.SIZE :]).hexdigest() == line["sha256"]


@pytest.mark.training
def test_an_error_is_the_reason_of_the_end(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(Power):
        train(small(samples), tmp_path / "run", (Cut(4),))
    (end,) = ledger(tmp_path / "run", "end")
    assert (end["step"], end["local_step"]) == (4, 4)
    assert end["reason"].startswith("Power")


@pytest.mark.training
def test_config_changes_are_in_the_ledger_old_and_new(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(samples, stop={"last_step": 3}), path)
    frozen = (path / "config.yaml").read_bytes()
    resume(
        path,
        last_step=5,
        assignments=("log.every=2", "data.batch_size=6"),
        allow_change=("data.batch_size",),
    )
    resume(path, last_step=7, assignments=("log.every=3",))
    resume(path, last_step=8)
    changes = [line.get("changes") for line in ledger(path, "start")]
    assert changes == [
        None,
        [{"key": "data.batch_size", "old": 8, "new": 6}, {"key": "log.every", "old": 7, "new": 2}],
        [{"key": "log.every", "old": 2, "new": 3}],
        None,
    ]
    assert (path / "config.yaml").read_bytes() == frozen
    newest = RunDirectory(path).newest_config().value
    assert (newest["log"]["every"], newest["data"]["batch_size"]) == (3, 6)


@pytest.mark.training
def test_a_refused_change_leaves_no_trace(
    samples: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "run"
    train(small(samples, stop={"last_step": 3}), path)
    before = file_contents(path, "lock")
    with pytest.raises(ConfigError) as caught:
        resume(path, last_step=5, assignments=("seed=2",))
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert file_contents(path, "lock") == before


@pytest.mark.training
def test_the_config_is_frozen_with_every_default_written_out(samples: Path, tmp_path: Path) -> None:
    train(small(samples), tmp_path / "run")
    frozen = yaml.load(str(tmp_path / "run" / "config.yaml")).value
    assert frozen["dtype"] == "float32"
    assert frozen["checkpoint"]["every"] == 1000
    assert frozen["checkpoint"]["keep_last"] == 3
    assert frozen["data"]["n_classes"] == 3
    assert isinstance(frozen["numerics"]["blas_kernel"], str)
    assert frozen["numerics"]["blas_kernel"] != "auto"


@pytest.mark.training
@pytest.mark.parametrize("torn", [b"{", b'{"event": "end", "step": 1', b"\x00\x00\x00"])
def test_a_torn_last_line_of_the_ledger_is_ignored_and_removed(
    torn: bytes, samples: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    train(small(samples, stop={"last_step": 3}), path)
    whole = (path / "ledger.jsonl").read_bytes()
    (path / "ledger.jsonl").write_bytes(whole + torn)
    assert RunDirectory(path).read_ledger().events == ledger_of(whole)
    resume(path, last_step=5)
    after = (path / "ledger.jsonl").read_bytes()
    assert after.startswith(whole)
    assert [line["event"] for line in ledger_of(after[len(whole) :])] == [
        "start",
        "checkpoint",
        "end",
    ]
    assert [line["segment"] for line in ledger(path, "start")] == [1, 2]


@pytest.mark.training
def test_a_last_line_that_only_lacks_its_end_is_kept(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(samples, stop={"last_step": 3}), path)
    whole = (path / "ledger.jsonl").read_bytes()
    (path / "ledger.jsonl").write_bytes(whole[:-1])
    assert RunDirectory(path).read_ledger().events == ledger_of(whole)
    resume(path, last_step=5)
    assert (path / "ledger.jsonl").read_bytes().startswith(whole)


def ledger_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


# --- metrics


def test_rows_past_the_restored_step_and_extra_rows_are_cut(samples: Path, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    kept = [{"step": 1, "kind": "train"}, {"step": 5, "kind": "train"}, {"step": 5, "kind": "eval"}]
    cut = [
        {"step": 5, "kind": "train", "extra": True},
        {"step": 6, "kind": "train"},
        {"step": 9, "kind": "eval"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in [kept[0], *cut, *kept[1:]])
    directory.metrics.write_text(text + '{"step": 5, "ki')
    cut_metrics(directory, 5)
    assert [json.loads(line) for line in directory.metrics.read_text().splitlines()] == kept


def test_metrics_without_a_row_to_cut_are_not_rewritten(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    cut_metrics(directory, 5)
    assert not directory.metrics.exists()
    directory.metrics.write_text('{"step": 5, "kind": "train"}\n')
    before = directory.metrics.stat()
    cut_metrics(directory, 5)
    assert directory.metrics.stat() == before


# rows of steps 4, 5 and 6; the file is cut back to step 4 or 5, in one system call
CUTS = {
    "later rows": (4, [0, 0, 0], "ftruncate", [4]),
    "extra rows": (6, [0, 0, 1], "ftruncate", [4, 5]),
    "an extra row before another": (6, [0, 1, 0], "rename", [4, 6]),
}


@pytest.mark.parametrize("case", CUTS)
def test_metrics_are_cut_atomically(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, extra, call, expected = CUTS[case]
    directory = RunDirectory(tmp_path)
    for number, is_extra in zip((4, 5, 6), extra, strict=True):
        row = {"step": number, "kind": "train"} | ({"extra": True} if is_extra else {})
        with directory.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
    text = directory.metrics.read_text()

    def cut_power(*_: object, **__: object) -> None:
        assert directory.metrics.read_text() == text
        raise Power

    monkeypatch.setattr(os, call, cut_power)
    with pytest.raises(Power):
        cut_metrics(directory, step)
    monkeypatch.undo()
    assert directory.metrics.read_text() == text
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    cut_metrics(directory, step)
    assert [row["step"] for row in directory.read_metrics()] == expected


@pytest.fixture
def many_rows(tmp_path: Path) -> RunDirectory:
    """Rows of the steps 1 to 20,000, in several times the bytes that are read at the end."""
    directory = RunDirectory(tmp_path)
    rows = (f'{{"step": {step}, "kind": "train", "loss": 0.5}}\n' for step in range(1, 20_001))
    directory.metrics.write_text("".join(rows))
    return directory


@pytest.mark.parametrize("step", [0, 1, 7, 5_000, 19_990, 20_000, 30_000])
def test_many_rows_are_cut_at_any_step(step: int, many_rows: RunDirectory) -> None:
    lines = many_rows.metrics.read_bytes().splitlines(keepends=True)
    with many_rows.metrics.open("ab") as file:
        file.write(b'{"step": 20000, "kind": "eval", "extra": true}\n{"step": 20')
    cut_metrics(many_rows, step)
    assert many_rows.metrics.read_bytes() == b"".join(lines[:step])


def test_only_the_end_of_many_rows_is_read(many_rows: RunDirectory) -> None:
    content = many_rows.metrics.read_bytes()
    many_rows.metrics.write_bytes(b"junk\n" + content)
    tail = many_rows.metrics_after(19_990)
    assert 0 < tail.offset < len(content) - (1 << 17)
    assert [row["step"] for row in tail.rows][-1] == 19_990
    tail.cut(pytest.fail)
    assert many_rows.metrics.read_bytes().startswith(b"junk\n")


def test_a_row_that_cannot_be_read_does_not_end_the_search(many_rows: RunDirectory) -> None:
    lines = many_rows.metrics.read_bytes().splitlines(keepends=True)
    said: list[str] = []
    junk = b"\0" * 600_000 + b"\n"  # where a row was not durable
    many_rows.metrics.write_bytes(b"".join([*lines[:9_000], junk, *lines[9_000:9_010]]))
    many_rows.metrics_after(9_000).cut(said.append)
    assert many_rows.metrics.read_bytes() == b"".join(lines[:9_000])
    assert len(said) == 1


def test_a_row_of_the_restored_step_does_not_end_the_search(
    many_rows: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extra row of that step may stand before it."""
    last = b'{"step": 20001, "kind": "eval"}\n'
    lines = many_rows.metrics.read_bytes()
    many_rows.metrics.write_bytes(lines + b'{"step": 20001, "extra": true}\n' + last)
    monkeypatch.setattr(json_lines, "_TAIL_BYTES", len(last))
    cut_metrics(many_rows, 20_001)
    assert many_rows.metrics.read_bytes() == lines + last


def test_removed_rows_are_durably_removed(
    many_rows: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they could come back after a power cut, between rows that were written later."""
    synced: list[tuple[str, int]] = []

    def fsync(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((name, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    cut_metrics(many_rows, 19_990)
    assert synced == [("metrics.jsonl", many_rows.metrics.stat().st_size)]


def cut_metrics(directory: RunDirectory, step: int) -> None:
    directory.metrics_after(step).cut(pytest.fail)


def assert_no_step_twice(path: Path) -> None:
    counts = Counter((row["step"], row["kind"]) for row in rows(path))
    assert counts
    assert max(counts.values()) == 1, counts.most_common(3)


@pytest.mark.training
@pytest.mark.parametrize("seed", some_of(range(3), every=3))
def test_no_step_has_two_rows_however_often_the_run_was_stopped(
    seed: int, samples: Path, tmp_path: Path
) -> None:
    """Ten segments: cut at random steps, resumed from older ones, stopped at targets that are then moved on."""
    choose, path, target = random.Random(seed), tmp_path / "run", 60
    cadence: dict[str, Any] = {
        "log": {"every": 3, "offset": 1},
        "evaluate": {"every": 4},
        "checkpoint": {"every": 5, "keep_last": None},
    }
    expected = train(small(samples, stop={"last_step": target}, **cadence), tmp_path / "unbroken")
    train(small(samples, stop={"last_step": 3}, **cadence), path)
    kinds = Counter[str]()
    for _ in range(10):
        kind = choose.choice(["cut", "target", "older"])
        kinds[kind] += 1
        start = choose.choice(steps_there(path)) if kind == "older" else max(steps_there(path))
        end = start + choose.randint(1, 20)
        hooks = (Cut(choose.randint(start + 1, end)),) if kind == "cut" else ()
        try:
            resume(path, last_step=end, from_step=start if kind == "older" else None, hooks=hooks)
        except Power:
            with open(path / "metrics.jsonl", "ab") as file:
                file.write(choose.choice([b"", b'{"step": 3, "kind": "train", "lo']))
        else:
            assert_no_step_twice(path)
    assert len(kinds) == 3
    state = resume(
        path, from_step=max(step for step in steps_there(path) if step < target), last_step=target
    )
    assert_no_step_twice(path)
    assert state.same_bits(expected)
    assert rows(path) == rows(tmp_path / "unbroken")


def steps_there(path: Path) -> list[int]:
    return sorted(int(file.name[5:13]) for file in (path / "checkpoints").glob("step-*.h5"))


# --- what a kill leaves behind


@pytest.mark.training
def test_a_stillborn_run_can_be_started_again(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(samples, seed=5), path)
    for file in (path / "checkpoints").iterdir():
        file.unlink()
    (path / "checkpoints" / ".step-00000000.h5.tmp-99").write_bytes(b"half")
    lines = (path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (path / "ledger.jsonl").write_text(lines[0])  # the start alone: nothing was ever acknowledged
    assert not RunDirectory(path).holds_run()
    state = train(small(samples, stop={"last_step": 2}), path)
    assert state.counters.global_step == 2
    assert [line["segment"] for line in ledger(path, "start")] == [1]
    assert [row["step"] for row in rows(path)] == [1, 2, 2]
    assert sorted(os.listdir(path / "checkpoints")) == ["step-00000000.h5", "step-00000002.h5"]
    assert "seed: 1\n" in (path / "config.yaml").read_text()


def test_a_new_run_directory_is_durable_up_to_the_folder_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = set[str](), os.fsync

    def note(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    RunDirectory(tmp_path / "a" / "b" / "run").create()
    assert {
        str(tmp_path),
        str(tmp_path / "a"),
        str(tmp_path / "a" / "b"),
        str(tmp_path / "a" / "b" / "run"),
    } <= synced


@pytest.mark.training
@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl"])
def test_a_disk_full_for_the_records_is_one_clear_line(
    name: str,
    samples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: SnapshotAssertion,
) -> None:
    path = tmp_path / "run"
    expected = train(small(samples), tmp_path / "unbroken")
    train(small(samples, stop={"last_step": 3}), path)
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path / name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StepctlError) as caught:
        resume(path, last_step=12)
    monkeypatch.undo()
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert resume(path, last_step=12).same_bits(expected)
    assert rows(path) == rows(tmp_path / "unbroken")


@pytest.mark.training
def test_a_run_is_not_started_over_another(
    samples: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "run"
    train(small(samples, stop={"last_step": 2}), path)
    before = file_contents(path, "lock")
    with pytest.raises(ConfigError) as caught:
        train(small(samples), path)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert file_contents(path, "lock") == before


@pytest.mark.training
def test_a_folder_of_something_else_is_refused_and_not_touched(
    samples: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(ConfigError) as caught:
        train(small(samples), tmp_path)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert (tmp_path / "thesis.tex").read_text() == "text"
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.training
def test_temporary_files_of_a_killed_writer_are_removed(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(samples, stop={"last_step": 3}), path)
    left = [path / "checkpoints" / ".step-00000005.h5.tmp-99", path / ".metrics.jsonl.tmp-99"]
    left.append(
        path / "samples" / ".step-00000005.png.tmp-99"
    )  # in a container the next writer has the same pid
    (path / "samples").mkdir()
    for file in left:
        file.write_bytes(b"half")
    resume(path, last_step=5)
    assert not [file for file in left if file.exists()]


@pytest.mark.training
def test_a_resume_without_a_good_checkpoint_is_exit_3_and_touches_nothing(
    samples: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    train(small(samples, stop={"last_step": 3}), path)
    for file in (path / "checkpoints").iterdir():
        os.truncate(file, 100)
    before = file_contents(path, "lock")
    with pytest.raises(CheckpointError) as caught:
        resume(path, last_step=5)
    assert caught.value.exit_code == 3
    assert file_contents(path, "lock") == before


@pytest.mark.training
def test_a_resume_passes_over_a_damaged_checkpoint_and_ends_with_the_same_bits(
    samples: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path, said = tmp_path / "run", list[str]()
    cadence: dict[str, Any] = {"checkpoint": {"every": 4, "keep_last": 1}}
    expected = train(small(samples, **cadence), tmp_path / "unbroken")
    train(small(samples, stop={"last_step": 4}, **cadence), path)
    (path / "checkpoints" / "step-00000012.h5").write_bytes(b"junk")
    assert resume(path, last_step=12, say=said.append).same_bits(expected)
    assert [without_paths(line, HERE=tmp_path) for line in said] == snapshot
    assert sorted(os.listdir(path / "checkpoints")) == [
        "step-00000012.h5",
        "step-00000012.h5.aside-1",
    ]
    assert (path / "checkpoints" / "step-00000012.h5.aside-1").read_bytes() == b"junk"
    assert rows(path) == rows(tmp_path / "unbroken")


def test_a_file_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    publish(path, [b"one ", memoryview(b"two")])
    assert path.read_bytes() == b"one two"

    def cut_short() -> Iterator[bytes]:
        yield b"three"
        raise Power

    with pytest.raises(Power):
        publish(path, cut_short())
    assert path.read_bytes() == b"one two"
    assert os.listdir(tmp_path) == ["notes.txt"]
