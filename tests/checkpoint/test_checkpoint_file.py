"""The checkpoint file: its bytes, its round trip, and the refusal of files that differ from the format."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5d, h5s, h5t
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint import codec, layout
from stepctl.errors import CheckpointError, ConfigError
from stepctl.state.arena import Arena, Array, aligned_empty
from stepctl.state.counters import Counters
from stepctl.state.train_state import SavedHook, TrainState
from tests.support.checkpoints import (
    NAME,
    STEP,
    encoded,
    file_bytes,
    full_state,
    refused,
    small_state,
    written,
)
from tests.support.runs import RUN_ID

LATEST = ("v110", "v110")
TIMES_STORED = 0x20  # HDF5 file format 3.0, IV.A.1.b: a flag of an object header


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# --- what a file is


def test_the_user_block_is_text_with_digest_and_length() -> None:
    data = encoded(full_state())
    body = data[512:]
    text = (
        f"stepctl-checkpoint 2\nsha256: {hashlib.sha256(body).hexdigest()}\nlength: {len(body)}\n"
    )
    assert data[:512] == text.encode() + bytes(512 - len(text))


def test_hdf5_begins_at_byte_512_with_superblock_3() -> None:
    data = encoded(full_state())
    assert data[512:520] == b"\x89HDF\r\n\x1a\n"
    assert data[520] == 3


def test_the_same_state_gives_the_same_bytes() -> None:
    first = encoded(full_state())
    garbage = [np.full(n, 0xA5, np.uint8) for n in range(1, 5000, 7)]
    del garbage
    assert encoded(full_state()) == first
    assert encoded(full_state(seed=1)) != first


def test_the_bytes_do_not_depend_on_the_memory_layout() -> None:
    state = full_state()
    strided: dict[str, dict[str, Array]] = {hook.name: {} for hook in state.hooks}
    for hook in state.hooks:
        for key, array in hook.state().items():
            strided[hook.name][key] = aligned_empty((*array.shape, 3), array.dtype)[..., 1]
            strided[hook.name][key][...] = array
    assert not strided["seen"]["bits"].flags.c_contiguous
    moved = replace(state, hooks=[SavedHook(name, arrays) for name, arrays in strided.items()])
    assert encoded(moved) == encoded(state)


@pytest.mark.process
def test_a_later_step_gives_the_bytes_that_a_fresh_process_gives() -> None:
    code = "import sys, tests.support.checkpoints as s; sys.stdout.buffer.write(s.encoded(s.full_state(step=1234)))"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    }
    fresh = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True
    ).stdout
    encoded(full_state())
    assert encoded(full_state(step=1234)) == fresh


@pytest.mark.process
def test_another_process_gives_the_same_bytes() -> None:
    code = "import sys, tests.support.checkpoints as s; sys.stdout.buffer.write(s.encoded(s.full_state()))"
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONHASHSEED": "12345",
    }
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True
    )
    assert child.stdout == encoded(full_state())


def object_header_flags(data: bytes) -> list[int]:
    return [part[1] for part in data.split(b"OHDR")[1:] if part[0] == 2]


def test_no_object_header_holds_a_time(tmp_path: Path) -> None:
    flags = object_header_flags(encoded(full_state()))
    assert len(flags) > 30
    assert not any(flag & TIMES_STORED for flag in flags)
    with h5py.File(tmp_path / "timed.h5", "w", libver=LATEST) as file:
        file.create_dataset("x", data=1, track_times=True)
    assert any(
        flag & TIMES_STORED for flag in object_header_flags((tmp_path / "timed.h5").read_bytes())
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_round_trip_keeps_every_bit(dtype: str, tmp_path: Path) -> None:
    state, other = full_state(dtype), full_state(dtype, seed=1)
    assert not other.same_bits(state)
    with codec.Reader(written(tmp_path, state)) as reader:
        codec.restore(reader, other)
    assert other.same_bits(state)
    assert list(other.counters.items()) == list(state.counters.items())


def test_the_header_has_the_written_values(tmp_path: Path) -> None:
    path = written(tmp_path, full_state())
    with codec.Reader(path) as reader:
        header = reader.header
    assert header.global_step == STEP
    assert header.counters == dict(full_state().counters)
    assert (header.run, header.config, header.numerics) == (
        "moon",
        "seed: 0  # é\n",
        '{"threads": 1}',
    )
    assert header.created_by.startswith("stepctl ")
    assert header.sha256 == hashlib.sha256(path.read_bytes()[512:]).hexdigest()


def test_plain_h5py_reads_it(tmp_path: Path) -> None:
    state = full_state()
    with h5py.File(written(tmp_path, state)) as file:
        assert set(file.attrs) == {
            "format",
            "format_version",
            "global_step",
            "created_by",
            "run",
            "run_id",
        }
        assert file.attrs["format"] == b"stepctl-checkpoint"
        assert (file.attrs["format_version"], file.attrs["global_step"]) == (2, STEP)
        assert file.attrs["run_id"] == RUN_ID.encode()
        for name, value in state.counters.items():
            assert file[f"counters/{name}"][()] == value
        for path, array in state.arrays().items():
            assert file[path][()].tobytes() == array.tobytes(), path
        assert file["config"][()] == "seed: 0  # é\n".encode()
        assert list(file["params"]) == [
            "odd",
            "dense0",
            "scalar",
            "empty",
            "hollow",
        ]  # in the order of the model


def test_only_what_the_format_lists_is_in_it(tmp_path: Path) -> None:
    allowed = [h5t.IEEE_F32LE, h5t.IEEE_F64LE, h5t.STD_I64LE, h5t.STD_U8LE]
    texts: dict[str, int] = {}
    numbers, groups = [], []

    def visit(path: str, found: h5py.Group | h5py.Dataset) -> None:
        assert len(found.attrs) == 0, path
        assert found.parent.get(found.name, getlink=True).__class__ is h5py.HardLink
        if isinstance(found, h5py.Group):
            groups.append(path)
            return
        creation, kind = found.id.get_create_plist(), found.id.get_type()
        assert creation.get_layout() == h5d.CONTIGUOUS, path
        assert creation.get_nfilters() == creation.get_external_count() == 0, path
        assert found.id.get_space().get_simple_extent_type() in (h5s.SCALAR, h5s.SIMPLE), path
        if isinstance(kind, h5t.TypeStringID):
            assert not kind.is_variable_str()
            texts[path] = kind.get_cset()
        else:
            assert any(kind.equal(one) for one in allowed), path
            numbers.append(path)

    state = full_state()
    with h5py.File(written(tmp_path, state)) as file:
        file.visititems(visit)
    assert texts == {"config": h5t.CSET_UTF8, "numerics": h5t.CSET_ASCII}  # "é" is in the config
    assert sorted(numbers) == sorted(
        [*state.arrays(), *(f"counters/{name}" for name in state.counters)]
    )
    assert {"counters", "params", "optimizers", "buffers", "hooks"} <= set(groups)


@pytest.mark.parametrize(
    ("config", "encoding"), [("seed: 0\n", "ascii"), ("seed: 0  # é\n", "utf-8")]
)
def test_ascii_texts_have_the_type_of_ascii_strings(
    config: str, encoding: str, tmp_path: Path
) -> None:
    image = codec.encode(small_state(), run="moon", run_id=RUN_ID, config=config, numerics="{}")
    (tmp_path / NAME).write_bytes(file_bytes(image))
    with h5py.File(tmp_path / NAME) as file:
        assert h5py.check_string_dtype(file["config"].dtype).encoding == encoding
        assert h5py.check_string_dtype(file["numerics"].dtype).encoding == "ascii"
    with codec.Reader(tmp_path / NAME) as reader:
        assert (reader.header.config, reader.header.numerics) == (config, "{}")


def test_a_file_whose_ascii_texts_are_typed_as_utf_8_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions wrote such files."""
    monkeypatch.setattr(
        layout, "_encoding", lambda array: "utf-8" if array.dtype.kind == "S" else ""
    )
    path = written(tmp_path, small_state())
    with h5py.File(path) as file:
        assert h5py.check_string_dtype(file["numerics"].dtype).encoding == "utf-8"
    with codec.Reader(path) as reader:
        assert reader.header.numerics == '{"threads": 1}'


def test_values_of_the_other_byte_order_are_written_little_endian(tmp_path: Path) -> None:
    state, other = small_state(), small_state()
    state = replace(state, hooks=[SavedHook("big", {"endian": np.array([1.5, -2.5], ">f8")})])
    other = replace(other, hooks=[SavedHook("big", {"endian": np.zeros(2, ">f8")})])
    with codec.Reader(written(tmp_path, state)) as reader:
        assert reader.datasets["hooks/big/endian"].dtype.str == "<f8"
        codec.restore(reader, other)
    assert other.arrays()["hooks/big/endian"].tolist() == [1.5, -2.5]


# --- damage


@pytest.mark.training
def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    data = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(data):
            for mask in (0xFF, 0x01, 0x20) if position < 512 else (0xFF,):
                os.pwrite(file.fileno(), bytes([byte ^ mask]), position)
                code = refused(path).code
                accepted = (
                    {"foreign", "version", "newer", "length", "digest"}
                    if position < 512
                    else {"digest"}
                )
                assert code in accepted, position
            os.pwrite(file.fileno(), bytes([byte]), position)
    codec.Reader(path).close()  # and whole again, it is good


@pytest.mark.training
def test_a_file_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        assert refused(path).code == ("length" if length >= 512 else "foreign"), length


@pytest.mark.parametrize("more", [1, 512, 100_000])
def test_a_longer_file_is_refused(more: int, tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    os.truncate(path, path.stat().st_size + more)
    assert refused(path).code == "length"


def test_the_message_about_damage_names_the_difference(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert str(refused(path)) == f"{NAME}: damaged (sha256 mismatch)"
    path.write_bytes(data[:-10])
    assert str(refused(path)) == f"{NAME}: damaged ({len(data) - 10} bytes instead of {len(data)})"


def test_another_format_version_is_refused(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    path = tmp_path / NAME
    path.write_bytes(
        encoded(small_state()).replace(b"stepctl-checkpoint 2\n", b"stepctl-checkpoint 0\n", 1)
    )
    error = refused(path)
    assert error.code == "version"
    assert str(error) == snapshot


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    codec.Reader(path).close()
    before = len(os.listdir("/proc/self/fd"))
    codec.Reader(path).close()
    os.truncate(path, path.stat().st_size - 1)
    refused(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_copy_under_a_free_name_is_good(tmp_path: Path) -> None:
    with codec.Reader(written(tmp_path, small_state(), "best.h5")) as reader:
        assert reader.header.global_step == STEP


# --- what does not fit


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, bool),
        np.zeros(2, np.int32),
        np.zeros(2, np.float16),
        np.zeros(2, complex),
        np.array(["text"]),
        np.array([None]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_an_array_of_another_dtype_is_refused_before_it_is_saved(
    array: Array, snapshot: SnapshotAssertion
) -> None:
    state = small_state()
    codec.check_storable(state)
    state = replace(state, hooks=[SavedHook("best", {"loss": array})])
    with pytest.raises(ConfigError) as caught:
        codec.check_storable(state)
    assert str(caught.value).startswith("/hooks/best/loss: ")
    assert str(caught.value) == snapshot


def test_all_that_does_not_fit_is_reported_together(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    def state(
        shapes: dict[str, tuple[int, ...]], hook: Array, counters: dict[str, int]
    ) -> TrainState:
        params = Arena(shapes, "float32")
        params.flat.fill(3)
        numbers = {"global_step": STEP, "samples_seen": 1} | counters
        return TrainState(
            Counters(numbers), {"params": params}, hooks=[SavedHook("best", {"loss": hook})]
        )

    found = state({"same": (2,), "wide": (3,), "old": (1, 2)}, np.zeros(1, np.int64), {"critic": 1})
    expected = state({"same": (2,), "wide": (4,), "new": ()}, np.zeros(1), {"model": 1})
    before = {name: view.tobytes() for name, view in expected.arrays().items()}
    with codec.Reader(written(tmp_path, found)) as reader, pytest.raises(CheckpointError) as caught:
        codec.restore(reader, expected)
    assert caught.value.code == "mismatch"
    assert str(caught.value).splitlines() == snapshot
    assert {name: view.tobytes() for name, view in expected.arrays().items()} == before
    assert dict(expected.counters) == {"global_step": STEP, "samples_seen": 1, "model": 1}


ODD_NAMES = [
    *(
        ("best", key)
        for key in (
            "",
            ".",
            "é",
            "a b",
            "x\0y",
            "/loss",
            "loss/",
            "a//b",
            "a/" * 40 + "b",
            "same/loss",
        )
    ),
    *((name, "loss") for name in ("", "é", "best/same")),
]


@pytest.mark.parametrize(("hook", "key"), ODD_NAMES, ids=repr)
def test_a_name_that_a_checkpoint_cannot_hold_is_refused_before_it_is_saved(
    hook: str, key: str
) -> None:
    remembered: dict[str, dict[str, Array]] = {"best": {"same": np.zeros(1)}}
    codec.check_storable(with_hooks(remembered))
    remembered.setdefault(hook, {})[key] = np.zeros(1)
    with pytest.raises(ConfigError, match="name"):
        codec.check_storable(with_hooks(remembered))


def with_hooks(remembered: dict[str, dict[str, Array]]) -> TrainState:
    return replace(
        small_state(), hooks=[SavedHook(name, arrays) for name, arrays in remembered.items()]
    )


def test_the_name_of_a_counter_is_checked_too() -> None:
    state = small_state()
    state = replace(state, counters=Counters(dict(state.counters) | {"generatör": 0}))
    with pytest.raises(ConfigError, match="name"):
        codec.check_storable(state)
