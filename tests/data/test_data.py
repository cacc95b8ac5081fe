"""Data sources return the rows of their files; a batch is a pure function of its position."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.config import registry
from stepctl.data.arrays import arrays
from stepctl.data.base import Source, Sources, Targets
from stepctl.data.batches import EvaluationBatches, Subset, TrainingBatches, split_source
from stepctl.data.memory import InMemory
from stepctl.data.table_source import TableSource
from stepctl.errors import ConfigError, DataError
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import create_run, resume_run
from stepctl.runs.segment import Segment
from stepctl.state.arena import Array, same_bits
from stepctl.training.build import prepare
from tests.support.messages import without_paths
from tests.support.runs import make_config, resume, silent, train

N = 23
X = np.random.default_rng(0).integers(0, 256, (N, 2, 3), np.uint8)
Y = np.arange(N, dtype=np.uint8)[::-1] % 5
Files = Callable[[Path, Array, Array], dict[str, Any]]


def write_npz(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    np.savez(folder / "data.npz", x=x, y=y)
    return {"name": "arrays", "path": str(folder / "data.npz")}


def write_npz_compressed(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    np.savez_compressed(
        folder / "data.npz", images=x.astype(np.float64), labels=y.astype(np.float32)
    )
    return {"name": "arrays", "path": str(folder / "data.npz"), "x": "images", "y": "labels"}


def write_csv(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    rows = [
        ",".join(map(str, [*row, label]))
        for row, label in zip(x.reshape(len(x), -1), y, strict=True)
    ]
    (folder / "data.csv").write_text("\n".join(rows))
    return {"name": "csv", "path": str(folder / "data.csv")}


def write_csv_header(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    header = [f'"{word}"' for word in ("digit", *(f"pixel; {i}" for i in range(x[0].size)))]
    rows = [
        "; ".join([f'"{label}"', *(f"{v:.3e}" for v in row)])
        for row, label in zip(x.reshape(len(x), -1), y, strict=True)
    ]
    text = "\r\n".join(["; ".join(header).replace('; "', ';"'), *rows, ""])
    (folder / "data.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    path = str(folder / "data.csv.gz")
    return {"name": "csv", "path": path, "header": True, "target": "digit", "delimiter": ";"}


def idx(array: Array) -> bytes:
    code = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}[
        array.dtype.str[1:]
    ]
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()
    )


def write_idx(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    (folder / "images").write_bytes(idx(x))
    (folder / "labels").write_bytes(idx(y.astype(">i2")))
    return {
        "name": "idx",
        "images": str(folder / "images"),
        "labels": str(folder / "labels"),
        "scale": 1,
    }


def write_idx_gzipped(folder: Path, x: Array, y: Array) -> dict[str, Any]:
    (folder / "images.gz").write_bytes(gzip.compress(idx(x.astype(">f4"))))
    (folder / "labels.gz").write_bytes(gzip.compress(idx(y)))
    return {
        "name": "idx",
        "images": str(folder / "images.gz"),
        "labels": str(folder / "labels.gz"),
        "scale": 1,
    }


def hdf5_writer(x_dtype: str, userblock: int = 0, **options: Any) -> Files:
    def write(folder: Path, x: Array, y: Array) -> dict[str, Any]:
        with h5py.File(folder / "data.h5", "w", userblock_size=userblock) as file:
            file.create_dataset("group/x", data=x.astype(x_dtype), **options)
            file.create_dataset("y", data=y, **options)
        return {"name": "hdf5", "path": str(folder / "data.h5"), "x": "group/x"}

    return write


KINDS: dict[str, Files] = {
    "npz": write_npz,
    "npz, compressed, other names and types": write_npz_compressed,
    "csv": write_csv,
    "csv, gzipped, with a header": write_csv_header,
    "idx": write_idx,
    "idx, gzipped": write_idx_gzipped,
    "hdf5, contiguous": hdf5_writer("<u1"),
    "hdf5, the run's own type": hdf5_writer("<f4"),
    "hdf5, big-endian behind a user block": hdf5_writer(">i4", userblock=1024),
    "hdf5, chunked and gzipped": hdf5_writer("<f8", chunks=True, compression="gzip"),
}


def build(spec: dict[str, Any], targets: str = "classes", dtype: str = "float32") -> Sources:
    full, problems = registry.check("data", spec)
    assert not problems
    sources: Sources = registry.build("data", full, targets=targets, dtype=dtype)
    return sources


def rows_of(source: Source, rows: Any, dtype: str = "float32") -> tuple[Array, Array]:
    """Read rows into fresh memory that is filled with what no row holds."""
    rows = np.asarray(rows, np.int64)
    x = np.full((len(rows), *source.sample_shape), -99, dtype)
    y = np.full((len(rows), *source.target_shape), -99, dtype if source.target_shape else np.int64)
    source.read(rows, x, y)
    return x, y


def numbers(n: int) -> Source:
    """A source whose row i holds i."""
    return InMemory(
        np.arange(n)[:, None], np.arange(n), origin="numbers", targets="classes", dtype="float64"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_the_file_are_read(kind: str, dtype: str, tmp_path: Path) -> None:
    source = build(KINDS[kind](tmp_path, X, Y), dtype=dtype).train
    assert source.n == N
    assert np.prod(source.sample_shape) == X[0].size
    assert source.target_shape == ()
    assert source.n_classes() == 5
    for rows in ([*range(N)], [22, 0, 7, 7, 3], [4]):
        x, y = rows_of(source, rows, dtype)
        np.testing.assert_array_equal(x.reshape(len(rows), -1), X.reshape(N, -1)[rows])
        np.testing.assert_array_equal(y, Y[rows])
    source.check(5)


@pytest.mark.parametrize("kind", KINDS)
def test_x_is_scaled_in_the_run_s_type(kind: str, tmp_path: Path) -> None:
    source = build({**KINDS[kind](tmp_path, X, Y), "scale": 0.25}, dtype="float32").train
    x, y = rows_of(source, range(N))
    np.testing.assert_array_equal(x.reshape(N, -1), X.reshape(N, -1) / 4)
    np.testing.assert_array_equal(y, Y)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_all_rows_in_order(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepctl.data.base._SLICE_BYTES", 24)
    source = build({**KINDS[kind](tmp_path, X, Y), "scale": 0.5}).train
    parts = list(source.slices())
    assert len(parts) > 1 or isinstance(source, InMemory | TableSource)
    assert [first for first, _, _ in parts] == [*np.cumsum([0, *(len(x) for _, x, _ in parts)])][
        :-1
    ]
    x, y = np.concatenate([x for _, x, _ in parts]), np.concatenate([y for _, _, y in parts])
    np.testing.assert_array_equal(x.reshape(N, -1), X.reshape(N, -1) / 2)
    np.testing.assert_array_equal(y, Y)
    assert (x.dtype.name, y.dtype.name) == ("float32", "int64")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_is_named_by_its_number(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepctl.data.base._SLICE_BYTES", 24)
    source = build(
        KINDS[kind](tmp_path, X, np.where(np.arange(N) == 17, 6, Y).astype(np.uint8))
    ).train
    place = "row 17"
    if kind.startswith("csv"):  # lines are numbered from 1, after the header
        place = "line 19" if "header" in kind else "line 18"
    with pytest.raises(DataError, match=rf": {place}: label 6 "):
        source.check(6)


@pytest.mark.parametrize("kind", ["npz", "hdf5, chunked and gzipped"])
@pytest.mark.parametrize("wrong", ["x", "label"])
def test_a_bad_value_is_named_by_its_row(
    kind: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: SnapshotAssertion,
) -> None:
    monkeypatch.setattr("stepctl.data.base._SLICE_BYTES", 24)
    x = X.astype(np.float64)
    y = Y.astype(np.float64)
    if wrong == "x":
        x[19, 1, 2] = np.nan
    else:
        y[19] = 0.5
    with pytest.raises(DataError, match=f": row 19: {wrong} ") as caught:
        build(KINDS[kind](tmp_path, x, y)).train.check(5)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


@pytest.mark.parametrize("kind", KINDS)
def test_targets_may_be_numbers(kind: str, tmp_path: Path) -> None:
    source = build(KINDS[kind](tmp_path, X, Y), "values", "float64").train
    assert source.target_shape == (1,)
    np.testing.assert_array_equal(rows_of(source, [3, 1], "float64")[1], Y[[3, 1], None])


@pytest.mark.parametrize("kind", ["npz", "hdf5, contiguous", "hdf5, chunked and gzipped"])
def test_targets_may_have_columns(kind: str, tmp_path: Path) -> None:
    y = np.random.default_rng(0).normal(size=(N, 3))
    source = build(KINDS[kind](tmp_path, X, y), "values", "float64").train
    assert source.target_shape == (3,)
    np.testing.assert_array_equal(rows_of(source, [3, 1, 3], "float64")[1], y[[3, 1, 3]])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_may_have_the_shape_of_a_column(kind: str, tmp_path: Path) -> None:
    if kind.startswith(("npz", "hdf5")):
        spec = KINDS[kind](tmp_path, X, Y[:, None])
        np.testing.assert_array_equal(rows_of(build(spec).train, range(N))[1], Y)
    else:
        assert build(KINDS[kind](tmp_path, X, Y)).train.target_shape == ()


def test_the_digits_equal_the_packaged_table() -> None:
    folder = Path(stepctl.__file__).parent / "data"
    table = np.loadtxt(
        gzip.decompress((folder / "digits.csv.gz").read_bytes()).decode().splitlines(),
        delimiter=",",
    )
    assert table.shape == (1797, 65)
    source = build({"name": "digits"}).train
    x, y = rows_of(source, [1796, 0, 5])
    np.testing.assert_array_equal(x, table[[1796, 0, 5], :-1] / 16)
    np.testing.assert_array_equal(y, table[[1796, 0, 5], -1])
    assert source.n_classes() == 10


@pytest.mark.parametrize("target", [0, 3, -1, -7])
def test_the_target_of_a_csv_may_be_any_column(target: int, tmp_path: Path) -> None:
    spec = write_csv(tmp_path, X, Y)
    table = np.column_stack([X.reshape(N, -1), Y])
    x, y = rows_of(build({**spec, "target": target}, "values").train, range(N))
    np.testing.assert_array_equal(y[:, 0], table[:, target])
    np.testing.assert_array_equal(x, np.delete(table, target, axis=1))


@pytest.mark.training
@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_sees_every_value(kind: str, tmp_path: Path) -> None:
    def fingerprint(x: Array, y: Array) -> str:
        return build(KINDS[kind](tmp_path, x, y)).train.fingerprint()

    known = fingerprint(X, Y)
    assert fingerprint(X, Y) == known
    for row in (0, 11, N - 1):
        x, y = X.copy(), Y.copy()
        x[row, 1, 1] ^= 1
        y[row] ^= 1
        assert len({known, fingerprint(x, Y), fingerprint(X, y)}) == 3
    assert fingerprint(X[:-1], Y[:-1]) != known
    assert fingerprint(X[::-1], Y) != known


# Training and validation rows


@pytest.mark.parametrize(
    ("n", "fraction", "size"), [(10, 0.1, 1), (23, 0.3, 7), (1797, 0.2, 359), (2, 0.5, 1)]
)
def test_a_split_is_disjoint_and_complete(n: int, fraction: float, size: int) -> None:
    training, validation = split_source(numbers(n), fraction, seed=3)
    assert (training.n, validation.n) == (n - size, size)
    rows = np.concatenate([part.rows(np.arange(part.n)) for part in (training, validation)])
    np.testing.assert_array_equal(np.sort(rows), np.arange(n))


def test_a_split_is_keyed_by_the_seed() -> None:
    def validation_rows(seed: int) -> list[int]:
        part = split_source(numbers(1000), 0.1, seed)[1]
        return [int(row) for row in part.rows(np.arange(part.n))]

    assert validation_rows(1) == validation_rows(1)
    common = [len({*validation_rows(1)} & {*validation_rows(seed)}) for seed in range(2, 12)]
    assert max(common) < 30, "two seeds share about 10 of 100"
    assert validation_rows(1) != sorted(validation_rows(1))


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_split_leaves_a_row_on_each_side(fraction: float, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(DataError) as caught:
        split_source(numbers(10), fraction, seed=1)
    assert str(caught.value) == snapshot


@pytest.mark.training
def test_the_split_is_the_same_at_a_resume(tmp_path: Path) -> None:
    def validation(segment: Segment) -> list[Array]:
        assert segment.assembly.validation is not None
        return [batch.x.copy() for batch in segment.assembly.validation]

    config = make_config(stop={"last_step": 2})
    with create_run(config, RunDirectory(tmp_path / "run")) as segment:
        segment.train()
        fresh = validation(segment)
    with resume_run(RunDirectory(tmp_path / "run"), ResumeOptions(), silent) as segment:
        np.testing.assert_array_equal(np.concatenate(validation(segment)), np.concatenate(fresh))
        assert segment.assembly.training.subset.n == 180


@pytest.mark.parametrize(
    ("kind", "key"), [("npz", "path"), ("csv", "path"), ("hdf5, contiguous", "path"), ("idx", "")]
)
def test_validation_rows_may_be_in_separate_files(kind: str, key: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    spec, other = KINDS[kind](tmp_path / "a", X, Y), KINDS[kind](tmp_path / "b", X[:9], Y[:9])
    spec |= {f"validation_{key}": other[key] for key in ([key] if key else ["images", "labels"])}
    sources = build(spec)
    assert sources.validation is not None
    assert (sources.train.n, sources.validation.n) == (N, 9)
    config = make_config(
        data={**spec, "batch_size": 8}, stop={"last_step": 3}, evaluate={"every": 3}
    )
    built = prepare(config)
    assert built.validation is not None
    assert (built.training.subset.n, built.validation.subset.n) == (N, 9)
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no such file"):
        prepare(config)


# Batches


def seen(batches: TrainingBatches, position: int) -> list[int]:
    """Return the rows of the batch at a position of a `numbers` source."""
    batch = batches.batch(position)
    assert batch.x[:, 0].tolist() == batch.y.tolist()
    assert batch.x.shape == (batches.samples, 1)
    return [int(row) for row in batch.y]


@pytest.mark.parametrize("batch_size", [3, 5, 12, 30])
def test_any_batch_is_a_slice_of_one_long_pass(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, n_batches = split_source(numbers(30), 0.2, seed=2)[0], 80
    options: dict[str, Any] = {"seed": 2, "batch_size": batch_size, "dtype": "float64"}
    sequential = TrainingBatches(part, **options)
    order = [row for i in range(n_batches) for row in seen(sequential, i * batch_size)]
    epochs = [order[start : start + part.n] for start in range(0, len(order) - part.n + 1, part.n)]
    rows = sorted(part.rows(np.arange(part.n)).tolist())
    assert all(sorted(epoch) == rows for epoch in epochs), "each sample exactly once an epoch"
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), (
        "each epoch in an order of its own"
    )
    monkeypatch.setattr("stepctl.data.batches._LOOKAHEAD", 2)
    jumping = TrainingBatches(part, **options)
    for position in np.random.default_rng(0).integers(0, len(order) - batch_size, 40).tolist():
        expected = order[position : position + batch_size]
        assert seen(jumping, position) == expected
        assert seen(TrainingBatches(part, **options), position) == expected


@pytest.mark.training
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(9, 60),
    st.integers(1, 20),
    st.integers(0, 10**12),
    st.lists(st.integers(0, 500), max_size=2),
)
def test_a_batch_does_not_depend_on_earlier_batches(
    n: int, batch_size: int, position: int, before: list[int]
) -> None:
    part = Subset(numbers(n), n)
    fresh, used = (
        TrainingBatches(part, seed=1, batch_size=batch_size, dtype="float64") for _ in range(2)
    )
    for offset in before:
        used.batch(max(0, position + offset - 250))
    assert seen(used, position) == seen(fresh, position)


def test_the_order_is_keyed_by_the_seed() -> None:
    part = Subset(numbers(50), 50)
    orders = [
        seen(TrainingBatches(part, seed=seed, batch_size=50, dtype="float64"), 0)
        for seed in range(6)
    ]
    assert len({tuple(order) for order in [*orders, list(range(50))]}) == 7


@pytest.mark.parametrize("batch_size", [1, 4, 9, 50])
def test_an_evaluation_is_every_row_once_in_fixed_order(batch_size: int) -> None:
    part = split_source(numbers(30), 0.3, seed=5)[1]
    batches = EvaluationBatches(part, batch_size=batch_size, dtype="float64")
    rows = [[batch.y.tolist() for batch in batches] for _ in range(2)]
    assert rows[0] == rows[1]
    assert [len(batch) for batch in rows[0]] == {1: [1] * 9, 4: [4, 4, 1], 9: [9], 50: [9]}[
        batch_size
    ]
    assert [row for batch in rows[0] for row in batch] == part.rows(np.arange(9)).tolist()
    assert [batch.x[:, 0].tolist() for batch in batches] == rows[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batches_have_the_run_s_types_and_their_own_memory(dtype: str, tmp_path: Path) -> None:
    source = build(write_npz(tmp_path, X, Y), dtype=dtype).train
    batches = TrainingBatches(Subset(source, N), seed=1, batch_size=8, dtype=dtype)
    first, second = batches.batch(0), batches.batch(8)
    assert (first.x.dtype.name, first.y.dtype.name, first.x.shape) == (dtype, "int64", (8, 2, 3))
    assert first.x is second.x
    assert first.x.ctypes.data % 64 == 0


# HDF5: only the batch's rows, only this file


LARGE = (20_000, 100)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write files of 8 MB and more; row i holds i."""
    paths = {}
    x = np.broadcast_to(np.arange(LARGE[0], dtype=np.float32)[:, None], LARGE)
    layouts: dict[str, dict[str, Any]] = {"contiguous": {}, "another type": {"dtype": "<f8"}}
    layouts["chunked"] = {"chunks": True, "compression": "gzip"}
    for layout, options in layouts.items():
        paths[layout] = str(tmp_path_factory.mktemp("large") / f"{layout}.h5")
        with h5py.File(paths[layout], "w") as file:
            file.create_dataset("x", data=x, **options)
            file.create_dataset("y", data=np.arange(LARGE[0]) % 7, **options)
    paths["not aligned"] = str(tmp_path_factory.mktemp("large") / "odd.h5")
    with h5py.File(paths["not aligned"], "w") as file:
        file["odd"], file["x"], file["y"] = np.zeros(4097, np.uint8), x, np.arange(LARGE[0]) % 7
        assert file["x"].id.get_offset() % 4
    return paths


@pytest.mark.training
@pytest.mark.parametrize("layout", ["contiguous", "another type", "chunked", "not aligned"])
def test_a_batch_takes_the_memory_of_its_rows(layout: str, large: dict[str, str]) -> None:
    source = build({"name": "hdf5", "path": large[layout]}).train
    batches = TrainingBatches(Subset(source, source.n), seed=1, batch_size=16, dtype="float32")
    batches.batch(0)
    tracemalloc.start()
    try:
        found = [batches.batch(position).y.copy() for position in range(16, 8000, 16 * 37)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(np.unique(np.concatenate(found))) == 7
    assert peak < 300_000, f"{peak} bytes for batches of 6,400"


@pytest.mark.training
def test_rows_are_returned_in_the_requested_order(large: dict[str, str]) -> None:
    x, y = rows_of(build({"name": "hdf5", "path": large["chunked"]}).train, [19_999, 5, 5, 700])
    assert x[:, 99].tolist() == [19_999, 5, 5, 700]
    assert y.tolist() == [19_999 % 7, 5, 5, 0]


def test_classes_are_counted_from_the_labels_alone(
    large: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build({"name": "hdf5", "path": large["chunked"]}).train
    names: set[str] = set()
    whole = h5py.Dataset.__getitem__

    def spy(dataset: h5py.Dataset, *arguments: Any, **options: Any) -> Any:
        names.add(dataset.name)
        return whole(dataset, *arguments, **options)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    assert source.n_classes() == 7
    assert names == {"/y"}


# IDX: a batch converts its rows, and no more of the file is held than the file


def idx_files(folder: Path, x: Array, y: Array, pack: Callable[[bytes], bytes]) -> dict[str, Any]:
    for name, array in (("images", x), ("labels", y)):
        (folder / name).write_bytes(pack(idx(array)))
    return {"name": "idx", "images": str(folder / "images"), "labels": str(folder / "labels")}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["mapped", "gzipped"])
@pytest.mark.parametrize(
    ("targets", "dtype"), [("classes", "float32"), ("values", "float32"), ("values", "float64")]
)
@pytest.mark.parametrize("kind", [">u1", ">i1", ">i2", ">i4", ">f4", ">f8"])
def test_idx_files_give_the_bits_of_the_same_arrays_in_memory(
    kind: str,
    targets: Targets,
    dtype: str,
    pack: Callable[[bytes], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stepctl.data.base._SLICE_BYTES", 100)
    x, y = (
        (X if kind == ">u1" else (X - 100.0) * (1 if "i" in kind else 1 / 3)).astype(kind),
        Y.astype(kind),
    )
    for scale in (1 / 255, 0.3, 1e38):
        options: dict[str, Any] = {"targets": targets, "dtype": dtype, "scale": scale}
        held = InMemory(x, y, origin="arrays", **options)
        found = build({**idx_files(tmp_path, x, y, pack), "scale": scale}, targets, dtype).train
        assert found.fingerprint() == held.fingerprint(), (
            "a run that began with one goes on with the other"
        )
        for rows in ([3, 22, 0, 3], [7], [], [*range(N)]):
            for ours, theirs in zip(
                rows_of(found, rows, dtype), rows_of(held, rows, dtype), strict=True
            ):
                assert same_bits(ours, theirs)
        parts, (_, *whole) = [*found.slices()], next(held.slices())
        assert len(parts) > 4
        for i, array in enumerate(whole, 1):
            assert same_bits(np.concatenate([part[i] for part in parts]), array)


PIXELS = (3000, 1000)


@pytest.fixture(scope="module", params=["mapped", "mapped, not aligned", "gzipped"])
def pixels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Write 3 MB of bytes, or 24 MB of doubles behind a header of 12 bytes; row i holds i % 200."""
    x = np.broadcast_to(np.arange(PIXELS[0])[:, None] % 200, PIXELS)
    pack = gzip.compress if request.param == "gzipped" else bytes
    kind = ">f8" if "not aligned" in request.param else ">u1"
    y = (np.arange(PIXELS[0]) % 7).astype(np.uint8)
    return idx_files(tmp_path_factory.mktemp("pixels"), x.astype(kind), y, pack)


@pytest.mark.training
def test_after_the_first_a_batch_of_idx_files_allocates_no_array_larger_than_its_labels(
    pixels: dict[str, Any],
) -> None:
    source = build({**pixels, "scale": 0.5}).train
    batches = TrainingBatches(Subset(source, source.n), seed=1, batch_size=1000, dtype="float32")
    batches.batch(0)
    bound = (
        1000 * 8 + np.getbufsize() * (8 + 8 + 4) + 16 * 1024
    )  # labels, what NumPy casts with, Python objects
    assert bound < 1000 * PIXELS[1], "a batch of bytes would break it"
    tracemalloc.start()
    try:
        for number in range(1, 8):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            x, y = batches.batch(number * 1000)
            assert tracemalloc.get_traced_memory()[1] - before < bound
            assert len({*y.tolist()}) == 7
            assert len({*x[:, 999].tolist()}) > 150
    finally:
        tracemalloc.stop()


@pytest.mark.training
def test_idx_files_are_held_in_their_own_type_or_not_at_all(pixels: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        source = build(pixels).train
        source.check(7)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    own = PIXELS[0] * (PIXELS[1] + 1)
    gzipped = Path(pixels["images"]).read_bytes().startswith(b"\x1f\x8b")
    assert held - own * gzipped < 100_000, f"{held} bytes for {own}"


def elsewhere(folder: Path) -> h5py.File:
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"], other["group/x"] = X, X
    X.tofile(folder / "raw.bin")
    file = h5py.File(folder / "data.h5", "w")
    file["y"] = Y
    return file


def external_link(file: h5py.File) -> None:
    file["x"] = h5py.ExternalLink("other.h5", "x")


def soft_link(file: h5py.File) -> None:
    file["here"], file["x"] = X, h5py.SoftLink("/here")


def dangling_link(file: h5py.File) -> None:
    file["x"] = h5py.SoftLink("/nowhere")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(X.shape, X.dtype)
    layout[:] = h5py.VirtualSource("other.h5", "x", X.shape)
    file.create_virtual_dataset("x", layout)


def external_storage(file: h5py.File) -> None:
    file.create_dataset("x", X.shape, X.dtype, external=[("raw.bin", 0, X.nbytes)])


def linked_group(file: h5py.File) -> None:
    file["group"] = h5py.ExternalLink("other.h5", "group")


# what makes a file that leads to another one, and the dataset to read
ELSEWHERE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "an external link": (external_link, "x"),
    "a soft link": (soft_link, "x"),
    "a soft link to nowhere": (dangling_link, "x"),
    "a virtual dataset": (virtual, "x"),
    "external storage": (external_storage, "x"),
    "a group that is an external link": (linked_group, "group/x"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_hdf5_reads_no_other_file(case: str, tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    make, x = ELSEWHERE[case]
    with elsewhere(tmp_path) as file:
        make(file)
    with pytest.raises(DataError) as caught:
        build({"name": "hdf5", "path": str(tmp_path / "data.h5"), "x": x})
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


PLACES = {
    "csv": ("path",),
    "arrays": ("path",),
    "hdf5": ("path",),
    "idx": ("images", "labels"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_pipe_or_device_is_refused_without_waiting(
    name: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(DataError) as caught:
            build({"name": name, **dict.fromkeys(PLACES[name], path)})
        assert str(caught.value).startswith(f"{path}: ")
        assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_shown_in_one_line(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "a\n\x1bb"
    folder.mkdir()
    spec = KINDS[kind](folder, X, np.full(N, -1, np.int16))
    with pytest.raises(DataError) as caught:
        build(spec).train.check(1)
    assert rf"{tmp_path}/a\n\x1bb/" in str(caught.value)
    assert "\n" not in str(caught.value)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no such file") as caught:
        build(spec)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("folder", "path"), [("here", "a\0b"), ("caf\udce9", "data.csv")])
def test_a_path_that_no_config_can_hold(
    folder: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    _, problems = registry.check("data", {"name": "csv", "path": path})
    assert [problem.path for problem in problems] == [("path",)]
    assert problems[0].message.endswith("is not valid UTF-8 text; rename the file")


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_pickle_in_an_archive_runs_nothing(name: str, tmp_path: Path) -> None:
    payload = np.array([Payload(tmp_path / "ran")] * N, object)
    arrays: dict[str, Any] = {"x": X, "y": Y, name: payload}
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        build({"name": "arrays", "path": str(tmp_path / "data.npz")})
    assert not (tmp_path / "ran").exists()
    with np.load(tmp_path / "data.npz", allow_pickle=True) as archive:
        assert archive[name].shape == (N,)
    assert (tmp_path / "ran").exists(), "the payload works, so that it would have been seen"


@pytest.mark.training
def test_changed_data_are_refused_at_a_resume(tmp_path: Path) -> None:
    spec = {**write_npz(tmp_path, X, Y), "batch_size": 8}
    train(make_config(data=spec, evaluate={}, stop={"last_step": 2}), tmp_path / "run")
    write_npz(tmp_path, X[::-1], Y)
    with pytest.raises(ConfigError, match="the data differ from the ones the run was trained on"):
        resume(tmp_path / "run", last_step=4)
    write_npz(tmp_path, X, Y)
    assert resume(tmp_path / "run", last_step=4).counters.global_step == 4


# --- archives, read in blocks


SAVED = {
    "stored": (np.savez, "<f4", "C"),
    "compressed": (np.savez_compressed, "<f4", "C"),
    "the other byte order": (np.savez, ">f8", "C"),
    "by columns": (np.savez, "<f4", "F"),
    "integers": (np.savez, "<i2", "C"),
}


@pytest.mark.parametrize("case", SAVED)
def test_an_archive_read_in_blocks_gives_all_rows(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, dtype, order = SAVED[case]
    monkeypatch.setattr("stepctl.data.arrays._BLOCK_BYTES", 100)  # not a multiple of a row
    generator = np.random.default_rng(0)
    x = np.asarray(generator.normal(size=(57, 3, 2)) * 100, dtype, order=order)
    y = generator.integers(0, 5, 57)
    save(tmp_path / "data.npz", x=x, y=y)
    found = arrays(path=str(tmp_path / "data.npz"), scale=0.5, targets="classes", dtype="float32")
    ((_, samples, labels),) = found.train.slices()
    assert np.array_equal(samples, x.astype("float32") * np.float32(0.5))
    assert np.array_equal(labels, y)


def test_an_archive_takes_the_memory_of_its_arrays(tmp_path: Path) -> None:
    x = np.ones((64, 1 << 18), np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x[:, :1])
    tracemalloc.start()
    try:
        arrays(path=str(tmp_path / "data.npz"), targets="values", dtype="float32")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes + 4 * (1 << 22)


def test_rows_of_later_blocks_are_named_by_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepctl.data.arrays._BLOCK_BYTES", 64)
    path = tmp_path / "data.npz"
    x = np.zeros((30, 2), np.int64)
    x[23] = 2**24 + 1
    np.savez(path, x=x, y=np.zeros(30))
    found = arrays(path=str(path), targets="values", dtype="float32").train
    (warning,) = found.warnings()
    assert "row 23: x is the integer 16777217" in warning
    labels = np.zeros(30)
    labels[21] = 0.5
    np.savez(path, x=x, y=labels)
    with pytest.raises(DataError, match=r"row 21: label 0\.5"):
        arrays(path=str(path), targets="classes", dtype="float32")


def test_a_changed_byte_of_a_stored_array_is_found(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((1000, 4), np.float32), y=np.zeros(1000))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        arrays(path=str(path), targets="values", dtype="float32")
