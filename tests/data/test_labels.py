"""Wrong labels are refused, suspect data get a warning, both before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.config.model import Config
from stepctl.data.base import Source, Sources
from stepctl.errors import ConfigError, DataError, StepctlError
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import create_run, resume_run
from stepctl.state.arena import Array
from stepctl.training.build import prepare
from tests.support.messages import without_paths
from tests.support.runs import make_config

N = 24


class Own(Source):
    """A user's source, whose methods return what the test says."""

    labels: ClassVar[list[Any]]
    read_labels: ClassVar[list[Any] | None]
    classes: ClassVar[Any]

    def __init__(self) -> None:
        self.origin = "own"
        self.n = len(self.labels)
        self.sample_shape = (3,)
        self.target_shape = ()

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        x[...] = 1
        y[...] = np.asarray(self.read_labels or self.labels)[rows]

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        yield 0, np.ones((self.n, 3), np.float32), np.array(self.labels)

    def fingerprint(self) -> str:
        return "own"

    def n_classes(self) -> int:
        found: int = super().n_classes() if self.classes is None else self.classes
        return found


class ChecksNothing(Own):
    def check(self, n_classes: int | None) -> None:
        return


def own() -> Sources:
    return Sources(Own())


def checks_nothing() -> Sources:
    return Sources(ChecksNothing())


def validated_by_itself() -> Sources:
    return Sources(Own(), ChecksNothing())


def own_config(source: str = "own", task: str = "classification", **data: Any) -> Config:
    spec = {"name": f"{__name__}:{source}", "batch_size": 4, **data}
    return make_config(data=spec, task={"name": task}, evaluate={})


@pytest.fixture(autouse=True)
def usual_labels() -> None:
    Own.labels, Own.read_labels, Own.classes = [0, 1, 2] * 8, None, None


def warnings(config: Config) -> list[str]:
    said: list[str] = []
    prepare(config, say=said.append)
    return said


def refusal(config: Config) -> str:
    with pytest.raises(StepctlError) as caught:
        prepare(config)
    assert isinstance(caught.value, DataError | ConfigError)
    return str(caught.value)


def test_labels_from_zero_on_need_no_warning() -> None:
    assert warnings(own_config()) == []


class Case(NamedTuple):
    """What the user's source returns, its name and the task."""

    labels: list[Any]
    source: str = "own"
    task: str = "classification"
    read_labels: list[Any] | None = None
    classes: Any = None


REFUSED = {
    "a negative label": Case([0, 1, 2, -1] * 6),
    "a negative label, unchecked by the source": Case([0, 1, 2, -1] * 6, "checks_nothing"),
    "minus and plus one": Case([1, -1] * 12),
    "minus and plus one, binary": Case([1, -1] * 12, task="binary_classification"),
    "negative labels alone": Case([-1, -2] * 12),
    "a fraction": Case([0.0, 1.0, 1.5, 1.0] * 6, classes=2),
    "no number": Case([0.0, 1.0, math.nan, 1.0] * 6, classes=2),
    "labels that are read otherwise than shown": Case([0, 1, 2] * 8, read_labels=[-1] * N),
    "a count of classes with a fraction": Case([0, 1, 2] * 8, classes=2.5),
    "a count of classes as text": Case([0, 1, 2] * 8, classes="3"),
    "a count of no classes": Case([0, 1, 2] * 8, classes=0),
    "one and two, binary": Case([1, 2] * 12, task="binary_classification"),
    "zeros, binary": Case([0] * N, task="binary_classification"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_labels_are_refused(case: str, snapshot: SnapshotAssertion) -> None:
    labels, source, task, read_labels, classes = REFUSED[case]
    Own.labels, Own.read_labels, Own.classes = labels, read_labels, classes
    assert refusal(own_config(source, task)) == snapshot


WARNED = {
    "labels from one on": Case([1, 2, 3] * 8),
    "zeros": Case([0] * N),
    "ones": Case([1] * N),
    "ones, binary": Case([1] * N, task="binary_classification"),
    "validation data that are the training data": Case([0, 1, 2] * 8, "validated_by_itself"),
}


@pytest.mark.parametrize("case", WARNED)
def test_suspect_labels_get_a_warning(case: str, snapshot: SnapshotAssertion) -> None:
    Own.labels = WARNED[case].labels
    (line,) = warnings(own_config(WARNED[case].source, WARNED[case].task))
    assert line.startswith("warning: own: ")
    assert line == snapshot


def test_validation_data_that_are_a_copy_of_the_training_data_get_a_warning(
    tmp_path: Path,
) -> None:
    x, y = np.random.default_rng(0).normal(size=(N, 3)), np.arange(N) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x=x, y=y)
    np.savez(tmp_path / "c.npz", x=x[:6], y=[0, 1, 2, 0, 1, 1])
    for other, expected in [("a", 1), ("b", 1), ("c", 0)]:
        paths = {"path": str(tmp_path / "a.npz"), "validation_path": str(tmp_path / f"{other}.npz")}
        spec = {"name": "arrays", "batch_size": 4, **paths}
        assert len(warnings(make_config(data=spec))) == expected


def test_a_label_of_the_validation_data_alone_gets_a_warning(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((6, 2)), y=[0, 1, 0, 1, 0, 1])
    np.savez(tmp_path / "b.npz", x=np.ones((4, 2)), y=[0, 1, 0, 2])
    paths = {"path": str(tmp_path / "a.npz"), "validation_path": str(tmp_path / "b.npz")}
    (line,) = warnings(make_config(data={"name": "arrays", "batch_size": 4, **paths}))
    assert without_paths(line, HERE=tmp_path) == snapshot


def test_a_batch_larger_than_the_data_gets_a_warning(snapshot: SnapshotAssertion) -> None:
    assert warnings(own_config(batch_size=N)) == []
    assert warnings(own_config(batch_size=N + 1)) == snapshot


@pytest.mark.training
def test_a_fresh_run_says_its_warnings_once_and_a_resume_none(tmp_path: Path) -> None:
    Own.labels = [1, 2, 3] * 8
    said: list[str] = []
    config = own_config()
    with create_run(config, RunDirectory(tmp_path / "run"), said.append) as segment:
        segment.train()
    assert sum(line.startswith("warning: own:") for line in said) == 1
    said.clear()
    with resume_run(RunDirectory(tmp_path / "run"), ResumeOptions(), said.append):
        pass
    assert said == []


def test_labels_that_a_task_does_not_use_get_no_warning() -> None:
    rmsprop = {"name": "rmsprop", "learning_rate": 1e-3}
    model = {"name": "mlp", "hidden": [4]}
    Own.labels = [0] * N
    config = make_config(
        data={"name": f"{__name__}:own", "batch_size": 4},
        task={"name": "wgan", "latent": 2, "weight_clip": 0.1},
        model={"critic": model, "generator": model},
        optimizer={"critic": rmsprop, "generator": rmsprop},
        evaluate={},
    )
    assert warnings(config) == []
