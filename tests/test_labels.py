"""Labels that are wrong are refused, and data that are legal but suspect get a warning, before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from helpers import make_config
from stepctl import run
from stepctl.arena import Array
from stepctl.assembly import prepare
from stepctl.config import Config
from stepctl.data.base import Source, Sources
from stepctl.errors import ConfigError, DataError, StepctlError
from stepctl.rundir import RunDirectory

N = 24


class Own(Source):
    """A user's source, whose methods return what the test says."""

    labels: ClassVar[list[Any]]
    read_labels: ClassVar[list[Any] | None]
    classes: ClassVar[Any]

    def __init__(self) -> None:
        self.origin, self.n, self.sample_shape, self.target_shape = "own", len(self.labels), (3,), ()

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
    spec = {"name": f"test_labels:{source}", "batch_size": 4, **data}
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


@pytest.mark.parametrize("source", ["own", "checks_nothing"])
def test_a_negative_label_is_refused(source: str) -> None:
    Own.labels = [0, 1, 2, -1] * 6
    assert refusal(own_config(source)).startswith("own: row 3: label -1 is outside 0..2; labels are 0, 1, 2, ...")


@pytest.mark.parametrize("task", ["classification", "binary_classification"])
def test_labels_of_minus_and_plus_one_are_refused(task: str) -> None:
    Own.labels = [1, -1] * 12
    message = "own: row 1: label -1 is outside 0..1; labels are 0, 1, 2, ...: number the classes from 0"
    assert refusal(own_config(task=task)).startswith(message)


def test_negative_labels_alone_are_refused() -> None:
    Own.labels = [-1, -2] * 12
    assert refusal(own_config()).startswith("own: the largest label is -1; labels are 0, 1, 2, ...")


@pytest.mark.parametrize("label", [1.5, float("nan")])
def test_a_label_that_is_no_whole_number_is_refused(label: float) -> None:
    Own.labels, Own.classes = [0.0, 1.0, label, 1.0] * 6, 2
    assert f"row 2: label {label} is outside 0..1" in refusal(own_config())


def test_labels_that_are_read_otherwise_than_shown_are_refused() -> None:
    Own.read_labels = [-1] * N
    assert refusal(own_config()).startswith("own: the first batch: row 0: label -1 is outside 0..2")


@pytest.mark.parametrize("n_classes", [2.5, "3", 0])
def test_a_count_of_classes_that_is_none_is_refused(n_classes: Any) -> None:
    Own.classes = n_classes
    assert refusal(own_config()).startswith("own: ")


def test_labels_of_one_and_two_in_a_binary_classification_are_refused() -> None:
    Own.labels = [1, 2] * 12
    assert refusal(own_config(task="binary_classification")) == (
        "task.name: binary_classification needs labels 0 and 1, but the largest label, or data.n_classes - 1, is 2; "
        "subtract 1 from labels 1 and 2; for more than two classes use classification"
    )


def test_labels_from_one_on_get_a_warning() -> None:
    Own.labels = [1, 2, 3] * 8
    assert warnings(own_config()) == [
        "warning: own: the labels are 1..3, but classes are numbered from 0; subtract 1, or the model gets classes "
        "that never occur"
    ]


@pytest.mark.parametrize("label", [0, 1])
def test_a_single_class_gets_a_warning(label: int) -> None:
    Own.labels = [label] * N
    text = f"warning: own: every label is {label}; a model can only learn to tell two or more classes apart"
    assert warnings(own_config()) == [text]


def test_one_class_in_a_binary_classification() -> None:
    Own.labels = [0] * N
    assert "needs labels 0 and 1, but every label is 0" in refusal(own_config(task="binary_classification"))
    Own.labels = [1] * N
    assert "every label is 1" in warnings(own_config(task="binary_classification"))[0]


def test_validation_data_that_are_the_training_data_get_a_warning(tmp_path: Path) -> None:
    assert warnings(own_config("validated_by_itself")) == [
        "warning: own: the validation data are the training data; name others"
    ]
    x, y = np.random.default_rng(0).normal(size=(N, 3)), np.arange(N) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x=x, y=y)
    np.savez(tmp_path / "c.npz", x=x[:6], y=[0, 1, 2, 0, 1, 1])
    for other, expected in [("a", 1), ("b", 1), ("c", 0)]:
        paths = {"path": str(tmp_path / "a.npz"), "validation_path": str(tmp_path / f"{other}.npz")}
        spec = {"name": "arrays", "batch_size": 4, **paths}
        assert len(warnings(make_config(data=spec))) == expected


def test_a_label_of_the_validation_data_alone_gets_a_warning(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones((6, 2)), y=[0, 1, 0, 1, 0, 1])
    np.savez(tmp_path / "b.npz", x=np.ones((4, 2)), y=[0, 1, 0, 2])
    paths = {"path": str(tmp_path / "a.npz"), "validation_path": str(tmp_path / "b.npz")}
    said = warnings(make_config(data={"name": "arrays", "batch_size": 4, **paths}))
    assert said == [f"warning: {tmp_path / 'b.npz'}: label 2 does not occur in the training data"]


def test_a_batch_larger_than_the_data_gets_a_warning() -> None:
    assert warnings(own_config(batch_size=N)) == []
    assert warnings(own_config(batch_size=N + 1)) == [
        f"warning: data.batch_size: 25 is more than the {N} training rows, so a batch repeats some; lower it"
    ]


def test_a_fresh_run_says_its_warnings_once_and_a_resume_none(tmp_path: Path) -> None:
    Own.labels = [1, 2, 3] * 8
    said: list[str] = []
    config = own_config()
    with run.create(config, RunDirectory(tmp_path / "run"), said.append) as segment:
        segment.train()
    assert sum(line.startswith("warning: own:") for line in said) == 1
    said.clear()
    with run.resume(RunDirectory(tmp_path / "run"), run.ResumeOptions(), said.append):
        pass
    assert said == []


def test_labels_that_a_task_does_not_use_get_no_warning() -> None:
    rmsprop = {"name": "rmsprop", "learning_rate": 1e-3}
    model = {"name": "mlp", "hidden": [4]}
    Own.labels = [0] * N
    config = make_config(
        data={"name": "test_labels:own", "batch_size": 4},
        task={"name": "wgan", "latent": 2, "weight_clip": 0.1},
        model={"critic": model, "generator": model},
        optimizer={"critic": rmsprop, "generator": rmsprop},
        evaluate={},
    )
    assert warnings(config) == []
