"""Damaged, truncated and decompression-bomb data files give one line, and use no memory."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.config import registry
from stepctl.data.base import Source, Sources
from stepctl.data.files import refuse_excess
from stepctl.errors import DataError, Exit, StepctlError
from tests.support.messages import without_paths
from tests.support.mpi_jobs import environment
from tests.support.runs import BASE

N, WIDTH = 600, 40
X = np.random.default_rng(0).integers(0, 256, (N, WIDTH), np.uint8)
Y = (np.arange(N) % 3).astype(np.uint8)


def build(spec: dict[str, Any]) -> Source:
    full, problems = registry.check("data", spec)
    assert not problems
    sources: Sources = registry.build("data", full, targets="classes", dtype="float32")
    return sources.train


def refusal(spec: dict[str, Any]) -> str:
    """Return the message with which data are refused; it is one line, and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            build(spec)
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
    path = spec.get("images", spec.get("path"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def idx(array: Any) -> bytes:
    return bytes([0, 0, 8, array.ndim, *np.array(array.shape, ">u4").tobytes()]) + array.tobytes()


def idx_spec(folder: Path, pack: Callable[[bytes], bytes] = bytes, x: Any = X) -> dict[str, Any]:
    (folder / "images").write_bytes(pack(idx(x)))
    (folder / "labels").write_bytes(idx(Y))
    return {"name": "idx", "images": str(folder / "images"), "labels": str(folder / "labels")}


def hdf5_spec(folder: Path, make: Callable[[h5py.File], None]) -> dict[str, Any]:
    with h5py.File(folder / "data.h5", "w") as file:
        make(file)
        if "y" not in file:
            file["y"] = Y
    return {"name": "hdf5", "path": str(folder / "data.h5")}


def stored(**options: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.create_dataset("x", data=X, **options)


CHUNKED = {"chunks": (50, WIDTH), "compression": "gzip"}


# --- more than there can be

# sizes that depend on the version of zlib or NumPy
UNPACKED_SIZES = (r"[\d,]+(?= bytes unpack to)", r"(?<=bytes unpack to )[\d,]+")


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look closely at what unpacks to more than a megabyte: a gigabyte takes long to make."""
    monkeypatch.setattr("stepctl.data.files._ALWAYS_ALLOWED", 1 << 20)


ZEROS = np.zeros((100_000, WIDTH), np.uint8)


@pytest.mark.usefixtures("small_limit")
def test_a_gzip_bomb_is_refused_and_accepted_uncompressed(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    spec = idx_spec(tmp_path, gzip.compress, ZEROS)
    message = refusal(spec)
    assert f"{(tmp_path / 'images').stat().st_size:,} bytes unpack to " in message
    assert without_paths(message, UNPACKED_SIZES) == snapshot
    (tmp_path / "labels").write_bytes(idx(np.zeros(len(ZEROS), np.uint8)))
    (tmp_path / "images").write_bytes(idx(ZEROS))
    assert build(spec).n == len(ZEROS)


@pytest.mark.training
@pytest.mark.usefixtures("small_limit")
def test_a_bomb_is_not_unpacked_beyond_the_limit(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    """163 kB that would become 168 MB: one part again and again."""
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"0" * (1 << 24)) * 10)
    message = refusal({"name": "csv", "path": str(tmp_path / "bomb.csv.gz")})
    assert without_paths(message, UNPACKED_SIZES) == snapshot


def test_the_limit_is_above_the_compression_ratio_of_real_data(
    snapshot: SnapshotAssertion,
) -> None:
    refuse_excess(unpacked=1 << 30, packed=1, remedy="")  # a gigabyte is always allowed
    refuse_excess(unpacked=100 << 30, packed=1 << 30, remedy="")
    with pytest.raises(ValueError, match="over 100 times as much") as caught:
        refuse_excess(unpacked=4_300_000_000, packed=4_000_000, remedy="unpack it")
    assert str(caught.value) == snapshot


@pytest.mark.usefixtures("small_limit")
def test_an_npz_bomb_is_refused_and_accepted_uncompressed(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "a.npz"
    spec = {"name": "arrays", "path": str(path)}
    np.savez_compressed(path, x=ZEROS, y=np.zeros(len(ZEROS)))
    assert without_paths(refusal(spec), UNPACKED_SIZES) == snapshot
    np.savez(path, x=ZEROS, y=np.zeros(len(ZEROS)))
    assert build(spec).n == len(ZEROS)


@pytest.mark.usefixtures("small_limit")
def test_a_small_file_with_a_high_compression_ratio_is_accepted(tmp_path: Path) -> None:
    zeros = np.zeros((N, WIDTH), np.uint8)
    assert build(idx_spec(tmp_path, gzip.compress, zeros)).n == N
    np.savez_compressed(tmp_path / "a.npz", x=zeros, y=Y)
    assert build({"name": "arrays", "path": str(tmp_path / "a.npz")}).n == N


def npz(path: Path, x: bytes) -> dict[str, Any]:
    y = io.BytesIO()
    np.save(y, Y)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", y.getvalue())
    return {"name": "arrays", "path": str(path)}


def test_an_npz_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (1 << 40, 4)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": shape}
    )
    message = refusal(npz(tmp_path / "a.npz", header.getvalue() + bytes(100)))
    n_bytes = len(header.getvalue())
    needed = n_bytes + 8 * math.prod(shape)
    assert message.endswith(f"of shape {shape} needs {needed} bytes, but has {n_bytes + 100}")


def test_an_npz_member_that_is_not_an_array_is_refused(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    numpy_words = r"(?<=\(\.npz\): ).*"
    message = refusal(npz(tmp_path / "a.npz", b"some text"))
    assert without_paths(message, (numpy_words,)) == snapshot


HUGE = (1 << 40, 4)
UNWRITTEN = {
    "contiguous": lambda file: file.create_dataset("x", HUGE, "f4"),
    "chunked": lambda file: file.create_dataset("x", HUGE, "f4", chunks=(1024, 4)),
    "small": lambda file: file.create_dataset("x", (N, 4), "f4"),
}


def nearly_unwritten(file: h5py.File) -> None:
    file.create_dataset("x", HUGE, "f4", chunks=(1024, 4))[:1024] = 1
    file.create_dataset("y", HUGE[:1], "u1", chunks=(1024,))[:1024] = 1


def one_large_chunk(file: h5py.File) -> None:
    x = file.create_dataset("x", (200, 1 << 20), "f4", chunks=(200, 1 << 20), compression="gzip")
    x.id.write_direct_chunk((0, 0), b"never unpacked" * 100_000)


UNREADABLE_DATASETS: dict[str, Callable[[h5py.File], Any]] = {
    **{f"nothing written, {layout}": make for layout, make in UNWRITTEN.items()},
    "next to nothing written": nearly_unwritten,
    "one chunk that takes minutes to unpack": one_large_chunk,
}


@pytest.mark.parametrize("case", UNREADABLE_DATASETS)
def test_an_hdf5_dataset_that_cannot_be_read_is_refused(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    assert refusal(hdf5_spec(tmp_path, UNREADABLE_DATASETS[case])) == snapshot


@pytest.mark.training
def test_rows_of_a_chunk_larger_than_the_hdf5_cache_are_read(tmp_path: Path) -> None:
    x = np.arange(3000 * 500, dtype="f4").reshape(3000, 500)
    options: dict[str, Any] = {"chunks": x.shape, "compression": "gzip", "compression_opts": 1}

    def make(file: h5py.File) -> None:
        file.create_dataset("x", data=x, **options)
        file["y"] = np.arange(3000) % 7

    source = build(hdf5_spec(tmp_path, make))
    rows = np.array([2999, 0, 1234])
    found, labels = np.empty((3, 500), "f4"), np.empty(3, np.int64)
    source.read(rows, found, labels)
    np.testing.assert_array_equal(found, x[rows])
    np.testing.assert_array_equal(labels, rows % 7)


# --- what HDF5 cannot read


def damage(path: str, row: int) -> None:
    """Overwrite the chunk that holds a row of x."""
    with h5py.File(path, "r") as file:
        dataset = file["x"]
        chunk = dataset.id.get_chunk_info_by_coord((row, 0))
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(i % 251 for i in range(chunk.size)))


def unknown_filter(file: h5py.File) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((50, WIDTH))
    properties.set_filter(31999, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple(X.shape)
    dataset = h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, space, properties)
    for first in range(0, N, 50):
        dataset.write_direct_chunk((first, 0), bytes(50 * WIDTH))


def check(source: Source) -> None:
    source.check(3)


def a_batch(source: Source) -> None:
    source.read(np.array([10, 560, 499]), np.empty((3, WIDTH), "f4"), np.empty(3, np.int64))


HDF5_WORDS = r"(?<=cannot be read: )[^;]*"


@pytest.mark.parametrize(("use", "row"), [(check, 450), (a_batch, 499)])
@pytest.mark.parametrize(
    "options", [CHUNKED, {"chunks": (50, WIDTH), "fletcher32": True}], ids=["gzip", "checksum"]
)
def test_a_damaged_chunk_is_named_with_its_row(
    options: dict[str, Any],
    use: Callable[[Source], None],
    row: int,
    tmp_path: Path,
    snapshot: SnapshotAssertion,
) -> None:
    spec = hdf5_spec(tmp_path, stored(**options))
    damage(spec["path"], 460)
    with pytest.raises(DataError) as caught:
        use(build(spec))
    message = str(caught.value)
    assert message.startswith(f"{spec['path']}: dataset 'x', row {row}: ")
    assert without_paths(message, (HDF5_WORDS,), HERE=tmp_path) == snapshot


@pytest.mark.parametrize(("use", "row"), [(check, 0), (a_batch, 10)])
def test_a_missing_filter_is_named(
    use: Callable[[Source], None], row: int, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    spec = hdf5_spec(tmp_path, unknown_filter)
    with pytest.raises(DataError) as caught:
        use(build(spec))
    assert str(caught.value).startswith(f"{spec['path']}: dataset 'x', row {row}: ")
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


def test_a_failing_disk_is_not_reported_as_damage(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    spec = hdf5_spec(tmp_path, stored(**CHUNKED))
    source = build(spec)
    opened = h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)
    (file,) = [file for file in opened if h5py.h5f.get_name(file) == spec["path"].encode()]
    unreadable = os.open(os.devnull, os.O_WRONLY)
    os.dup2(unreadable, file.get_vfd_handle())
    os.close(unreadable)
    with pytest.raises(StepctlError) as caught:
        a_batch(source)
    assert caught.value.exit_code == Exit.NEGATIVE
    assert without_paths(str(caught.value), (HDF5_WORDS,), HERE=tmp_path) == snapshot


# --- files that change under a run

CUT = """
import os
from stepctl import api
from stepctl.hooks.base import Hook

class Cut(Hook):
    name = "cut"
    def after_step(self, state, metrics):
        if state.counters.global_step == 5:
            os.truncate({path!r}, os.path.getsize({path!r}) - {cut})

with api.create({config!r}, "run", hooks=[Cut()], say=print) as run:
    run.train()
"""
KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "idx": idx_spec,
    "hdf5, contiguous": lambda folder: hdf5_spec(folder, stored()),
    "hdf5, chunked": lambda folder: hdf5_spec(folder, stored(chunks=(50, WIDTH))),
}


@pytest.mark.process
@pytest.mark.parametrize("where", ["training", "evaluation"])
@pytest.mark.parametrize(
    ("kind", "cut"), [("idx", 1), ("idx", 20_000), *((kind, 20_000) for kind in [*KINDS][1:])]
)
def test_a_file_that_is_cut_short_ends_training_in_one_line(
    kind: str, cut: int, where: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    spec = KINDS[kind](tmp_path)
    path = spec.get("images", spec.get("path"))
    config = BASE | {"data": spec | {"batch_size": 60}, "evaluate": {"every": None}}
    if where == "evaluation":
        (tmp_path / "other").mkdir()
        other = KINDS[kind](tmp_path / "other")
        names = ("images", "labels") if kind == "idx" else ("path",)
        path = other[names[0]]
        config["data"] |= {f"validation_{name}": other[name] for name in names}
        config["evaluate"] = {"every": 10}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    code = CUT.format(path=path, cut=cut, config=str(tmp_path / "c.yaml"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    last = done.stderr.splitlines()[-1]
    left = Path(path).stat().st_size
    sizes = f"from {left + cut:,} to {left:,} bytes"
    assert sizes in last
    assert last.replace(sizes, "SIZES").replace(str(path), "PATH") == snapshot
    if where == "training":
        assert "run: the state of global step 5 is saved" in done.stdout
        assert (tmp_path / "run" / "checkpoints" / "step-00000005.h5").exists()
