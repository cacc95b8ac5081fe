"""Integers in the data keep every bit, or a warning names the first one that does not."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.config import registry
from stepctl.data.base import Source, Sources
from stepctl.data.batches import Subset, TrainingBatches
from stepctl.data.integers import first_rounded
from stepctl.errors import ConfigError
from stepctl.state.arena import Array
from stepctl.training.build import prepare
from tests.support.messages import without_paths
from tests.support.runs import make_config

IDS = np.array([33554433, 33554434])  # the first two integers that are equal in float32
N = 24
X = np.resize(IDS, (N, 2)).astype(np.int32)
Y = np.arange(N, dtype=np.int32) % 3

IDX_CODES = {"i4": 0x0C, "u1": 0x08, "f8": 0x0E}


def write_npz(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    np.savez(folder / "data.npz", x=x, y=y)
    return {"name": "arrays", "path": str(folder / "data.npz")}


def write_hdf5(folder: Path, x: Array, y: Array, **options: Any) -> dict[str, Any]:
    with h5py.File(folder / "data.h5", "w") as file:
        file.create_dataset("x", data=x, **options)
        file.create_dataset("y", data=y, **options)
    return {"name": "hdf5", "path": str(folder / "data.h5")}


def write_chunked(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    return write_hdf5(folder, x.astype(x.dtype.newbyteorder(">")), y, chunks=True)


def write_csv(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    rows = [",".join(map(str, [*row, label])) for row, label in zip(x, y, strict=True)]
    (folder / "data.csv").write_text("a,b,c\n" + "\n".join(rows))
    return {"name": "csv", "path": str(folder / "data.csv"), "header": True}


def idx(array: Array) -> bytes:
    code = IDX_CODES[array.dtype.str[1:]]
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    (folder / "images").write_bytes(idx(x))
    (folder / "labels").write_bytes(gzip.compress(idx(y)))
    files = {"images": str(folder / "images"), "labels": str(folder / "labels")}
    return {"name": "idx", **files, "scale": 1}


KINDS: dict[str, Callable[[Path, Array, Array], dict[str, Any]]] = {
    "npz": write_npz,
    "hdf5": write_hdf5,
    "hdf5, chunked and big-endian": write_chunked,
    "csv": write_csv,
    "idx": write_idx,
}


def build(spec: dict[str, Any], **context: Any) -> Sources:
    full, problems = registry.check("data", spec)
    assert not problems
    sources: Sources = registry.build("data", full, **context)
    return sources


def first_batch(source: Source, dtype: str = "float32") -> tuple[Array, Array]:
    """Return rows 0 to 3 as a run reads them."""
    batches = TrainingBatches(
        Subset(source, source.n), seed=0, batch_size=4, dtype=dtype, order="sequential"
    )
    return batches.batch(0)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_come_back_as_they_are_stored(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path, X, Y)
    context = {"dtype": "float32", "integer_inputs": True}
    for targets, labels in (("classes", np.dtype(np.int64)), ("values", np.dtype(np.float32))):
        source = build(spec, targets=targets, **context).train
        x, y = first_batch(source)
        np.testing.assert_array_equal(x, X[:4])
        assert x.dtype.kind == "i"
        assert x.dtype.isnative
        assert y.dtype == labels
        ((_, whole, _),) = source.slices()
        np.testing.assert_array_equal(whole, X)
        assert [*source.warnings()] == []


def test_unsigned_ids_of_a_csv_come_back_as_they_are_written(tmp_path: Path) -> None:
    ids = X.astype(np.uint64) + np.uint64(2**63)
    spec = write_csv(tmp_path, ids, Y)
    source = build(spec, targets="classes", dtype="float32", integer_inputs=True).train
    x, _ = first_batch(source)
    assert x.dtype == np.uint64
    np.testing.assert_array_equal(x, ids[:4])
    rounded = build(spec, targets="classes", dtype="float32").train
    (warning,) = rounded.warnings()
    assert f"x is the integer {ids[0, 0]}, which float32 rounds to" in warning


@pytest.mark.parametrize("kind", KINDS)
def test_integer_targets_stay_integers_if_the_task_takes_any(kind: str, tmp_path: Path) -> None:
    y = np.resize(IDS, N).astype(np.int32)
    spec = KINDS[kind](tmp_path, X, y)
    source = build(spec, targets="any", dtype="float32").train
    x, found = first_batch(source)
    assert found.shape == (4,)
    np.testing.assert_array_equal(found, y[:4])
    assert found.dtype.kind == "i"
    assert x.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_floats_of_a_model_of_integers_have_the_run_s_type(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind](tmp_path, X / 2, Y / 4) if kind != "idx" else None
    if spec is None:
        spec = {**write_idx(tmp_path, X, Y), "scale": 0.5}
    source = build(spec, targets="any", dtype="float32", integer_inputs=True).train
    x, _ = first_batch(source)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, X[:4].astype(np.float32) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_sees_a_change_that_float32_does_not(kind: str, tmp_path: Path) -> None:
    def fingerprint(x: Array) -> str:
        spec = KINDS[kind](tmp_path, x, Y)
        context = {"targets": "classes", "dtype": "float32", "integer_inputs": True}
        return build(spec, **context).train.fingerprint()

    other = X.copy()
    other[0, 0] -= 1
    assert np.array_equal(X.astype(np.float32), other.astype(np.float32))
    assert fingerprint(X) != fingerprint(other)


def test_the_sign_of_an_integer_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    x = np.array([[-1], [1]], np.int32)
    context = {"targets": "classes", "dtype": "float32", "integer_inputs": True}
    found = {
        build(write_npz(tmp_path, kind, Y[:2]), **context).train.fingerprint()
        for kind in (x, x.view(np.uint32))
    }
    assert len(found) == 2


# Warnings about integers that the run's dtype rounds


def warnings(config: Any) -> list[str]:
    said: list[str] = []
    prepare(config, say=said.append)
    return said


def regression(data: dict[str, Any], **sections: Any) -> Any:
    return make_config(
        data={**data, "batch_size": 4},
        **{"task": {"name": "regression"}, "evaluate": {}} | sections,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x", "y"])
def test_a_rounded_integer_gets_a_warning_that_names_its_row(
    kind: str, name: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    x = np.ones((N, 2), np.int32)
    y = np.ones(N, np.int32)
    (x[:, 1] if name == "x" else y)[17:] = 33554432
    (x[:, 1] if name == "x" else y)[19:] = 33554433
    data = KINDS[kind](tmp_path, x, y)
    (line,) = warnings(regression(data))
    assert without_paths(line, HERE=tmp_path) == snapshot
    assert f"{'line 21' if kind == 'csv' else 'row 19'}: {name} " in line
    assert warnings(regression(data, dtype="float64")) == []
    if name == "x":
        assert warnings(regression({**data, "scale": 1e-3})) == []


@pytest.mark.parametrize("kind", ["npz", "hdf5", "csv"])
def test_float64_rounds_above_2_to_the_53(
    kind: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    x = np.full((N, 2), 2**53, np.int64)
    data = KINDS[kind](tmp_path, x, Y)
    assert warnings(regression(data, dtype="float64")) == []
    x[3, 0] += 1
    (line,) = warnings(regression(KINDS[kind](tmp_path, x, Y), dtype="float64"))
    assert without_paths(line, HERE=tmp_path) == snapshot


def test_numbers_of_a_csv_that_are_not_written_as_integers_may_be_rounded(tmp_path: Path) -> None:
    x = X * 1.0
    assert "33554433.0" in str(x.tolist())
    assert warnings(regression(write_csv(tmp_path, x, Y))) == []
    data = write_csv(tmp_path, x, Y)
    source = build(data, targets="classes", dtype="float64", integer_inputs=True).train
    assert source.x_dtype == np.float64


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["i4", "i8", "u4", "u8"])
def test_the_first_rounded_integer_is_found(kind: str, dtype: str) -> None:
    info = np.iinfo(kind)
    draws = np.random.default_rng(0).integers(info.min, info.max, (200, 3), kind, endpoint=True)
    kept = 2 ** (np.finfo(dtype).nmant + 1)
    edges = [info.max, info.max - 1, info.min, 0, kept - 1, kept, kept + 1, kept + 2, -kept - 1]
    rows = [[value] for value in edges if info.min <= value <= info.max]
    for values in (draws, np.array(rows, kind)):
        for start in range(len(values)):
            expected = None
            for row, numbers in enumerate(values[start:].tolist()):
                wrong = [value for value in numbers if int(np.dtype(dtype).type(value)) != value]
                if wrong:
                    expected = (row, wrong[0])
                    break
            assert first_rounded(values[start:], np.dtype(dtype)) == expected


class Ids(Source):
    """A user's source of ids, which declares their dtype or not."""

    def __init__(self, dtype: Any) -> None:
        self.origin = "own ids"
        self.n = N
        self.sample_shape = (2,)
        self.target_shape = ()
        self.x_dtype = dtype

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        x[...] = X[rows]
        y[...] = Y[rows]

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        yield 0, X, Y

    def fingerprint(self) -> str:
        return "ids"


def declared_ids() -> Sources:
    return Sources(Ids(np.dtype(np.int32)))


def undeclared_ids() -> Sources:
    return Sources(Ids(None))


def own(source: str, model: str = "mlp") -> Any:
    spec = {"name": "mlp", "hidden": [4]}
    if model != "mlp":
        spec = {"name": f"tests.support.token_model:{model}"}
    return make_config(
        data={"name": f"{__name__}:{source}", "batch_size": 4}, model=spec, evaluate={}
    )


def test_a_user_s_source_may_declare_an_integer_dtype(snapshot: SnapshotAssertion) -> None:
    assembly = prepare(own("declared_ids", "Embedding"))
    assert assembly.training.batch(0).x.dtype == np.int32
    with pytest.raises(ConfigError) as caught:
        prepare(own("declared_ids"))
    assert str(caught.value) == snapshot


def test_a_user_s_integers_that_a_batch_rounds_get_a_warning(snapshot: SnapshotAssertion) -> None:
    assert warnings(own("undeclared_ids")) == snapshot


@pytest.mark.parametrize("model", ["Embedding", "embedding"])
def test_a_model_declares_that_it_takes_integers(model: str) -> None:
    config = make_config(
        data={"name": "tests.support.token_model:large_ids", "batch_size": 4},
        model={"name": f"tests.support.token_model:{model}"},
        evaluate={},
    )
    x = prepare(config).training.batch(0).x
    assert x.dtype == np.int64
    assert len(np.unique(x)) == x.size


def test_a_function_that_does_not_declare_its_model_is_refused(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(own("undeclared_ids", "undeclared"))
    assert str(caught.value) == snapshot
