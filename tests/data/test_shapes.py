"""x and y of any shape; what needs another one says so in one line."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.config import registry
from stepctl.data.base import NO_TARGETS, Source, Sources
from stepctl.data.batches import Subset, TrainingBatches
from stepctl.errors import ConfigError, DataError
from stepctl.programs.supervised import Regression
from stepctl.state.arena import Array
from stepctl.training.build import prepare
from tests.data.test_integers import idx
from tests.support.messages import without_paths
from tests.support.runs import make_config, resume, train

N = 10
Files = Callable[[Path, Array, Array | None], dict[str, Any]]


def write_npz(folder: Path, x: Array, y: Array | None) -> dict[str, Any]:
    arrays: dict[str, Any] = {"x": x} if y is None else {"x": x, "y": y}
    np.savez(folder / "data.npz", **arrays)
    return {"name": "arrays", "path": str(folder / "data.npz")}


def hdf5_writer(**options: Any) -> Files:
    def write(folder: Path, x: Array, y: Array | None) -> dict[str, Any]:
        with h5py.File(folder / "data.h5", "w") as file:
            file.create_dataset("x", data=x, **options)
            if y is not None:
                file.create_dataset("y", data=y, **options)
        return {"name": "hdf5", "path": str(folder / "data.h5")}

    return write


def write_idx(folder: Path, x: Array, y: Array | None) -> dict[str, Any]:
    spec = {"name": "idx", "images": str(folder / "x"), "scale": 1}
    (folder / "x").write_bytes(gzip.compress(idx(x)))
    if y is None:
        return spec
    (folder / "y").write_bytes(idx(y))
    return {**spec, "labels": str(folder / "y")}


KINDS: dict[str, Files] = {
    "npz": write_npz,
    "hdf5": hdf5_writer(),
    "hdf5, chunked": hdf5_writer(chunks=True, compression="gzip"),
    "idx": write_idx,
}
SHAPES = [(), (1,), (3,), (2, 3), (2, 3, 4), (1, 1, 2, 2)]


def some(shape: tuple[int, ...], dtype: str = "f8") -> Array:
    """Return N rows of a shape, all numbers different and exact in float32."""
    n = N * int(np.prod(shape))
    return np.arange(n).reshape(N, *shape).astype(dtype)


def build(spec: dict[str, Any], targets: str = "any", **context: Any) -> Source:
    full, problems = registry.check("data", spec)
    assert not problems
    context = {"targets": targets, "dtype": "float32", "integer_inputs": True, **context}
    sources: Sources = registry.build("data", full, **context)
    return sources.train


def read(source: Source) -> tuple[Array, Array]:
    """Return rows 0 to 7 as a run reads them."""
    batches = TrainingBatches(
        Subset(source, N), seed=0, batch_size=8, dtype="float32", order="sequential"
    )
    return batches.batch(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["f8", "i4", "u1"])
@pytest.mark.parametrize("x_shape", SHAPES)
def test_rows_have_their_stored_shape(
    x_shape: tuple[int, ...], dtype: str, kind: str, tmp_path: Path
) -> None:
    for number, y_shape in enumerate(SHAPES):
        folder = tmp_path / str(number)
        folder.mkdir()
        x, y = some(x_shape, dtype), some(y_shape, dtype)
        source = build(KINDS[kind](folder, x, y))
        assert (source.sample_shape, source.target_shape) == (x_shape, y_shape)
        for found, stored in zip(read(source), (x, y), strict=True):
            assert found.dtype == ("float32" if dtype == "f8" else dtype)
            np.testing.assert_array_equal(found, stored[:8])
        slices = [*source.slices()]
        for part, stored in ((1, x), (2, y)):
            np.testing.assert_array_equal(np.concatenate([s[part] for s in slices]), stored)
        source.check(None)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_one_axis_are_columns_and_others_keep_their_shape(
    kind: str, tmp_path: Path
) -> None:
    for y_shape, target_shape in [((), (1,)), ((3,), (3,)), ((2, 3), (2, 3))]:
        (tmp_path / str(len(y_shape))).mkdir()
        y = some(y_shape)
        source = build(KINDS[kind](tmp_path / str(len(y_shape)), some((2,)), y), "values")
        assert source.target_shape == target_shape
        np.testing.assert_array_equal(read(source)[1], y.reshape(N, *target_shape)[:8])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["any", "values", "classes"])
def test_data_without_y(targets: str, kind: str, tmp_path: Path) -> None:
    x = some((2, 3))
    source = build(KINDS[kind](tmp_path, x, None), targets, needs_targets=False)
    assert not source.has_targets
    found, y = read(source)
    np.testing.assert_array_equal(found, x[:8])
    assert y.shape == (8, *NO_TARGETS)
    source.check(None)
    fingerprint = source.fingerprint()
    (tmp_path / "other").mkdir()
    other = build(KINDS[kind](tmp_path / "other", x + 1, None), targets, needs_targets=False)
    assert other.fingerprint() != fingerprint


def test_a_csv_without_a_target(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "data.csv", some((3,)), delimiter=",")
    spec = {"name": "csv", "path": str(tmp_path / "data.csv"), "target": None}
    source = build(spec, needs_targets=False)
    assert (source.sample_shape, source.has_targets) == ((3,), False)
    np.testing.assert_array_equal(read(source)[0], some((3,))[:8])
    with pytest.raises(DataError, match=r"data.target: is null, but the task learns from"):
        build(spec)


# What the built-in models and tasks need


def config(folder: Path, x: Array, y: Array | None, task: str, kind: str = "npz") -> Any:
    model: dict[str, Any] = {"name": "mlp", "hidden": [4]}
    optimizer: dict[str, Any] = {"name": "adam", "learning_rate": 0.01}
    sections: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if task == "wgan":
        sections = {name: {"critic": v, "generator": v} for name, v in sections.items()}
    keys = {"latent": 2, "weight_clip": 0.1} if task == "wgan" else {}
    return make_config(
        data={**KINDS[kind](folder, x, y), "batch_size": 4},
        task={"name": task, **keys},
        evaluate={},
        stop={"last_step": 3},
        **sections,
    )


REFUSED: dict[str, tuple[Any, ...]] = {
    "one number a row": (some(()), some(()), "regression"),
    "one number a row, generated": (some(()), some((), "u1") % 2, "wgan"),
    "targets in rows and columns": (some((2,)), some((2, 3)), "regression"),
    "labels in rows and columns": (some((2,)), some((2, 3), "u1"), "classification"),
    "no targets": (some((2,)), None, "regression"),
    "no labels": (some((2,)), None, "classification"),
    "a single number": (np.zeros(()), some(()), "regression"),
    "a single target": (some((2,)), np.zeros(()), "regression"),
    "no features": (some((2, 0)), some(()), "regression"),
    "no columns": (some((2,)), some((2, 0)), "regression"),
    "other rows": (some((2,)), some(())[1:], "regression"),
    "no rows": (some((2,))[:0], some(())[:0], "regression"),
    "complex numbers": (some((2,)) * 1j, some(()), "regression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_shape_that_does_not_fit_is_refused_in_one_line(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    x, y, task = REFUSED[case]
    with pytest.raises((ConfigError, DataError)) as caught:
        prepare(config(tmp_path, x, y, task))
    assert "\n" not in str(caught.value)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


def test_labels_of_idx_files_are_needed(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(DataError) as caught:
        prepare(config(tmp_path, some((2, 2)), None, "classification", "idx"))
    assert str(caught.value) == snapshot


def test_a_user_s_source_without_targets_is_refused(snapshot: SnapshotAssertion) -> None:
    sections = {"task": {"name": "regression"}, "evaluate": {}}
    data = {"name": "tests.support.token_model:windows_alone", "batch_size": 4}
    with pytest.raises(ConfigError) as caught:
        prepare(make_config(data=data, **sections))
    assert str(caught.value) == snapshot


def test_the_number_of_outputs_is_that_of_the_columns() -> None:
    assert Regression.n_outputs(None, (3,)) == 3


@pytest.mark.training
@pytest.mark.parametrize("kind", KINDS)
def test_a_gan_learns_from_samples_alone(kind: str, tmp_path: Path) -> None:
    settings = config(tmp_path, some((2, 2)) / 64, None, "wgan", kind)
    expected = train(settings, tmp_path / "whole")
    train(settings.with_values({"stop.last_step": 1}), tmp_path / "run")
    assert resume(tmp_path / "run", last_step=3).same_bits(expected)


def test_validation_data_of_another_kind_of_number_are_refused(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    x = some((2,), "i8")
    np.savez(tmp_path / "data.npz", x_train=x, x_test=x * 0.5)
    with pytest.raises(ConfigError) as caught:
        prepare(
            make_config(
                data={"name": "arrays", "path": str(tmp_path / "data.npz"), "batch_size": 4},
                task={"name": "loss"},
                model={"name": "tests.support.token_model:Bigram"},
            )
        )
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
