"""A loss or gradient that is not finite makes no update, and is never published."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint import codec
from stepctl.config.model import Config
from stepctl.errors import NonFiniteError
from stepctl.programs.base import sum_metrics
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run
from stepctl.state.arena import update_target
from stepctl.training.trainer import MAX_SKIPPED
from tests.support.messages import without_paths
from tests.support.runs import make_config, resume, rows, silent, train


def spoiled(tmp_path: Path, *bad: int, **sections: Any) -> Config:
    """Return the config of a linear regression in which these samples are too large to learn from."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(64, 3)), generator.normal(size=(64, 1))
    x[list(bad)] = 1e38
    np.savez(tmp_path / "data.npz", x=x.astype("f4"), y=y.astype("f4"))
    defaults = {
        "data": {"name": "arrays", "path": str(tmp_path / "data.npz"), "batch_size": 4},
        "model": {"name": "linear"},
        "task": {"name": "regression"},
        "optimizer": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.9},
        "evaluate": {"every": None},
        "log": {"every": 1},
        "stop": {"last_step": 40},
    }
    return make_config(**defaults | sections)


def saved(path: Path) -> list[int]:
    return [row["step"] for row in RunDirectory(path).read_ledger() if row["event"] == "checkpoint"]


@pytest.mark.training
def test_stop_names_the_step_and_the_array_and_saves_the_last_step(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteError) as caught:
            train(spoiled(tmp_path, 17), tmp_path / "run")
    assert without_paths(str(caught.value), (r"(?<=^step )\d+",), HERE=tmp_path) == snapshot
    step = int(str(caught.value).split()[1].rstrip(":"))
    assert 1 <= step <= 16
    assert saved(tmp_path / "run")[-1] == step - 1
    with codec.Reader(tmp_path / "run" / "checkpoints" / f"step-{step - 1:08d}.h5") as reader:
        assert all(
            np.isfinite(part).all() for path in reader.array_shapes() for part in reader.parts(path)
        )
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, step))
    assert caught.value.exit_code == 1


@pytest.mark.training
def test_a_model_that_starts_with_nan_is_refused_with_a_remedy(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(
            make_config(model={"name": "tests.support.user_model:BeginsWithNaN"}), tmp_path / "run"
        )
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    with create_run(make_config(), RunDirectory(tmp_path / "run")) as segment:
        segment.train()


@pytest.mark.training
def test_skip_takes_the_next_batch_and_counts_no_step(tmp_path: Path) -> None:
    said: list[str] = []
    config = spoiled(tmp_path, 17, on_nonfinite="skip", checkpoint={"every": 1, "keep_last": None})
    with create_run(config, RunDirectory(tmp_path / "run"), said.append) as segment:
        segment.train()
        state = segment.state
    assert state.counters.global_step == state.counters["model"] == 40
    skipped = state.counters.samples_seen // 4 - 40
    assert skipped >= 2, "once an epoch of 16 batches"
    assert len(said) == skipped
    assert all(line.endswith("this batch is skipped") for line in said)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 41))
    (end,) = [row for row in RunDirectory(tmp_path / "run").read_ledger() if row["event"] == "end"]
    assert end["skipped_batches"] == skipped


@pytest.mark.training
@pytest.mark.parametrize("k", range(1, 40, 4))
def test_skipping_is_exact_through_a_resume(k: int, tmp_path: Path) -> None:
    expected = train(spoiled(tmp_path, 17, on_nonfinite="skip"), tmp_path / "unbroken")
    train(spoiled(tmp_path, 17, on_nonfinite="skip", stop={"last_step": k}), tmp_path / "run")
    assert resume(tmp_path / "run", last_step=40).same_bits(expected)
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


@pytest.mark.training
def test_a_stopped_run_resumes_with_skip(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        train(spoiled(tmp_path, 17), tmp_path / "run")
    with pytest.raises(NonFiniteError):
        resume(tmp_path / "run")
    state = resume(tmp_path / "run", assignments=("on_nonfinite=skip",))
    assert state.same_bits(train(spoiled(tmp_path, 17, on_nonfinite="skip"), tmp_path / "unbroken"))


def test_too_many_batches_in_a_row_are_not_skipped(tmp_path: Path) -> None:
    said: list[str] = []
    config = spoiled(tmp_path, *range(64), on_nonfinite="skip")
    with (
        create_run(config, RunDirectory(tmp_path / "run"), said.append) as segment,
        pytest.raises(NonFiniteError),
    ):
        segment.train()
    assert sum("skipped" in line for line in said) == MAX_SKIPPED


@pytest.mark.training
def test_a_state_that_overflows_is_never_published(tmp_path: Path) -> None:
    """The gradient is finite, and the update is not: the next save says so."""
    optimizer = {"name": "sgd", "learning_rate": 3e38}
    config = spoiled(tmp_path, optimizer=optimizer, checkpoint={"every": 1, "keep_last": None})
    with pytest.raises(NonFiniteError):
        train(config, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        with codec.Reader(path) as reader:
            assert all(
                np.isfinite(part).all()
                for name in reader.array_shapes()
                for part in reader.parts(name)
            )


@pytest.mark.training
def test_an_initial_state_that_is_not_finite_is_refused(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    model = {"name": "tests.support.user_model:TwoLayers", "width": 4}
    config = make_config(model=model, stop={"last_step": 2})
    with create_run(config, RunDirectory(tmp_path / "run"), silent) as segment:
        update_target(segment.state.params).fill(np.nan)
        with pytest.raises(NonFiniteError) as caught:
            segment.train()
        assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "losses", [(np.inf, -np.inf), (np.inf, np.nan), (1.7e308, 1.7e308, -np.inf), (1.7e308, 1.7e308)]
)
def test_shards_whose_losses_have_no_sum_give_a_loss_that_is_not_finite(
    losses: tuple[float, ...],
) -> None:
    assert not np.isfinite(sum_metrics([{"loss": float(loss)} for loss in losses])["loss"])
