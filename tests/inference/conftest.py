"""A run on the digits that the tests of this folder read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trained_runs import train_digits


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps with a moving average that keeps its best checkpoint; do not change it."""
    return train_digits(
        tmp_path_factory.mktemp("trained") / "digits",
        ema={"decay": 0.9},
        evaluate={"every": 10, "ema": True},
        checkpoint={
            "every": 10,
            "keep_last": None,
            "keep_best": {"metric": "loss", "mode": "min"},
        },
    )


@pytest.fixture
def lone_file(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of its newest checkpoint, under another name and without its run."""
    copy = tmp_path / "weights.h5"
    copy.write_bytes((digits_run / "checkpoints" / "step-00000030.h5").read_bytes())
    return copy
