"""A fork continues exactly from its parent's step, which the parent never prunes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint import codec
from stepctl.checkpoint.retention import to_prune
from stepctl.checkpoint.store import Store
from stepctl.cli.main import cli
from stepctl.config.model import CheckpointConfig
from stepctl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunExistsError,
    RunInUseError,
    StepctlError,
)
from stepctl.reports.inspect import inspect_path
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.fork import Forked
from stepctl.runs.prune import prune
from tests.support.messages import TOP_LEVEL_KEYS, normalize, without_paths
from tests.support.run_files import events, file_contents
from tests.support.runs import forked, make_config, resume, rows, train

SMALL: dict[str, Any] = {"stop": {"last_step": 12}, "checkpoint": {"every": 2, "keep_last": None}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with a checkpoint at every second, and the data that it names."""
    folder = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    np.savez(folder / "a.npz", x=generator.normal(size=(60, 4)), y=generator.integers(0, 3, 60))
    data = {
        "name": "arrays",
        "path": str(folder / "a.npz"),
        "batch_size": 8,
        "validation_fraction": 0.5,
    }
    model = {"name": "mlp", "hidden": [3], "dropout": 0.2}
    train(
        make_config(data=data, model=model, log={"every": 1}, evaluate={"every": 4}, **SMALL),
        folder / "run",
    )
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of its own to fork from."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def stored(path: Path, step: int) -> dict[str, Any]:
    """Return counters and arrays of a step's checkpoint."""
    with codec.Reader(Store(RunDirectory(path).checkpoints).file(step)) as reader:
        arrays = {
            name: np.concatenate([*reader.parts(name)]).tobytes() for name in reader.array_shapes()
        }
        return {**reader.header.counters, **arrays}


def steps(path: Path) -> list[int]:
    return Store(RunDirectory(path).checkpoints).steps()


# --- exact


@pytest.mark.training
def test_a_fork_with_no_change_ends_with_its_parents_bits_and_rows(
    run: Path, tmp_path: Path
) -> None:
    assert forked(run, tmp_path / "child", 6) == Forked(6, 12, [])
    assert stored(tmp_path / "child", 6) == stored(run, 6)
    resume(tmp_path / "child")
    assert stored(tmp_path / "child", 12) == stored(run, 12)
    assert rows(tmp_path / "child") == [row for row in rows(run) if row["step"] > 6]


@pytest.mark.process
def test_a_fork_of_a_fork_of_a_fork_ends_with_the_bits_of_the_first_run(
    run: Path, tmp_path: Path
) -> None:
    paths = [run, *(tmp_path / name for name in "abc")]
    for (parent, child), at, last in zip(
        itertools.pairwise(paths), (2, None, None), (5, 8, 11), strict=True
    ):
        forked(parent, child, at)
        resume(child, last_step=last)
    assert [steps(path)[-1] for path in paths] == [12, 5, 8, 11]
    resume(paths[-1], last_step=12)
    assert stored(paths[-1], 12) == stored(run, 12)
    assert [
        row["parent"] for path in paths[1:] for row in events(path, "fork") if "parent" in row
    ] == [str(path) for path in paths[:-1]]
    for path in paths:
        assert verify(str(path))[1] == []


@pytest.mark.process
def test_a_fork_trains_with_the_given_settings_and_its_parents_other_ones(
    run: Path, tmp_path: Path
) -> None:
    made = forked(
        run, tmp_path / "child", 6, "optimizer.learning_rate=0.5", "seed=7", "stop.last_step=8"
    )
    changed = [
        ("seed", 1, 7),
        ("optimizer.learning_rate.value", 0.01, 0.5),
        ("stop.last_step", 12, 8),
    ]
    assert [(change["key"], change["old"], change["new"]) for change in made.changes] == changed
    resume(tmp_path / "child")
    assert steps(tmp_path / "child") == [6, 8]
    assert [row["learning_rate"] for row in rows(tmp_path / "child") if row["kind"] == "train"] == [
        0.5,
        0.5,
    ]
    assert stored(tmp_path / "child", 8) != stored(run, 8)
    assert verify(str(tmp_path / "child"))[1] == []


def test_without_a_step_the_newest_good_one_is_taken(
    run: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    damage(run, 12)
    said: list[str] = []
    assert forked(run, tmp_path / "child", say=said.append).step == 10
    assert said == snapshot


@pytest.mark.training
def test_an_open_horizon_is_the_target_of_the_fork(
    run: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    cosine = "optimizer.learning_rate={name: cosine, peak: 0.1}"
    forked(run, tmp_path / "child", 6, cosine, "stop={num_steps: 4}")
    rate = RunDirectory(tmp_path / "child").newest_config().value["optimizer"]["learning_rate"]
    assert rate["decay_steps"] == 10
    with pytest.raises(ConfigError) as caught:
        forked(run, tmp_path / "other", 6, cosine, "stop.last_step=6")
    assert str(caught.value) == snapshot(name="no target")
    said: list[str] = []
    forked(tmp_path / "child", tmp_path / "further", None, "stop={last_step: 20}", say=said.append)
    assert said == snapshot(name="a later target")


@pytest.mark.training
def test_a_watch_whose_rule_changes_is_reset_and_the_others_continue(
    run: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    forked(
        run,
        tmp_path / "child",
        6,
        "stop.early_stopping={patience: 9, min_delta: 0.1}",
        say=said.append,
    )
    assert said == ["note: early_stopping is reset: its criterion changed in the fork"]
    before, after = stored(run, 6), stored(tmp_path / "child", 6)
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all(name.startswith("hooks/early_stopping/") for name in changed)
    said.clear()
    resume(tmp_path / "child", assignments=("stop.early_stopping.min_delta=0.5",), say=said.append)
    assert said == ["note: early_stopping is reset: its criterion changed"]
    assert events(tmp_path / "child", "start")[0]["restored"] == "step-00000006.h5"


# --- lineage


@pytest.mark.process
def test_both_ledgers_know_before_the_child_has_its_checkpoint(run: Path, tmp_path: Path) -> None:
    digest = {row["step"]: row["sha256"] for row in events(run, "checkpoint")}[6]
    forked(run, tmp_path / "child", 6, "seed=7")
    mine, checkpoint = RunDirectory(tmp_path / "child").read_ledger()
    assert (mine["event"], mine["parent"], mine["step"], mine["sha256"]) == (
        "fork",
        str(run),
        6,
        digest,
    )
    assert mine["changes"] == [{"key": "seed", "old": 1, "new": 7}]
    assert (checkpoint["event"], checkpoint["step"], checkpoint["pruned"]) == ("checkpoint", 6, [])
    (parents,) = events(run, "fork")
    assert {key: parents[key] for key in ("child", "step", "sha256")} == {
        "child": str(tmp_path / "child"),
        "step": 6,
        "sha256": digest,
    }
    for path in (run, tmp_path / "child"):
        assert verify(str(path))[1] == []


@pytest.mark.process
@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_a_fork_with_a_checkpoint_is_recorded_in_its_parent(
    last: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [last]

    def dies(function: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise StepctlError("the power is gone")
            return function(*arguments, **options)

        return called

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "append_ledger", dies(RunDirectory.append_ledger))
        patched.setattr(Store, "publish", dies(Store.publish))
        with pytest.raises(StepctlError, match="the power is gone"):
            forked(run, tmp_path / "child", 6)
    known = 6 in RunDirectory(run).read_ledger().forks
    assert known or not steps(tmp_path / "child")
    assert known == (last >= 2)
    if not steps(tmp_path / "child"):  # nothing began: the same command again does it
        assert forked(run, tmp_path / "child", 6).step == 6
        assert verify(str(tmp_path / "child"))[1] == []


@pytest.mark.process
def test_inspect_shows_where_a_run_was_forked_from(run: Path, tmp_path: Path) -> None:
    forked(run, tmp_path / "child", 6, "seed=7")
    parent = inspect_path(str(tmp_path / "child"), "-")["contents"]["parent"]
    assert (parent["run"], parent["step"]) == (str(run), 6)
    assert inspect_path(str(run), "-")["contents"]["parent"] is None
    told = CliRunner().invoke(cli, ["inspect", str(tmp_path / "child")]).stdout
    assert (
        f"forked from {run}  at step 6  sha256 {parent['sha256']}\n            seed: 1 -> 7\n"
        in told
    )
    path = tmp_path / "child" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"seed"', json.dumps("\x1b[2J\n")))
    assert "\x1b" not in CliRunner().invoke(cli, ["inspect", str(tmp_path / "child")]).stdout


# --- retention


def test_protected_steps_are_kept_in_addition_to_the_others() -> None:
    assert to_prune([0, 10, 20, 30], CheckpointConfig(keep_last=1), {}, {10}) == [0, 20]
    assert to_prune([0, 10, 20, 30], CheckpointConfig(keep_last=2), {}, {30}) == [0, 10], (
        "they take nobody's place"
    )


@pytest.mark.process
def test_training_on_never_removes_the_step_of_a_fork(run: Path, tmp_path: Path) -> None:
    for number, step in enumerate((2, 6, 6)):
        forked(run, tmp_path / f"child{number}", step)
    resume(run, last_step=16, assignments=("checkpoint.keep_last=1",))
    assert steps(run) == [2, 6, 16]
    resume(tmp_path / "child1", assignments=("checkpoint.keep_last=1",))
    forked(tmp_path / "child1", tmp_path / "grandchild")
    resume(tmp_path / "child1", last_step=16)
    assert steps(tmp_path / "child1") == [12, 16]
    for path in (run, tmp_path / "child1"):
        assert verify(str(path))[1] == []


@pytest.mark.process
def test_prune_keeps_the_step_of_a_fork_and_says_for_whom(run: Path, tmp_path: Path) -> None:
    forked(run, tmp_path / "child", 6)
    for dry_run in (True, False):
        said: list[str] = []
        assert prune(RunDirectory(run), {"keep_last": 2}, said.append, dry_run=dry_run) == [
            0,
            2,
            4,
            8,
        ]
        assert said == [
            f"step-00000006.h5 is kept, because these runs were forked from it: {tmp_path / 'child'}"
        ]
    assert steps(run) == [6, 10, 12]
    assert verify(str(run))[1] == []


# --- refused


def damage(path: Path, step: int) -> None:
    file = Store(RunDirectory(path).checkpoints).file(step)
    file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.fixture
def untouched(run: Path, tmp_path: Path) -> Iterator[None]:
    """What is refused leaves no child, and the parent as it was."""
    damage(run, 6)
    before = file_contents(run)
    yield
    assert file_contents(run) == before
    assert not (tmp_path / "child").exists()


# the step to fork at, assignments, and the error
REFUSED: dict[str, tuple[int, list[str], type[StepctlError]]] = {
    "a step without a checkpoint": (5, [], CheckpointError),
    "a damaged checkpoint": (6, [], CheckpointError),
    "another width": (8, ["model.hidden=[5]"], CheckpointError),
    "another dtype": (8, ["dtype=float64"], CheckpointError),
    "another initial step": (8, ["initial_step=3"], CheckpointError),
    "an unknown key": (8, ["sed=3"], ConfigError),
    "data that are not there": (8, ["data.path=none.npz"], DataError),
    "fewer classes": (8, ["data.n_classes=2"], CheckpointError),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_fork_is_refused(
    case: str, run: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    at, assignments, kind = REFUSED[case]
    with pytest.raises(kind) as caught:
        forked(run, tmp_path / "child", at, *assignments)
    assert without_paths(str(caught.value), (TOP_LEVEL_KEYS,), RUN=run, HERE=Path.cwd()) == snapshot


@pytest.mark.training
def test_a_fork_needs_a_new_or_an_empty_directory(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"contains 'letter\.txt', which is not part of a run"):
        forked(run, tmp_path / "mine", 6)
    forked(run, tmp_path / "child", 6)
    for path in (run, tmp_path / "child"):
        with pytest.raises(RunExistsError):
            forked(run, path, 6)


def test_a_run_in_use_is_not_forked(run: Path, tmp_path: Path) -> None:
    with RunDirectory(run).lock(), pytest.raises(RunInUseError):
        forked(run, tmp_path / "child", 6)
    assert not (tmp_path / "child").exists()


@pytest.mark.training
def test_other_data_under_the_same_name_are_reported_and_then_required(
    run: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    config = RunDirectory(run).newest_config().value
    path = tmp_path / "b.npz"
    shutil.copy(config["data"]["path"], path)
    forked(run, tmp_path / "child", 6, f"data.path={path}")
    with np.load(path) as old:
        np.savez(path, x=old["x"] + 1, y=old["y"])
    with pytest.raises(ConfigError, match="differ from the ones the run was trained on"):
        resume(tmp_path / "child")
    said: list[str] = []
    forked(tmp_path / "child", tmp_path / "other", say=said.append)
    assert [without_paths(line, HERE=tmp_path) for line in said] == snapshot
    resume(tmp_path / "other")


# --- the command


@pytest.mark.training
def test_the_command_says_how_to_continue(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, arguments)
        return result.exit_code, result.output

    code, line = call("fork", "run", "--at", "6", "--run-dir", "child", "--num-steps", "3")
    assert code == 0
    assert normalize(line) == snapshot(name="with a target")
    assert call("resume", "child", "-q")[0] == 0
    assert steps(tmp_path / "child") == [6, 8, 9]
    code, line = call("fork", "run", "--run-dir", "late")
    assert code == 0
    assert normalize(line) == snapshot(name="at its target")
    assert call("fork", "run", "--run-dir", "late")[0] == 2
    assert call("fork", "run", "--at", "7", "--run-dir", "none")[0] == 3
    assert call("fork", "nowhere", "--run-dir", "none")[0] == 2
    with RunDirectory("run").lock():
        assert call("fork", "run", "--run-dir", "none")[0] == 4
    assert not (tmp_path / "none").exists()


@pytest.mark.training
def test_a_fork_keeps_the_numerics_of_its_parent_unless_they_are_set(
    run: Path, tmp_path: Path
) -> None:
    def numerics(path: Path) -> dict[str, Any]:
        with codec.Reader(Store(RunDirectory(path).checkpoints).file(6)) as reader:
            found: dict[str, Any] = json.loads(reader.header.numerics)
            return found

    forked(run, tmp_path / "child", 6)
    assert numerics(tmp_path / "child") == numerics(run)
    forked(run, tmp_path / "auto", 6, "numerics.threads=auto", "numerics.blas_kernel=auto")
    settled = RunDirectory(tmp_path / "auto").newest_config().value["numerics"]
    recorded = numerics(tmp_path / "auto")
    decided = {key: recorded[key] for key in ("threads", "blas_kernel")}
    assert settled == {**decided, "compiled": "auto"}
    forked(run, tmp_path / "off", 6, "numerics.compiled=off")  # changes no bit
    assert numerics(tmp_path / "off") == numerics(run)
