"""Section 8: what a checkpoint file is, and what is refused."""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t

from helpers import file_bytes
from stepctl.arena import Arena, Array, aligned_empty
from stepctl.checkpoint import codec, userblock, walk
from stepctl.errors import CheckpointError, ConfigError
from stepctl.state import Counters, TrainState

STEP = 7
NAME = "step-00000007.h5"
LATEST = ("v110", "v110")
TIMES_STORED = 0x20  # HDF5 file format 3.0, IV.A.1.b: a flag of an object header


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def small_state() -> TrainState:
    """The smallest state that an update can move."""
    params = Arena({"weight": (2,)}, "float32")
    params["weight"][:] = 1, -2
    counters = Counters({"global_step": STEP, "samples_seen": 3 * STEP, "model": STEP})
    return TrainState(counters, params, {"model": {}}, Arena({}, "float32"))


def odd_values(dtype: str) -> Array:
    whole = "uint32" if dtype == "float32" else "uint64"
    payload = np.array([0x7FC12345 if dtype == "float32" else 0x7FF8_0000_DEAD_BEEF], whole).view(dtype)[0]
    tiny = np.finfo(dtype).smallest_subnormal
    return np.array([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, -np.nan, payload, tiny, -tiny], dtype)


def full_state(dtype: str = "float32", seed: int = 0) -> TrainState:
    """A state with all that the format can hold; `seed` 0 fills in values, any other different ones."""
    shapes = {"odd": (10,), "dense0/weight": (3, 5), "dense0/bias": (5,), "scalar": (), "empty": (0,), "hollow": (3, 0)}
    generator = np.random.default_rng(seed)
    params, mean = Arena(shapes, dtype), Arena({"norm/mean": (4,), "norm/count": ()}, dtype)
    slots = {name: {"first": params.like(), "second": params.like()} for name in ("critic", "generator")}
    for arena in (params, mean, *(arena for group in slots.values() for arena in group.values())):
        for view in arena.values():
            view[...] = generator.normal(size=view.shape)
    params["odd"][:] = odd_values(dtype) if seed == 0 else 0
    hooks = {
        "best": {"loss": np.array(generator.normal()), "step": np.array(2**62 + seed)},
        "seen": {"bits": generator.integers(0, 256, (2, 3), np.uint8), "sum": generator.normal(size=3)},
    }
    numbers = {"global_step": STEP, "samples_seen": 2**63 - 1 - seed, "critic": 5 * STEP, "generator": STEP}
    return TrainState(Counters(numbers), params, slots, mean, hooks)


def encoded(state: TrainState) -> bytes:
    return file_bytes(codec.encode(state, run="moon", config="seed: 0  # é\n", numerics='{"threads": 1}'))


def written(folder: Path, state: TrainState, name: str = NAME) -> Path:
    path = folder / name
    path.write_bytes(encoded(state))
    return path


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught, codec.Reader(path):
        pass
    assert path.name in str(caught.value)
    return caught.value


# --- what a file is


def test_the_user_block_is_text_with_digest_and_length() -> None:
    data = encoded(full_state())
    body = data[512:]
    text = f"stepctl-checkpoint 1\nsha256: {hashlib.sha256(body).hexdigest()}\nlength: {len(body)}\n"
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


def test_where_arrays_lie_in_memory_does_not_show() -> None:
    state, moved = full_state(), full_state()
    for values in moved.hooks.values():
        for key, array in values.items():
            values[key] = aligned_empty((*array.shape, 3), array.dtype)[..., 1]
            values[key][...] = array
    assert not moved.hooks["seen"]["bits"].flags.c_contiguous
    assert encoded(moved) == encoded(state)


def test_another_process_gives_the_same_bytes() -> None:
    code = "import sys, test_checkpoint_file as t; sys.stdout.buffer.write(t.encoded(t.full_state()))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "12345"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    assert child.stdout == encoded(full_state())


def object_header_flags(data: bytes) -> list[int]:
    return [part[1] for part in data.split(b"OHDR")[1:] if part[0] == 2]


def test_no_object_header_holds_a_time(tmp_path: Path) -> None:
    flags = object_header_flags(encoded(full_state()))
    assert len(flags) > 30
    assert not any(flag & TIMES_STORED for flag in flags)
    with h5py.File(tmp_path / "timed.h5", "w", libver=LATEST) as file:
        file.create_dataset("x", data=1, track_times=True)
    assert any(flag & TIMES_STORED for flag in object_header_flags((tmp_path / "timed.h5").read_bytes()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_round_trip_keeps_every_bit(dtype: str, tmp_path: Path) -> None:
    state, other = full_state(dtype), full_state(dtype, seed=1)
    views = other.arrays()
    assert not other.same_bits(state)
    with codec.Reader(written(tmp_path, state)) as reader:
        codec.restore(reader, other)
    assert other.same_bits(state)
    assert list(other.counters.items()) == list(state.counters.items())
    for path, array in state.arrays().items():  # filled in place
        assert views[path].tobytes() == array.tobytes(), path


def test_the_header_says_what_was_written(tmp_path: Path) -> None:
    path = written(tmp_path, full_state())
    with codec.Reader(path) as reader:
        header = reader.header
    assert header.global_step == STEP
    assert header.counters == dict(full_state().counters)
    assert (header.run, header.config, header.numerics) == ("moon", "seed: 0  # é\n", '{"threads": 1}')
    assert header.created_by.startswith("stepctl ")
    assert header.sha256 == hashlib.sha256(path.read_bytes()[512:]).hexdigest()


def test_plain_h5py_reads_it(tmp_path: Path) -> None:
    state = full_state()
    with h5py.File(written(tmp_path, state)) as file:
        assert set(file.attrs) == {"format", "format_version", "global_step", "created_by", "run"}
        assert file.attrs["format"] == b"stepctl-checkpoint"
        assert (file.attrs["format_version"], file.attrs["global_step"]) == (1, STEP)
        for name, value in state.counters.items():
            assert file[f"counters/{name}"][()] == value
        for path, array in state.arrays().items():
            assert file[path][()].tobytes() == array.tobytes(), path
        assert file["config"][()] == "seed: 0  # é\n".encode()
        assert list(file["params"]) == ["odd", "dense0", "scalar", "empty", "hollow"]  # in the order of the model


def test_only_what_the_format_lists_is_in_it(tmp_path: Path) -> None:
    allowed = [h5t.IEEE_F32LE, h5t.IEEE_F64LE, h5t.STD_I64LE, h5t.STD_U8LE]
    texts, numbers, groups = [], [], []

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
            assert kind.get_cset() == h5t.CSET_UTF8
            texts.append(path)
        else:
            assert any(kind.equal(one) for one in allowed), path
            numbers.append(path)

    state = full_state()
    with h5py.File(written(tmp_path, state)) as file:
        file.visititems(visit)
    assert texts == ["config", "numerics"]
    assert sorted(numbers) == sorted([*state.arrays(), *(f"counters/{name}" for name in state.counters)])
    assert {"counters", "params", "optimizers", "buffers", "hooks"} <= set(groups)


def test_values_of_the_other_byte_order_are_written_little_endian(tmp_path: Path) -> None:
    state, other = small_state(), small_state()
    state.hooks = {"big": {"endian": np.array([1.5, -2.5], ">f8")}}
    other.hooks = {"big": {"endian": np.zeros(2, ">f8")}}
    with codec.Reader(written(tmp_path, state)) as reader:
        assert reader.datasets["hooks/big/endian"].dtype.str == "<f8"
        codec.restore(reader, other)
    assert other.hooks["big"]["endian"].tolist() == [1.5, -2.5]


# --- damage


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    data = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(data):
            for mask in (0xFF, 0x01, 0x20) if position < 512 else (0xFF,):
                os.pwrite(file.fileno(), bytes([byte ^ mask]), position)
                code = refused(path).code
                assert code in ({"foreign", "version", "length", "digest"} if position < 512 else {"digest"}), position
            os.pwrite(file.fileno(), bytes([byte]), position)
    codec.Reader(path).close()  # and whole again, it is good


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


def test_the_message_of_damage_says_what_differs(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert str(refused(path)) == f"{NAME}: damaged (sha256 differs)"
    path.write_bytes(data[:-10])
    assert str(refused(path)) == f"{NAME}: damaged ({len(data) - 10} bytes instead of {len(data)})"


@pytest.mark.parametrize("junk", [b"", b"\0" * 4096, b"stepctl-checkpoint 1\n", b"x" * 511, b"\x89HDF\r\n\x1a\n" * 100])
def test_what_is_no_checkpoint_is_refused(junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(junk)
    assert refused(path).code == "foreign"


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(encoded(small_state()).replace(b"stepctl-checkpoint 1\n", b"stepctl-checkpoint 2\n", 1))
    error = refused(path)
    assert error.code == "version"
    assert str(error) == f"{NAME}: format version 2; this stepctl reads 1"


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    real = written(tmp_path, small_state(), "step-00000007.h5.real")
    (tmp_path / NAME).symlink_to(real)
    assert refused(tmp_path / NAME).code == "open"
    assert "symbolic link" in str(refused(tmp_path / NAME))
    (tmp_path / NAME).unlink()
    assert refused(tmp_path / NAME).code == "open"  # nothing there
    os.mkfifo(tmp_path / NAME)
    assert refused(tmp_path / NAME).code == "kind"
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    assert refused(tmp_path / NAME).code == "kind"


def test_a_file_that_cannot_be_read_is_refused() -> None:
    assert refused(Path("/proc/self/mem")).code == "read"  # a regular file whose first bytes give EIO


def test_a_sparse_giant_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    try:
        os.truncate(path, userblock.MAX_BYTES + 1)
    except OSError:
        pytest.skip("this file system has no room for a sparse file of that size")
    assert refused(path).code == "size"


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    codec.Reader(path).close()
    before = len(os.listdir("/proc/self/fd"))
    codec.Reader(path).close()
    os.truncate(path, path.stat().st_size - 1)
    refused(path)
    tampered(tmp_path, lambda file: file.create_group("stranger"))
    refused(path)
    assert len(os.listdir("/proc/self/fd")) == before


# --- hostile structures behind a right digest


def tampered(folder: Path, change: Callable[[h5py.File], object], name: str = NAME) -> Path:
    """Write a good checkpoint, let `change` have its way with the HDF5 part, and make the digest right again."""
    path = written(folder, small_state(), name)
    with h5py.File(path, "r+", libver=LATEST) as file:
        change(file)
    return redigested(path, path.read_bytes()[512:])


def redigested(path: Path, body: bytes) -> Path:
    path.write_bytes(userblock.make(hashlib.sha256(body).hexdigest(), len(body)) + body)
    return path


def replaced(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return change


def array(**options: Any) -> Callable[[h5py.File], None]:
    """Put a data set that the format does not have at /params/x."""

    def change(file: h5py.File) -> None:
        file.create_dataset("params/x", **options)

    return change


def laid_out(layout: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_layout(layout)
        h5d.create(file["params"].id, b"x", h5t.IEEE_F32LE, h5s.create_simple((2,)), dcpl=creation)

    return change


def typed(kind: h5t.TypeID) -> Callable[[h5py.File], None]:
    """Put an array of a type that NumPy may have no name for at /params/x."""

    def change(file: h5py.File) -> None:
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_layout(h5d.CONTIGUOUS)
        creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        h5d.create(file["params"].id, b"x", kind, h5s.create_simple((2,)), dcpl=creation)

    return change


def whole_number(size: int, precision: int, offset: int = 0) -> h5t.TypeIntegerID:
    kind = h5t.STD_I64LE.copy()
    kind.set_size(size)
    kind.set_precision(precision)
    kind.set_offset(offset)
    return kind


def real_number(exponent: int, mantissa: int, bias: int) -> h5t.TypeFloatID:
    """A float of four or eight bytes with its bits dealt out in another way."""
    bits = 1 + exponent + mantissa
    kind = (h5t.IEEE_F32LE if bits == 32 else h5t.IEEE_F64LE).copy()
    kind.set_fields(bits - 1, mantissa, exponent, 0, mantissa)
    kind.set_ebias(bias)
    return kind


def root_typed(kind: h5t.TypeID) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file.attrs["global_step"]
        h5py.h5a.create(file.id, b"global_step", kind, h5s.create(h5s.SCALAR))

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((2,), "<f4")
    layout[:] = h5py.VirtualSource(OTHER, "x", (2,))
    file.create_virtual_dataset("params/x", layout)


def counted(name: str, value: Any) -> Callable[[h5py.File], None]:
    return replaced(f"counters/{name}", value)


def stepped(attribute: int, counter: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs["global_step"] = np.int64(attribute)
        file["counters/global_step"][()] = counter

    return change


def rooted(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file.attrs[name]
        if value is not None:
            file.attrs.create(name, value)

    return change


OTHER = "other.h5"  # opened by nobody
TEXT = h5py.string_dtype("utf-8", 3)
HOSTILE: dict[str, tuple[str, Callable[[h5py.File], Any]]] = {
    "soft link": ("link", lambda file: file.__setitem__("params/x", h5py.SoftLink("/params/weight"))),
    "soft link as a group": ("link", replaced("buffers", h5py.SoftLink("/params"))),
    "dangling link": ("link", lambda file: file.__setitem__("params/x", h5py.SoftLink("/nowhere"))),
    "external link": ("link", lambda file: file.__setitem__("params/x", h5py.ExternalLink(OTHER, "/x"))),
    "external link as a group": ("link", replaced("buffers", h5py.ExternalLink(OTHER, "/"))),
    "external storage": ("external", array(shape=(2,), dtype="<f4", external=[(OTHER, 0, 8)])),
    "virtual": ("layout", virtual),
    "chunked": ("layout", array(data=np.ones(4, "<f4"), chunks=(2,))),
    "filtered": ("layout", array(data=np.ones(4, "<f4"), chunks=(2,), compression="gzip")),
    "checksummed": ("layout", array(data=np.ones(4, "<f4"), chunks=(2,), fletcher32=True)),
    "growing": ("layout", array(data=np.ones(4, "<f4"), maxshape=(None,))),
    "compact": ("layout", laid_out(h5d.COMPACT)),
    "variable-length string": ("dtype", array(data="text")),
    "variable-length numbers": ("dtype", array(shape=(1,), dtype=h5py.vlen_dtype(np.float32))),
    "fixed string": ("dtype", array(data=np.array(b"abc", TEXT))),
    "compound": ("dtype", array(data=np.zeros(2, [("re", "<f4"), ("im", "<f4")]))),
    "complex": ("dtype", array(data=np.zeros(2, "<c8"))),
    "object reference": ("dtype", array(shape=(1,), dtype=h5py.ref_dtype)),
    "region reference": ("dtype", array(shape=(1,), dtype=h5py.regionref_dtype)),
    "opaque": ("dtype", array(data=np.zeros(2, "V4"))),
    "array type": ("dtype", array(shape=(2,), dtype=np.dtype(("<f4", (2,))))),
    "enum": ("dtype", array(shape=(2,), dtype=h5py.enum_dtype({"a": 0}, "<i8"))),
    "bool": ("dtype", array(data=np.zeros(2, bool))),
    "float16": ("dtype", array(data=np.zeros(2, "<f2"))),
    "int8": ("dtype", array(data=np.zeros(2, "i1"))),
    "int32": ("dtype", array(data=np.zeros(2, "<i4"))),
    "uint64": ("dtype", array(data=np.zeros(2, "<u8"))),
    "big-endian float": ("dtype", array(data=np.zeros(2, ">f4"))),
    "big-endian int": ("dtype", array(data=np.zeros(2, ">i8"))),
    "int64 of 60 bits": ("dtype", typed(whole_number(8, 60))),
    "int64 of shifted bits": ("dtype", typed(whole_number(8, 32, 16))),
    "int of 3 bytes": ("dtype", typed(whole_number(3, 24))),
    "int of 16 bytes": ("dtype", typed(whole_number(16, 64))),
    "float32 of another bias": ("dtype", typed(real_number(8, 23, 100))),
    "float32 of another layout": ("dtype", typed(real_number(5, 26, 15))),
    "float64 of another layout": ("dtype", typed(real_number(15, 48, 16383))),
    "bit field": ("dtype", typed(h5t.STD_B8LE)),
    "time": ("dtype", typed(h5t.UNIX_D32LE)),
    "name not ASCII": ("name", lambda file: file.create_dataset("params/é", data=1.0)),
    "name not UTF-8": ("name", lambda file: file.create_dataset(b"params/\xff", data=1.0)),
    "named type": ("kind", lambda file: file.__setitem__("params/x", np.dtype("<f4"))),
    "an array as a group": ("kind", replaced("buffers", np.float32(1))),
    "config as a group": ("kind", lambda file: (replaced("config", None)(file), file.create_group("config"))),
    "config as a number": ("dtype", replaced("config", 1)),
    "config of variable length": ("dtype", replaced("config", "seed: 0")),
    "config not UTF-8": ("text", replaced("config", np.array(b"\xff\xfe!", TEXT))),
    "config not YAML": ("text", replaced("config", np.array(b"[1,", TEXT))),
    "config not a mapping": ("text", replaced("config", np.array(b"abc", TEXT))),
    "numerics not JSON": ("text", replaced("numerics", np.array(b"abc", TEXT))),
    "numerics not an object": ("text", replaced("numerics", np.array(b"[1]", TEXT))),
    "config missing": ("missing", replaced("config", None)),
    "numerics missing": ("missing", replaced("numerics", None)),
    "unknown group": ("unknown", lambda file: file.create_group("stranger")),
    "unknown array": ("unknown", lambda file: file.create_dataset("stranger", data=1.0)),
    "doubled array": ("doubled", lambda file: file.__setitem__("params/x", file["params/weight"])),
    "doubled group": ("doubled", replaced("buffers", None)),  # made below: it needs the file
    "cycle": ("doubled", lambda file: file.__setitem__("params/x", file["params"])),
    "deep nesting": ("depth", lambda file: file.create_group("params/" + "/".join("x" * 1000))),
    "attribute of a group": ("attribute", lambda file: file["params"].attrs.__setitem__("a", 1)),
    "attribute of an array": ("attribute", lambda file: file["params/weight"].attrs.__setitem__("a", 1)),
    "strange root attribute": ("attribute", lambda file: file.attrs.__setitem__("stranger", 1)),
    "root attribute missing": ("attribute", rooted("run", None)),
    "root attribute of variable length": ("attribute", rooted("run", "moon")),
    "root attribute of four bytes": ("attribute", rooted("global_step", np.int32(STEP))),
    "root attribute of three bytes": ("attribute", root_typed(whole_number(3, 24))),
    "root attribute of time": ("attribute", root_typed(h5t.UNIX_D32LE)),
    "root attribute as a list": ("attribute", rooted("global_step", np.array([STEP]))),
    "root attribute as a float": ("attribute", rooted("format_version", 1.0)),
    "root attribute without a value": ("attribute", rooted("global_step", h5py.Empty("<i8"))),
    "root attribute not UTF-8": ("text", rooted("run", np.array(b"\xff\xfe!", TEXT))),
    "another format": ("version", rooted("format", np.array(b"tar", TEXT))),
    "another version inside": ("version", rooted("format_version", np.int64(2))),
    "attribute of another step": ("step", stepped(STEP + 1, STEP)),
    "counter of another step": ("step", stepped(STEP, STEP + 1)),
    "both of another step than the name": ("step", stepped(STEP + 1, STEP + 1)),
    "no counter of steps": ("step", counted("global_step", None)),
    "no counter of samples": ("counter", counted("samples_seen", None)),
    "negative counter": ("counter", counted("model", np.int64(-1))),
    "counter as a float": ("dtype", counted("model", 7.0)),
    "counter of four bytes": ("dtype", counted("model", np.int32(STEP))),
    "counter as a list": ("dtype", counted("model", np.array([STEP]))),
    "counter in a folder": ("dtype", lambda file: file.create_dataset("counters/a/b", data=1)),
    "NULL dataspace": ("shape", array(data=h5py.Empty("<f4"))),
    "a petabyte without storage": ("shape", array(shape=(1 << 47,), dtype="<f8")),
    "more elements than int64 counts": ("shape", array(shape=(1 << 31, 1 << 31, 1 << 31), dtype="<f8")),
    "one array without storage": ("storage", array(shape=(2,), dtype="<f4")),
}
HOSTILE["doubled group"] = (
    "doubled",
    lambda file: (replaced("buffers", None)(file), file.__setitem__("buffers", file["params"])),
)


def test_the_unchanged_file_behind_a_new_digest_is_good(tmp_path: Path) -> None:
    """Else the refusals below would prove nothing."""
    state = small_state()
    state.params["weight"][:] = 0
    with codec.Reader(tampered(tmp_path, lambda file: None)) as reader:
        codec.restore(reader, state)
    assert state.same_bits(small_state())


class Opens:
    """Tells whether anybody opened a file since this was made (Linux inotify)."""

    def __init__(self, path: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self.libc.inotify_init1(os.O_NONBLOCK)
        assert self.libc.inotify_add_watch(self.descriptor, os.fsencode(path), 0x20) > 0  # IN_OPEN

    def any(self) -> bool:
        try:
            return bool(os.read(self.descriptor, 4096))
        except BlockingIOError:
            return False


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_structure_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a file that names another one would find it
    code, change = HOSTILE[case]
    with h5py.File(OTHER, "w") as other:
        other["x"] = np.ones(2, "<f4")
    path = tampered(tmp_path, change)
    opens = Opens(tmp_path / OTHER)
    assert refused(path).code == code
    assert not opens.any()
    (tmp_path / OTHER).read_bytes()
    assert opens.any()  # the watch does see an open
    os.close(opens.descriptor)


def test_a_negative_step_is_refused(tmp_path: Path) -> None:
    """Under a name that says no step, since a name cannot say a negative one."""
    assert refused(tampered(tmp_path, stepped(-1, -1), "copy.h5")).code == "counter"


def test_a_name_of_another_step_is_refused(tmp_path: Path) -> None:
    error = refused(written(tmp_path, small_state(), "step-00000008.h5"))
    assert error.code == "step"
    assert str(error) == (
        "step-00000008.h5: its three step numbers disagree (name 8, attribute 7, counter 7)"
    )  # fmt: skip


def test_a_copy_under_a_free_name_is_good(tmp_path: Path) -> None:
    with codec.Reader(written(tmp_path, small_state(), "best.h5")) as reader:
        assert reader.header.global_step == STEP


def test_too_many_objects_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "MAX_OBJECTS", 20)
    path = tampered(tmp_path, lambda file: [file.create_group(f"params/{n}") for n in range(30)])
    assert refused(path).code == "objects"


def test_what_is_not_hdf5_behind_a_right_digest_is_refused(tmp_path: Path) -> None:
    assert refused(redigested(tmp_path / NAME, b"")).code == "hdf5"
    assert refused(redigested(tmp_path / NAME, b"\x89HDF\r\n\x1a\n\x03" + bytes(4000))).code == "hdf5"


@pytest.mark.parametrize("shift", [512, 1536])
def test_hdf5_anywhere_but_at_byte_512_is_refused(shift: int, tmp_path: Path) -> None:
    body = bytes(shift) + encoded(small_state())[512:]
    assert refused(redigested(tmp_path / NAME, body)).code == "hdf5"


def test_another_superblock_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "old.h5", "w", libver=("earliest", "v110")) as file:
        file["x"] = 1
    assert refused(redigested(tmp_path / NAME, (tmp_path / "old.h5").read_bytes())).code == "hdf5"


def test_a_broken_inside_behind_a_right_digest_is_refused_by_code_or_harmless(tmp_path: Path) -> None:
    body, n_refused = encoded(small_state())[512:], 0
    for position in range(0, len(body), 41):
        broken = bytearray(body)
        broken[position] ^= 0xFF
        path = redigested(tmp_path / NAME, bytes(broken))
        try:
            with codec.Reader(path) as reader:
                codec.restore(reader, small_state())
        except CheckpointError:
            n_refused += 1
    assert n_refused > 50


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
        np.zeros((2, 3), order="F"),
        np.zeros(6)[::2],
        np.broadcast_to(np.zeros(1), (3,)),
    ],
    ids=lambda array: f"{array.dtype}, strides {array.strides}",
)
def test_arrays_that_no_checkpoint_could_give_back_are_refused_before_they_are_saved(array: Array) -> None:
    state = small_state()
    codec.check_storable(state)
    state.hooks = {"best": {"loss": array}}
    with pytest.raises(ConfigError, match=r"^/hooks/best/loss: .*float32, float64, int64 and uint8 in C order"):
        codec.check_storable(state)


def test_all_that_does_not_fit_is_reported_together(tmp_path: Path) -> None:
    def state(shapes: dict[str, tuple[int, ...]], hook: Array, counters: dict[str, int]) -> TrainState:
        params = Arena(shapes, "float32")
        params.flat.fill(3)
        numbers = {"global_step": STEP, "samples_seen": 1} | counters
        return TrainState(Counters(numbers), params, {}, Arena({}, "float32"), {"best": {"loss": hook}})

    found = state({"same": (2,), "wide": (3,), "old": (1, 2)}, np.zeros(1, np.int64), {"critic": 1})
    expected = state({"same": (2,), "wide": (4,), "new": ()}, np.zeros(1), {"model": 1})
    before = {name: view.tobytes() for name, view in expected.arrays().items()}
    with codec.Reader(written(tmp_path, found)) as reader, pytest.raises(CheckpointError) as caught:
        codec.restore(reader, expected)
    assert caught.value.code == "mismatch"
    assert str(caught.value).splitlines() == [
        f"{NAME}: does not fit this config",
        "  /params/wide: expected float32 (4,), found float32 (3,)",
        "  /params/new: expected float32 (), found nothing",
        "  /hooks/best/loss: expected float64 (1,), found int64 (1,)",
        "  /counters/model: expected int64 (), found nothing",
        "  /params/old: expected nothing, found float32 (1, 2)",
        "  /counters/critic: expected nothing, found int64 ()",
    ]
    assert {name: view.tobytes() for name, view in expected.arrays().items()} == before
    assert dict(expected.counters) == {"global_step": STEP, "samples_seen": 1, "model": 1}


ODD_NAMES = [
    *(("best", key) for key in ("", ".", "é", "a b", "x\0y", "/loss", "loss/", "a//b", "a/" * 40 + "b", "same/loss")),
    *((name, "loss") for name in ("", "é", "best/same")),
]


@pytest.mark.parametrize(("hook", "key"), ODD_NAMES, ids=repr)
def test_names_that_no_checkpoint_could_hold_are_refused_before_they_are_saved(hook: str, key: str) -> None:
    state = small_state()
    state.hooks = {"best": {"same": np.zeros(1)}}
    codec.check_storable(state)
    state.hooks.setdefault(hook, {})[key] = np.zeros(1)
    with pytest.raises(ConfigError, match="name"):
        codec.check_storable(state)


def test_a_counter_needs_such_a_name_too() -> None:
    state = small_state()
    state.counters = Counters(dict(state.counters) | {"generatör": 0})
    with pytest.raises(ConfigError, match="name"):
        codec.check_storable(state)
