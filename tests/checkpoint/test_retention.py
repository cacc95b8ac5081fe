"""Which checkpoints are kept, as a function of steps and metrics, and when the others are removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepctl.checkpoint.retention import Retention, to_prune
from stepctl.checkpoint.store import Store
from stepctl.config.model import CheckpointConfig, KeepBestConfig
from stepctl.errors import CheckpointError, ConfigError, RunInUseError
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.prune import prune
from tests.support.runs import make_config, resume, silent, train

LOSSES = {
    10: {"loss": 3.0},
    20: {"loss": 1.0},
    30: {"loss": 2.0},
    40: {"loss": 1.0},
    50: {"loss": "NaN"},
}
STEPS = [10, 20, 30, 40, 50, 60]
BEST: Any = {"metric": "loss", "mode": "min"}

# what to keep -> what is pruned of STEPS
KEEP: list[tuple[dict[str, Any], list[int]]] = [
    ({"keep_last": None}, []),
    ({"keep_last": 1}, [10, 20, 30, 40, 50]),
    ({"keep_last": 1, "keep_every": 20}, [10, 30, 50]),
    ({"keep_last": 2, "keep_every": 30}, [10, 20, 40]),
    ({"keep_last": None, "keep_every": 30}, []),
    ({"keep_last": 1, "keep_best": KeepBestConfig(**BEST)}, [10, 30, 40, 50]),
    ({"keep_last": 1, "keep_best": KeepBestConfig(**BEST, n=2)}, [10, 30, 50]),
    ({"keep_last": 1, "keep_best": KeepBestConfig(**BEST, n=99)}, [50]),
    ({"keep_last": 1, "keep_best": KeepBestConfig(metric="loss", mode="max")}, [20, 30, 40, 50]),
    (
        {"keep_last": 1, "keep_best": KeepBestConfig(metric="accuracy", mode="max")},
        [10, 20, 30, 40, 50],
    ),
    ({"keep_last": 1, "keep_every": 30, "keep_best": KeepBestConfig(**BEST)}, [10, 40, 50]),
]


@pytest.mark.parametrize(("keep", "pruned"), KEEP)
def test_the_kept_steps(keep: dict[str, Any], pruned: list[int]) -> None:
    assert to_prune(STEPS, CheckpointConfig(**keep), LOSSES) == pruned
    assert to_prune(reversed(STEPS), CheckpointConfig(**keep), LOSSES) == pruned


@pytest.mark.training
@given(
    steps=st.sets(st.integers(0, 1000)),
    last=st.integers(1, 9),
    every=st.none() | st.integers(1, 50),
    losses=st.dictionaries(st.integers(0, 1000), st.floats()),
    n=st.integers(1, 5),
)
def test_the_newest_stays_and_only_announced_files_are_removed(
    steps: set[int], last: int, every: int | None, losses: dict[int, float], n: int
) -> None:
    keep = CheckpointConfig(
        keep_last=last, keep_every=every, keep_best=KeepBestConfig(metric="loss", mode="min", n=n)
    )
    pruned = to_prune(steps, keep, {step: {"loss": loss} for step, loss in losses.items()})
    assert set(pruned) <= steps
    assert not steps or max(steps) not in pruned
    assert len(steps) - len(pruned) >= min(last, len(steps))
    left = sorted(steps - set(pruned))
    assert to_prune(left, keep, {step: {"loss": loss} for step, loss in losses.items()}) == [], (
        "done in one go"
    )


@pytest.mark.training
@given(
    before=st.sets(st.integers(0, 50)),
    steps=st.sets(st.integers(51, 300)),
    last=st.none() | st.integers(1, 9),
    every=st.none() | st.integers(1, 50),
    losses=st.dictionaries(st.integers(0, 300), st.floats()),
    best=st.none() | st.integers(1, 5),
    protected=st.sets(st.integers(0, 50)),
)
def test_a_segment_removes_the_same_without_looking_at_the_files(
    before: set[int],
    steps: set[int],
    last: int | None,
    every: int | None,
    losses: dict[int, float],
    best: int | None,
    protected: set[int],
) -> None:
    keep_best = None
    if best is not None:
        keep_best = KeepBestConfig(metric="loss", mode="min", n=best)
    keep = CheckpointConfig(keep_last=last, keep_every=every, keep_best=keep_best)
    metrics = {step: {"loss": loss} for step, loss in losses.items()}
    retention = Retention(before, keep, metrics, protected)
    files = set(before)
    for step in sorted(steps):
        files.add(step)
        expected = to_prune(files, keep, metrics, protected)
        assert retention.add(step) == expected
        files -= set(expected)


@pytest.mark.training
def test_training_keeps_the_checkpoints_that_its_config_keeps(tmp_path: Path) -> None:
    keep = {
        "every": 5,
        "keep_last": 1,
        "keep_every": 20,
        "keep_best": {"metric": "loss", "mode": "max", "n": 1},
    }
    train(make_config(checkpoint=keep, evaluate={"every": 5}), tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    losses = {row["step"]: row["loss"] for row in directory.read_metrics() if row["kind"] == "eval"}
    worst = max(losses, key=lambda step: (losses[step], -step))
    assert Store(directory.checkpoints).steps() == sorted({0, 20, 40, worst})
    recorded = [step for row in directory.read_ledger() for step in row.get("pruned", ())]
    assert sorted(recorded) == sorted({5, 10, 15, 25, 30, 35} - {worst})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"keep_best": {"metric": "f1", "mode": "max"}},
            "no evaluation measures 'f1'; allowed: loss, accuracy",
        ),
        (
            {"keep_best": {"metric": "loss", "mode": "min"}, "no evaluation": True},
            "set evaluate.every",
        ),
    ],
)
def test_a_best_that_nothing_measures_is_refused_before_step_1(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    evaluate = {"every": None} if sections.pop("no evaluation", False) else {"every": 5}
    with pytest.raises(ConfigError, match=message):
        train(make_config(checkpoint={"every": 5, **sections}, evaluate=evaluate), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- pruning a run that nobody trains


@pytest.fixture
def kept_all(tmp_path: Path) -> RunDirectory:
    train(
        make_config(checkpoint={"every": 10, "keep_last": None}, evaluate={"every": 10}),
        tmp_path / "run",
    )
    return RunDirectory(tmp_path / "run")


def damage(directory: RunDirectory, step: int) -> None:
    path = Store(directory.checkpoints).file(step)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.training
def test_prune_removes_and_records(kept_all: RunDirectory) -> None:
    store = Store(kept_all.checkpoints)
    assert prune(kept_all, {"keep_last": 2}, silent, dry_run=True) == [0, 10, 20]
    assert store.steps() == [0, 10, 20, 30, 40]
    assert prune(kept_all, {"keep_last": 2}, silent, dry_run=False) == [0, 10, 20]
    assert store.steps() == [30, 40]
    assert kept_all.read_ledger().events[-1]["steps"] == [0, 10, 20]


@pytest.mark.training
def test_damaged_files_count_for_nothing_and_stay(kept_all: RunDirectory) -> None:
    for step in (20, 40):
        damage(kept_all, step)
    said: list[str] = []
    assert prune(kept_all, {"keep_last": 2}, said.append, dry_run=False) == [0]
    assert Store(kept_all.checkpoints).steps() == [10, 20, 30, 40]
    assert [line.partition(":")[0] for line in said] == ["step-00000040.h5", "step-00000020.h5"]


@pytest.mark.training
def test_nothing_is_pruned_without_a_good_checkpoint(kept_all: RunDirectory) -> None:
    for step in (0, 10, 20, 30, 40):
        damage(kept_all, step)
    with pytest.raises(CheckpointError):
        prune(kept_all, {"keep_last": 1}, silent, dry_run=False)
    assert len(Store(kept_all.checkpoints).steps()) == 5


@pytest.mark.training
def test_a_run_in_use_is_not_pruned(kept_all: RunDirectory) -> None:
    with kept_all.lock(), pytest.raises(RunInUseError):
        prune(RunDirectory(kept_all.path), {"keep_last": 1}, silent, dry_run=False)
    assert len(Store(kept_all.checkpoints).steps()) == 5


@pytest.mark.training
def test_a_damaged_checkpoint_stays_and_does_not_count_for_retention(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_config(stop={"last_step": 4}, checkpoint={"every": 2, "keep_last": 2}), run)
    store = Store(run / "checkpoints")
    assert store.steps() == [2, 4]
    damaged = store.file(4)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resume(run, assignments=("checkpoint.every=5", "stop.last_step=5"))
    assert store.steps() == [2, 4, 5], "two good ones are kept"
    resume(run, assignments=("stop.last_step=6",))
    assert store.steps() == [4, 5, 6]
    resume(run, assignments=("stop.last_step=8",))
    assert store.steps() == [4, 6, 8]
