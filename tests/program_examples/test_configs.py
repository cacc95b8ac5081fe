"""The programs in configs/ reach the results that their configs state."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import stepctl
from tests.support.processes import ROOT
from tests.support.program_runs import rows
from tests.support.runs import silent


@pytest.mark.training
def test_the_ising_model_has_the_magnetization_of_the_exact_solution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    smaller = {"program.size": 32, "program.burn_in": 200, "stop.last_step": 2000}
    with stepctl.create(
        "configs/ising.yaml", tmp_path / "run", overrides=smaller, say=silent
    ) as run:
        run.train()
    exact = (1 - math.sinh(2 / run.config.plain()["program"]["temperature"]) ** -4) ** (1 / 8)
    assert rows(tmp_path / "run")[-1]["magnetization"] == pytest.approx(exact, abs=0.01)


@pytest.mark.training
def test_k_means_ends_when_no_row_changes_its_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with stepctl.create("configs/kmeans.yaml", tmp_path / "run", say=silent) as run:
        reason = run.train()
    assert reason.done
    *_, step, evaluation = rows(tmp_path / "run")
    assert step["n_changed"] == 0
    assert evaluation["purity"] == pytest.approx(0.787, abs=0.001)
