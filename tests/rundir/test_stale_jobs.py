"""A job whose run directory was renamed, removed or replaced stops at its next write, and writes into no other run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.checkpoint import codec
from stepctl.checkpoint.store import Store
from stepctl.config.model import SamplesConfig
from stepctl.errors import Exit, RunInUseError, RunMovedError, StepctlError
from stepctl.hooks.samples import Samples
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run
from stepctl.writers.csv import CSV
from stepctl.writers.jsonl import JSONLines
from stepctl.writers.tensorboard import TensorBoard
from tests.support.act_at import ActAt
from tests.support.checkpoints import STEP, small_state
from tests.support.run_files import file_contents
from tests.support.runs import RUN_ID, make_config, train
from tests.support.stops import some_of

COMMAND = [sys.executable, "-m", "stepctl"]
EVERYTHING = {
    "model": {"name": "linear"},
    "log": {"every": 1, "csv": True, "tensorboard": True},
    "checkpoint": {"every": 2, "keep_last": 1},
}
QUIET = {"log": {"every": 1000}, "evaluate": {"every": 1000}}


def rename(path: Path) -> None:
    path.rename(path.with_name("moved"))


def rename_above(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.mkdir()


def remove(path: Path) -> None:
    """Remove a directory in which a background save may still delete checkpoints."""
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)


AWAY = {"renamed": rename, "removed": remove, "renamed above": rename_above}


@pytest.mark.training
@pytest.mark.parametrize("away", some_of(AWAY.values(), every=2), ids=AWAY.keys())
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"log": {"every": 1000}, "evaluate": {"every": 1000}},  # the checkpoint is the next write
        {
            "log": {"every": 1000},
            "evaluate": {"every": 1000},
            "checkpoint": {"every": 2, "keep_last": 1, "on_error": "continue"},
        },
    ],
    ids=["rows", "checkpoints", "failed checkpoints are passed over"],
)
def test_a_stale_job_stops_and_leaves_the_new_run_of_its_name_alone(
    away: Callable[[Path], None], sections: dict[str, Any], tmp_path: Path
) -> None:
    path, after = tmp_path / "runs" / "run", dict[str, bytes]()
    said: list[str] = []

    def start_again() -> None:
        while 4 not in RunDirectory(path).read_ledger().acknowledged.values():  # the save in flight
            os.sched_yield()
        away(path)
        train(make_config(**{**EVERYTHING, "seed": 2, "stop": {"last_step": 3}}), path)
        after.update(file_contents(path))

    config = make_config(**{**EVERYTHING, "stop": {"last_step": 40}, **sections})
    with (
        pytest.raises(
            RunMovedError, match="was renamed or removed while this process was writing to it"
        ) as caught,
        create_run(
            config, RunDirectory(path), said.append, hooks=[ActAt(5, start_again)]
        ) as segment,
    ):
        segment.train()
    assert caught.value.exit_code == Exit.NEGATIVE
    assert said == [], "the error is the one line that is said"
    assert file_contents(path) == after
    assert verify(str(path))[1] == []
    assert Store(RunDirectory(path).checkpoints).steps() == [3]


@pytest.mark.process
@pytest.mark.parametrize("away", [rename, shutil.rmtree], ids=["renamed", "removed"])
def test_a_job_without_a_directory_stops_with_one_line_and_1(
    away: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(
        make_config(**{**EVERYTHING, "stop": {"last_step": 10**9}}).text
    )
    arguments = ["train", "--config", "c.yaml", "--run-dir", "run", "-q"]
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as child:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and child.poll() is None:
            os.sched_yield()
        moved = tmp_path / "moved"
        (tmp_path / "run").rename(moved)
        if away is shutil.rmtree:
            shutil.rmtree(moved, ignore_errors=True)
        assert child.stderr is not None
        said = child.stderr.read()
    assert (child.returncode, said.count("\n")) == (1, 1), said
    assert "was renamed or removed" in said
    assert not (tmp_path / "run").exists()


# --- every operation that writes

Operation = Callable[
    [RunDirectory], Callable[[], object]
]  # made before the directory is gone, called afterwards
IMAGE = codec.encode(small_state(), run="run", run_id=RUN_ID, config="seed: 0\n", numerics="{}")
ROW = {"step": 7, "kind": "train", "loss": 1.0}


def samples(directory: RunDirectory) -> Callable[[], object]:
    hook = Samples(
        SamplesConfig(every=1, n=4),
        lambda state, n: np.zeros((n, 4)),
        directory.folder.subfolder("samples"),
        sample_shape=(4,),
    )
    return lambda: hook.after_step(small_state(), {})


def csv(directory: RunDirectory) -> Callable[[], object]:
    writer = CSV(directory)
    writer.write([ROW])
    return lambda: writer.write([ROW])


def csv_with_a_new_column(directory: RunDirectory) -> Callable[[], object]:
    writer = CSV(directory)
    return lambda: writer.write([ROW | {"accuracy": 1.0}])


def tensorboard(directory: RunDirectory) -> Callable[[], object]:
    writer = TensorBoard(
        directory.folder.subfolder("tensorboard"), segment=2, start=0, batch_size=1
    )
    return lambda: writer.write([ROW])


def jsonl(directory: RunDirectory) -> Callable[[], object]:
    writer = JSONLines(directory)
    return lambda: writer.write([ROW])


OPERATIONS: dict[str, Operation] = {
    "ledger": lambda directory: (
        lambda: directory.append_ledger("end", segment=1, step=3, reason="x")
    ),
    "torn ledger": lambda directory: directory.repair_ledger,
    "config": lambda directory: lambda: directory.write_config("seed: 9\n"),
    "metrics": lambda directory: lambda: directory.metrics_after(0).cut(print),
    "rows": jsonl,
    "table": csv,
    "table made anew": csv_with_a_new_column,
    "tensorboard": tensorboard,
    "samples": samples,
    "temporaries": lambda directory: directory.remove_temporary_files,
    "stillborn": lambda directory: directory.remove_unfinished_start,
    "publish": lambda directory: lambda: Store(directory.checkpoint_folder).publish(STEP, IMAGE),
    "set aside": lambda directory: lambda: Store(directory.checkpoint_folder).set_aside(3),
    "prune": lambda directory: lambda: Store(directory.checkpoint_folder).remove([3]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `old`, and a run `new` in which each operation on a path would change something."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("old", 1), ("new", 2)):
        path = folder / name
        train(make_config(**{**EVERYTHING, "seed": seed, "stop": {"last_step": 3}}), path)
        (path / "samples").mkdir()
        for left in (path / ".config.yaml.tmp-9", path / "checkpoints" / ".step-00000009.h5.tmp-9"):
            left.write_bytes(b"half")
        with open(path / "ledger.jsonl", "ab") as file:
            file.write(b"{")
    return folder


@pytest.fixture
def copies(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


@pytest.mark.training
@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_no_write_reaches_a_directory_that_took_the_place_of_the_held_one(
    operation: Operation, made: str, copies: Path
) -> None:
    directory = RunDirectory(copies / "old")
    with directory.lock():
        write = operation(directory) if made == "before" else None
        before = file_contents(copies / "old")
        (copies / "old").rename(copies / "moved")
        (copies / "new").rename(copies / "old")
        new = file_contents(copies / "old")
        with pytest.raises(RunMovedError):
            (write or operation(directory))()
        assert file_contents(copies / "old") == new
        assert file_contents(copies / "moved") == before


@pytest.mark.training
@pytest.mark.parametrize("operation", ["publish", "set aside", "prune"])
def test_a_folder_below_that_was_replaced_is_not_written(operation: str, copies: Path) -> None:
    directory = RunDirectory(copies / "old")
    checkpoints = copies / "old" / "checkpoints"
    with directory.lock():
        assert Store(directory.checkpoint_folder).steps() == [3]
        checkpoints.rename(copies / "archive")
        (copies / "new" / "checkpoints").rename(checkpoints)
        before = file_contents(copies)
        with pytest.raises(RunMovedError, match="checkpoints: was renamed"):
            OPERATIONS[operation](directory)()
        assert file_contents(copies) == before


@pytest.mark.process
def test_a_forked_child_neither_holds_the_run_nor_writes_in_it(copies: Path) -> None:
    directory = RunDirectory(copies / "old")
    with directory.lock():
        writer = JSONLines(directory)
        before = file_contents(copies / "old")
        pid = os.fork()
        if pid == 0:
            refused = 0
            for write in (
                lambda: writer.write([ROW]),
                lambda: directory.append_ledger("end", step=3),
            ):
                try:
                    write()
                except StepctlError:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        assert file_contents(copies / "old") == before
    with directory.lock():
        pass
    with directory.lock(), pytest.raises(RunInUseError), RunDirectory(copies / "old").lock():
        pass


@pytest.mark.training
def test_a_user_module_that_changes_the_working_directory_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    config = make_config(**{**EVERYTHING, "stop": {"last_step": 6}})
    expected = train(config, Path("unbroken"))
    with create_run(
        config, RunDirectory("run"), hooks=[ActAt(3, lambda: os.chdir("elsewhere"))]
    ) as segment:
        segment.train()
        assert segment.state.same_bits(expected)
    assert os.listdir(tmp_path / "elsewhere") == []
    assert verify(str(tmp_path / "run"))[1] == []
