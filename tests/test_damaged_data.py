"""Data files that are damaged, cut short or far larger than they look: one line that says where, and no harm done."""

from __future__ import annotations

import gzip
import io
import json
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

from helpers import BASE
from jobs import environment
from stepctl import registry
from stepctl.data.base import Source, Sources
from stepctl.data.files import refuse_excess
from stepctl.errors import DataError, Exit, StepctlError

N, WIDTH = 600, 40
X = np.random.default_rng(0).integers(0, 256, (N, WIDTH), np.uint8)
Y = (np.arange(N) % 3).astype(np.uint8)


def build(spec: dict[str, Any]) -> Source:
    full, problems = registry.check("data", spec)
    assert not problems
    sources: Sources = registry.build("data", full, targets="classes", dtype="float32")
    return sources.train


def refusal(spec: dict[str, Any]) -> str:
    """Return the one line with which data are refused; little memory may be taken for it."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            build(spec)
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look closely at what unpacks to more than a megabyte: a gigabyte takes long to make."""
    monkeypatch.setattr("stepctl.data.files._ALWAYS_ALLOWED", 1 << 20)


ZEROS = np.zeros((100_000, WIDTH), np.uint8)


@pytest.mark.usefixtures("small_limit")
def test_a_gzip_bomb_is_refused_and_taken_unpacked(tmp_path: Path) -> None:
    spec = idx_spec(tmp_path, gzip.compress, ZEROS)
    said = refusal(spec)
    assert f"{(tmp_path / 'images').stat().st_size:,} bytes unpack to " in said
    assert said.endswith("if that is right, gunzip it, and give the unpacked file")
    (tmp_path / "labels").write_bytes(idx(np.zeros(len(ZEROS), np.uint8)))
    (tmp_path / "images").write_bytes(idx(ZEROS))
    assert build(spec).n == len(ZEROS)


@pytest.mark.usefixtures("small_limit")
def test_a_bomb_is_not_unpacked_beyond_the_limit(tmp_path: Path) -> None:
    """163 kB that would become 168 MB: one part again and again."""
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(bytes(1 << 24)) * 10)
    said = refusal({"name": "csv", "path": str(tmp_path / "bomb.csv.gz")})
    assert said.endswith("if that is right, gunzip it, and give the unpacked file")


def test_the_limit_is_what_no_measurement_reaches() -> None:
    refuse_excess(unpacked=1 << 30, packed=1, remedy="")  # a gigabyte is always allowed
    refuse_excess(unpacked=100 << 30, packed=1 << 30, remedy="")
    with pytest.raises(ValueError, match="4,000,000 bytes unpack to 4,300,000,000 or more, over 100 times as much"):
        refuse_excess(unpacked=4_300_000_000, packed=4_000_000, remedy="unpack it")


@pytest.mark.usefixtures("small_limit")
def test_an_npz_bomb_is_refused_and_taken_uncompressed(tmp_path: Path) -> None:
    spec, path = {"name": "arrays", "path": str(tmp_path / "a.npz")}, tmp_path / "a.npz"
    np.savez_compressed(path, x=ZEROS, y=np.zeros(len(ZEROS)))
    said = refusal(spec)
    assert said.startswith(f"{path}: cannot be read as a NumPy archive (.npz): ")
    assert said.endswith("if that is right, save the arrays with np.savez, which does not compress")
    np.savez(path, x=ZEROS, y=np.zeros(len(ZEROS)))
    assert build(spec).n == len(ZEROS)


@pytest.mark.usefixtures("small_limit")
def test_what_is_packed_as_tightly_but_small_is_taken(tmp_path: Path) -> None:
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


def test_an_npz_header_that_promises_more_than_there_is_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (1 << 40, 4)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    said = refusal(npz(tmp_path / "a.npz", header.getvalue() + bytes(100)))
    assert said.endswith(f"bytes for shape {shape}, but it has {len(header.getvalue()) + 100}")


def test_what_is_no_array_in_an_npz_is_refused(tmp_path: Path) -> None:
    assert "cannot be read as a NumPy archive (.npz): " in refusal(npz(tmp_path / "a.npz", b"some text"))


HUGE = (1 << 40, 4)
UNWRITTEN = {
    "contiguous": lambda file: file.create_dataset("x", HUGE, "f4"),
    "chunked": lambda file: file.create_dataset("x", HUGE, "f4", chunks=(1024, 4)),
    "small": lambda file: file.create_dataset("x", (N, 4), "f4"),
}


@pytest.mark.parametrize("layout", UNWRITTEN)
def test_an_hdf5_shape_of_which_nothing_was_written_is_refused(layout: str, tmp_path: Path) -> None:
    said = refusal(hdf5_spec(tmp_path, UNWRITTEN[layout]))
    assert said.endswith("but none of it was ever written; write its rows")


def sparse(file: h5py.File) -> None:
    file.create_dataset("x", HUGE, "f4", chunks=(1024, 4))[:1024] = 1
    file.create_dataset("y", HUGE[:1], "u1", chunks=(1024,))[:1024] = 1


def test_an_hdf5_shape_of_which_next_to_nothing_was_written_is_refused(tmp_path: Path) -> None:
    said = refusal(hdf5_spec(tmp_path, sparse))
    assert "'x' has shape (1099511627776, 4): 16,384 bytes unpack to 17,592,186,044,416 or more" in said
    assert said.endswith("if that is right, write all rows, uncompressed: h5repack -f NONE")


def one_large_chunk(file: h5py.File) -> None:
    x = file.create_dataset("x", (200, 1 << 20), "f4", chunks=(200, 1 << 20), compression="gzip")
    x.id.write_direct_chunk((0, 0), b"never unpacked" * 100_000)


def test_a_chunk_that_takes_minutes_is_refused(tmp_path: Path) -> None:
    said = refusal(hdf5_spec(tmp_path, one_large_chunk))
    assert "'x' is compressed in chunks of 838,860,800 bytes, and each is unpacked whole; rewrite it " in said


def test_rows_of_one_chunk_that_no_cache_of_hdf5_s_holds_are_read(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("use", "row"), [(check, 450), (a_batch, 499)])
@pytest.mark.parametrize("options", [CHUNKED, {"chunks": (50, WIDTH), "fletcher32": True}], ids=["gzip", "checksum"])
def test_a_damaged_chunk_is_named_with_its_row(
    options: dict[str, Any], use: Callable[[Source], None], row: int, tmp_path: Path
) -> None:
    spec = hdf5_spec(tmp_path, stored(**options))
    damage(spec["path"], 460)
    with pytest.raises(DataError) as caught:
        use(build(spec))
    said = str(caught.value)
    assert said.startswith(f"{spec['path']}: dataset 'x', row {row}: cannot be read: ")
    assert said.endswith("; its chunk is damaged: restore the file from where it came")


@pytest.mark.parametrize(("use", "row"), [(check, 0), (a_batch, 10)])
def test_a_missing_filter_is_named(use: Callable[[Source], None], row: int, tmp_path: Path) -> None:
    spec = hdf5_spec(tmp_path, unknown_filter)
    with pytest.raises(DataError) as caught:
        use(build(spec))
    start = f"{spec['path']}: dataset 'x', row {row}: cannot be read: it is compressed by filter 31999 "
    assert str(caught.value).startswith(start)
    assert "HDF5_PLUGIN_PATH" in str(caught.value)


def test_a_disk_that_fails_is_not_taken_for_damage(tmp_path: Path) -> None:
    spec = hdf5_spec(tmp_path, stored(**CHUNKED))
    source = build(spec)
    opened = h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE)
    (file,) = [file for file in opened if h5py.h5f.get_name(file) == spec["path"].encode()]
    unreadable = os.open(os.devnull, os.O_WRONLY)
    os.dup2(unreadable, file.get_vfd_handle())
    os.close(unreadable)
    with pytest.raises(
        StepctlError, match=r"row 10: cannot be read: .*; mend the disk, then run the command"
    ) as caught:
        a_batch(source)
    assert caught.value.exit_code == Exit.NEGATIVE


# --- files that change under a run

CUT = """
import os
from stepctl import library
from stepctl.hooks.base import Hook

class Cut(Hook):
    name = "cut"
    def after_step(self, state, metrics):
        if state.counters.global_step == 5:
            os.truncate({path!r}, os.path.getsize({path!r}) - {cut})

with library.create({config!r}, "run", hooks=[Cut()], say=print) as run:
    run.train()
"""
KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "idx": idx_spec,
    "hdf5, contiguous": lambda folder: hdf5_spec(folder, stored()),
    "hdf5, chunked": lambda folder: hdf5_spec(folder, stored(chunks=(50, WIDTH))),
}


@pytest.mark.parametrize("where", ["training", "evaluation"])
@pytest.mark.parametrize(("kind", "cut"), [("idx", 1), ("idx", 20_000), *((kind, 20_000) for kind in [*KINDS][1:])])
def test_a_file_that_is_cut_short_ends_training_in_one_line(kind: str, cut: int, where: str, tmp_path: Path) -> None:
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
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    left = Path(path).stat().st_size
    assert f"{path}: was cut short while it was in use: {left:,} bytes are left of {left + cut:,}; " in last
    if where == "training":
        assert "run: the state of global step 5 is saved" in done.stdout
        assert (tmp_path / "run" / "checkpoints" / "step-00000005.h5").exists()
