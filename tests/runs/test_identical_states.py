"""Checkpoints with the same state of a program give one warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepctl

pytestmark = pytest.mark.training


def warnings_of(state: dict[str, Any], change: Any, capsys: pytest.CaptureFixture[str]) -> int:
    with stepctl.loop("run", state, last_step=12, checkpoint_every=3) as run:
        for step in run:
            change(state, step)
    return capsys.readouterr().err.count("are identical; if the steps")


def nothing(state: dict[str, Any], step: int) -> None:
    """Change nothing."""


def sign_of_zero(state: dict[str, Any], step: int) -> None:
    state["x"][0, 0] = 0.0 if step // 3 % 2 else -0.0


def one_value(state: dict[str, Any], step: int) -> None:
    state["n"] = step


def shape(state: dict[str, Any], step: int) -> None:
    state["x"] = state["x"].reshape(3, 2) if state["x"].shape == (2, 3) else np.zeros((2, 3))


@pytest.mark.parametrize(
    ("change", "expected"), [(nothing, 1), (one_value, 0), (shape, 0), (sign_of_zero, 0)]
)
def test_identical_states_give_one_warning(
    change: Any,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"n": 0, "x": np.zeros((2, 3))}
    assert warnings_of(state, change, capsys) == expected
