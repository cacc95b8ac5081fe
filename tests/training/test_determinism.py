"""`check_determinism` warns of user code whose first step differs between two computations."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.errors import ConfigError
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run
from stepctl.training import build
from tests.support import nondeterministic
from tests.support.messages import without_paths
from tests.support.runs import make_config, resume, train

SGD = {"name": "sgd", "learning_rate": 0.01}


def said_by_train(path: Path, **sections: Any) -> list[str]:
    said: list[str] = []
    with create_run(
        make_config(stop={"last_step": 2}, evaluate={}, **sections), RunDirectory(path), said.append
    ) as made:
        made.train()
    return said


def model(name: str) -> dict[str, Any]:
    return {"model": {"name": f"tests.support.nondeterministic:{name}"}, "optimizer": SGD}


UNSTEADY: dict[str, tuple[dict[str, Any], str]] = {
    "an unseeded generator": (model("Unseeded"), "the loss, "),
    "the global generator of NumPy": (model("GlobalNumPy"), "the loss, "),
    "the global generator of Python": (model("GlobalPython"), "the loss, "),
    "a count on self": (model("CountsCalls"), "the loss, "),
    "the last bits of one gradient": (model("OneGradient"), "the gradient of in/b, "),
    "a buffer": (model("OneBuffer"), "/buffers/mean after it"),
    "an optimizer": (
        {"optimizer": {**SGD, "name": "tests.support.nondeterministic:Jitters"}},
        "/params/dense0/weight after it",
    ),
    "a metric of the step": (
        {"task": {"name": "tests.support.nondeterministic:Samples"}},
        "the loss of the step",
    ),
    "a task of its own": (
        {"task": {"name": "tests.support.nondeterministic:Alone"}},
        "the loss of the step",
    ),
    "the data": (
        {
            "data": {
                "name": "tests.support.nondeterministic:noisy_digits",
                "batch_size": 48,
                "validation_fraction": 0.9,
            }
        },
        "the batch); ",
    ),
}


@pytest.mark.training
@pytest.mark.parametrize("what", UNSTEADY)
@pytest.mark.parametrize("shards", [1, 4])
def test_a_difference_is_one_warning_that_names_it(what: str, shards: int, tmp_path: Path) -> None:
    sections, words = UNSTEADY[what]
    if shards > 1:
        data = {
            "name": "digits",
            "batch_size": 48,
            "validation_fraction": 0.9,
            **sections.get("data", {}),
        }
        sections = {**sections, "data": {**data, "shards": shards}}
    (warning,) = said_by_train(tmp_path / "run", **sections)
    assert warning.startswith(
        f"warning: the first step was computed twice from the same state, with different results ({words}"
    )
    assert "a resume of this run would not be exact" in warning
    assert "\n" not in warning


@pytest.mark.training
@pytest.mark.parametrize("name", ["Steady", "Initializes"])
def test_code_that_a_resume_can_repeat_is_not_warned_of(name: str, tmp_path: Path) -> None:
    assert said_by_train(tmp_path / "run", **model(name)) == []


@pytest.mark.training
def test_a_resume_or_a_config_without_the_check_makes_none(tmp_path: Path) -> None:
    assert said_by_train(tmp_path / "off", check_determinism=False, **model("Unseeded")) == []
    assert len(said_by_train(tmp_path / "run", **model("Unseeded"))) == 1
    said: list[str] = []
    nondeterministic.builds.clear()
    resume(tmp_path / "run", last_step=3, say=said.append)
    assert (said, nondeterministic.builds) == ([], ["Unseeded"])
    resume(tmp_path / "run", last_step=4, say=said.append, assignments=("check_determinism=false",))
    assert said == []


@pytest.mark.training
def test_stepctl_s_own_code_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    build_parts = build.build

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return build_parts(*arguments, **options)

    monkeypatch.setattr(build, "build", counted)
    assert said_by_train(tmp_path / "built-in") == []
    assert len(calls) == 1
    assert said_by_train(tmp_path / "own", **model("Steady")) == []
    assert len(calls) == 4


@pytest.mark.training
def test_the_check_changes_no_bit_of_the_run(tmp_path: Path) -> None:
    states = []
    for check in (True, False):
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        config = make_config(
            stop={"last_step": 3}, check_determinism=check, **model("GlobalPython")
        )
        states.append((train(config, tmp_path / str(check)), random.random(), np.random.random()))  # noqa: NPY002
    assert states[0][0].same_bits(states[1][0])
    assert states[0][1:] == states[1][1:]


@pytest.mark.training
def test_a_model_that_cannot_be_built_twice_gets_a_warning_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nondeterministic, "_builds", itertools.count())
    (warning,) = said_by_train(tmp_path / "run", **model("OnlyOnce"))
    assert warning.startswith(
        "warning: determinism could not be checked: the parts of the run cannot be built a second"
    )
    assert "this port is in use" in warning
    assert (tmp_path / "run" / "checkpoints" / "step-00000002.h5").exists()


def test_a_metric_that_is_not_a_number_is_refused_before_the_run_is_created(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ConfigError) as caught:
        said_by_train(
            tmp_path / "run", task={"name": "tests.support.metrics_task:Measures", "wrong": "text"}
        )
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert not (tmp_path / "run").exists()
