"""Several named arrays in one file: which ones are x and y, and which ones the validation data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.config import registry
from stepctl.data.base import Source, Sources
from stepctl.errors import ConfigError, DataError
from stepctl.state.arena import Array
from stepctl.training.assembly import TaskAssembly
from stepctl.training.build import prepare
from tests.support.messages import without_paths
from tests.support.runs import make_config

KINDS = ("arrays", "hdf5")
# each array holds its own number
PLAIN = ("x", "y")
KERAS = ("x_train", "y_train", "x_test", "y_test")
NUMBERS = {
    name: number for number, name in enumerate(("x", "y", *KERAS, "images", "labels", "held", "of"))
}


def array(name: str) -> Array:
    """Return an array that can be told from the others: 12 rows of training data, 6 of others."""
    rows = 12 if name in ("x", "y", "x_train", "y_train", "images", "labels") else 6
    shape = (rows, 3) if name in ("x", "x_train", "x_test", "images", "held") else (rows,)
    return np.full(shape, NUMBERS[name])


def write(kind: str, path: Path, *names: str) -> str:
    arrays: dict[str, Any] = {name: array(name) for name in names}
    if kind == "arrays":
        with path.open("wb") as file:
            np.savez(file, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    return str(path)


def build(kind: str, *, needs_targets: bool = True, **keys: Any) -> Sources:
    full, problems = registry.check("data", {"name": kind, **keys})
    assert not problems
    context = {"targets": "values", "dtype": "float32", "needs_targets": needs_targets}
    sources: Sources = registry.build("data", full, **context)
    return sources


def names(source: Source | None) -> tuple[str | None, ...] | None:
    """Return the names of the arrays that a source reads."""
    if source is None:
        return None
    found: list[str | None] = []
    for values in next(iter(source.slices()))[1:]:
        numbers = np.unique(values)
        assert len(numbers) < 2
        found.append(next((k for k, n in NUMBERS.items() if [n] == numbers.tolist()), None))
    return tuple(found)


# arrays in the file, keys of the config, the training arrays, the validation arrays
ONE_FILE: dict[str, tuple[Any, ...]] = {
    "x and y": (PLAIN, {}, PLAIN, None),
    "as in Keras": (KERAS, {}, KERAS[:2], KERAS[2:]),
    "no validation, by hand": (KERAS, {"validation_x": None}, KERAS[:2], None),
    "no validation arrays": (KERAS[:2], {}, KERAS[:2], None),
    "x and y before the others": ((*PLAIN, *KERAS), {}, PLAIN, None),
    "named training arrays have no validation arrays by default": (
        (*PLAIN, *KERAS),
        {"x": "x_train", "y": "y_train"},
        KERAS[:2],
        None,
    ),
    "all four named": (
        ("images", "labels", "held", "of"),
        {"x": "images", "y": "labels", "validation_x": "held", "validation_y": "of"},
        ("images", "labels"),
        ("held", "of"),
    ),
    "other validation arrays": (
        (*KERAS, "held", "of"),
        {"validation_x": "held", "validation_y": "of"},
        KERAS[:2],
        ("held", "of"),
    ),
    "another y": (
        (*KERAS, "labels"),
        {"y": "labels", "validation_y": "y_test"},
        ("x_train", "labels"),
        KERAS[2:],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ONE_FILE)
def test_the_arrays_of_one_file(case: str, kind: str, tmp_path: Path) -> None:
    stored, keys, training, validation = ONE_FILE[case]
    found = build(kind, path=write(kind, tmp_path / "data", *stored), **keys)
    assert names(found.train) == training
    assert names(found.validation) == validation
    if found.validation is not None:
        assert found.validation.origin == f"{tmp_path}/data ({validation[0]})"


TWO_FILES: dict[str, tuple[Any, ...]] = {
    "x and y": (PLAIN, PLAIN, {}, PLAIN, PLAIN),
    "train and test": (KERAS[:2], KERAS[2:], {}, KERAS[:2], KERAS[2:]),
    "the validation arrays of the training file are left out": (
        KERAS,
        PLAIN,
        {},
        KERAS[:2],
        PLAIN,
    ),
    "names for the validation file": (
        PLAIN,
        ("held", "of"),
        {"validation_x": "held", "validation_y": "of"},
        PLAIN,
        ("held", "of"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TWO_FILES)
def test_the_arrays_of_two_files(case: str, kind: str, tmp_path: Path) -> None:
    stored, held, keys, training, validation = TWO_FILES[case]
    path = write(kind, tmp_path / "data", *stored)
    validation_path = write(kind, tmp_path / "held", *held)
    found = build(kind, path=path, validation_path=validation_path, **keys)
    assert names(found.train) == training
    assert names(found.validation) == validation


WITHOUT_TARGETS: dict[str, tuple[Any, ...]] = {
    "there are none": (("x",), {}, ("x", None), None),
    "left out": (PLAIN, {"y": None}, ("x", None), None),
    "in both parts": (("x_train", "x_test"), {}, ("x_train", None), ("x_test", None)),
    "in both parts, left out": (KERAS, {"y": None}, ("x_train", None), ("x_test", None)),
    "named samples": (
        ("images", "held"),
        {"x": "images", "validation_x": "held"},
        ("images", None),
        ("held", None),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WITHOUT_TARGETS)
def test_data_without_targets(case: str, kind: str, tmp_path: Path) -> None:
    stored, keys, training, validation = WITHOUT_TARGETS[case]
    path = write(kind, tmp_path / "data", *stored)
    found = build(kind, path=path, needs_targets=False, **keys)
    assert names(found.train) == training
    assert names(found.validation) == validation
    assert not found.train.has_targets
    with pytest.raises(DataError):
        build(kind, path=path, **keys)


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "no x": (("images", "labels"), {}),
    "no y": (("x", "labels"), {}),
    "no y_train": (("x_train", "x_test"), {}),
    "no y_test": (KERAS[:3], {}),
    "a name that is not there": (KERAS, {"x": "x_trian"}),
    "a validation name that is not there": (PLAIN, {"validation_x": "held", "validation_y": "of"}),
    "validation samples without targets": (KERAS, {"validation_x": "x_test"}),
    "validation targets without samples": (PLAIN, {"validation_y": "y_test"}),
    "validation targets of samples left out": (
        KERAS,
        {"validation_x": None, "validation_y": "y_test"},
    ),
    "y left out": (PLAIN, {"y": None}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_lists_what_the_file_has(
    case: str, kind: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    stored, keys = REFUSED[case]
    path = write(kind, tmp_path / "data", *stored)
    with pytest.raises(DataError) as caught:
        build(kind, path=path, **keys)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


def test_a_validation_file_without_validation_samples_is_refused(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = write("arrays", tmp_path / "data", *PLAIN)
    with pytest.raises(DataError) as caught:
        build("arrays", path=path, validation_path=path, validation_x=None)
    assert str(caught.value) == snapshot


def test_the_test_arrays_are_evaluated(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    def prepared(**keys: Any) -> TaskAssembly:
        path = write("arrays", tmp_path / "data", *KERAS)
        config = make_config(
            data={"name": "arrays", "path": path, "batch_size": 4, **keys},
            task={"name": "regression"},
        )
        assembly = prepare(config)
        assert isinstance(assembly, TaskAssembly)
        return assembly

    assembly = prepared()
    assert assembly.validation is not None
    assert (assembly.training.subset.n, assembly.validation.subset.n) == (12, 6)
    with pytest.raises(ConfigError) as caught:
        prepared(validation_fraction=0.5)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assembly = prepared(validation_fraction=0.5, validation_x=None)
    assert assembly.validation is not None
    assert (assembly.training.subset.n, assembly.validation.subset.n) == (6, 6)


@pytest.mark.parametrize("lacking", ["y_train", "y_test"])
def test_targets_of_the_training_or_the_validation_samples_alone_are_refused(
    lacking: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = write("arrays", tmp_path / "data", *(name for name in KERAS if name != lacking))
    data = {"name": "arrays", "path": path, "batch_size": 4}
    model = {"name": "tests.support.loss_models:Autoencoder"}
    sections: dict[str, Any] = {"task": {"name": "loss"}, "model": model}
    with pytest.raises(ConfigError) as caught:
        prepare(make_config(data=data, **sections))
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    prepare(make_config(data={**data, "y": None, "validation_y": None}, **sections))
