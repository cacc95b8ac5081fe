"""A file like the one before it is checked without HDF5, and never accepted if HDF5 would refuse it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stepctl.checkpoint import codec, user_block
from stepctl.checkpoint.check import KnownLayout, _Checker, check
from stepctl.errors import CheckpointError, UnreadableError
from stepctl.state.train_state import TrainState
from tests.support.checkpoints import encoded, full_state, small_state, written
from tests.support.hdf5_metadata import patched
from tests.support.hostile_files import HOSTILE
from tests.support.program_states import full_program, program_state


def at_step(step: int) -> TrainState:
    return full_state(seed=step, step=step)


def program_at_step(step: int) -> TrainState:
    live = full_program()
    live["accepted"] = step
    live["θ"][:] = step % 1000
    return program_state(live, step)


def file_of(folder: Path, state: TrainState) -> Path:
    path = folder / f"step-{state.counters.global_step:08d}.h5"
    path.write_bytes(encoded(state))
    return path


def write_body(path: Path, body: bytes) -> None:
    """Write a file of these bytes from 512 on, with the right digest."""
    path.write_bytes(user_block.make(hashlib.sha256(body).hexdigest(), len(body)) + body)


def known_layout(path: Path) -> KnownLayout:
    with codec.Reader(path) as reader:
        known = KnownLayout.of(reader)
    assert known is not None
    return known


@pytest.mark.parametrize("make", [at_step, program_at_step])
def test_a_file_like_another_gives_the_facts_that_hdf5_gives(
    make: Callable[[int], TrainState], tmp_path: Path
) -> None:
    known = known_layout(file_of(tmp_path, make(70_000)))
    for step in (0, 1, 8, 2**40):
        path = file_of(tmp_path, make(step))
        assert known.check(str(path)) == _Checker().check(str(path))


def test_a_step_whose_bytes_occur_twice_gives_no_layout(tmp_path: Path) -> None:
    path = file_of(tmp_path, at_step(user_block.VERSION))  # the version is there, too
    with codec.Reader(path) as reader:
        assert KnownLayout.of(reader) is None
    assert check(str(path)) == check(str(path))


def test_every_change_of_the_metadata_needs_a_walk(tmp_path: Path) -> None:
    known = known_layout(file_of(tmp_path, at_step(70_000)))
    path = file_of(tmp_path, at_step(70_001))
    content = path.read_bytes()
    in_arrays = {
        position for start, end in known.extents.values() for position in range(start, end)
    }
    positions = [n for n in range(user_block.SIZE, len(content)) if n not in in_arrays]
    for position in positions[::29]:
        changed = bytearray(content)
        changed[position] ^= 0x10
        write_body(path, bytes(changed[user_block.SIZE :]))
        assert known.check(str(path)) is None, position


def spoiled_step(content: bytes, known: KnownLayout) -> bytes:
    """Another step in the attribute than in the counter, under the right checksum."""
    position = known.root.step - user_block.SIZE
    return patched(content, position, (9).to_bytes(8, "little"))


def change_of(path: str, new: bytes) -> Callable[[bytes, KnownLayout], bytes]:
    def change(body: bytes, known: KnownLayout) -> bytes:
        start = known.extents[path][0] - user_block.SIZE
        return body[:start] + new + body[start + len(new) :]

    return change


SPOILED = {
    "attribute": (at_step, spoiled_step, "step"),
    "counter": (at_step, change_of("counters/global_step", b"\x09"), "step"),
    "negative counter": (at_step, change_of("counters/critic", b"\xff" * 8), "counter"),
    "config": (at_step, change_of("config", b"seed: {"), "text"),
    "numerics": (at_step, change_of("numerics", b"["), "text"),
    "values": (program_at_step, change_of("values", b"["), "values"),
    "bool": (program_at_step, change_of("state/arrays/bool", b"\x02"), "bool"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_file_is_refused_as_hdf5_refuses_it(case: str, tmp_path: Path) -> None:
    make, spoil, code = SPOILED[case]
    checker = _Checker()
    checker.check(str(file_of(tmp_path, make(70_000))))
    path = file_of(tmp_path, make(70_001))
    known = known_layout(path)
    write_body(path, spoil(path.read_bytes()[user_block.SIZE :], known))
    assert known.check(str(path)) is None
    with pytest.raises(CheckpointError) as caught:
        checker.check(str(path))
    assert caught.value.code == code


def test_a_renamed_file_is_refused(tmp_path: Path) -> None:
    checker = _Checker()
    checker.check(str(file_of(tmp_path, at_step(70_000))))
    path = file_of(tmp_path, at_step(70_001)).rename(tmp_path / "step-00070002.h5")
    with pytest.raises(CheckpointError) as caught:
        checker.check(str(path))
    assert caught.value.code == "step"


def test_metadata_within_an_array_give_no_layout(tmp_path: Path) -> None:
    """The bytes of an array are not compared: they must not decide what objects there are."""
    path = file_of(tmp_path, at_step(70_000))
    known = known_layout(path)
    with codec.Reader(path) as reader:
        dataset = reader.datasets["params/dense0/weight"]
        n_bytes = dataset.size * dataset.dtype.itemsize
        address = known.extents["params/dense0/weight"][0] - user_block.SIZE
    body = path.read_bytes()[user_block.SIZE :]
    stored = address.to_bytes(8, "little") + n_bytes.to_bytes(8, "little")
    assert body.count(stored) == 1  # in the layout message of the dataset
    header = body.index(b"OHDR", known.root.start - user_block.SIZE + 4)  # another object
    write_body(path, patched(body, body.index(stored), header.to_bytes(8, "little")))
    with codec.Reader(path) as reader:
        assert "params/dense0/weight" in reader.datasets
        assert KnownLayout.of(reader) is None


def test_a_large_file_is_walked_over(tmp_path: Path) -> None:
    state = program_state({"x": np.zeros(1 << 19), "n": 1}, step=70_000)
    with codec.Reader(file_of(tmp_path, state)) as reader:
        assert KnownLayout.of(reader) is None


@pytest.mark.parametrize("case", list(HOSTILE)[::3])
def test_a_hostile_file_after_a_good_one_is_refused_by_its_code(case: str, tmp_path: Path) -> None:
    hostile = HOSTILE[case]
    checker = _Checker()
    (tmp_path / "good").mkdir()
    checker.check(str(written(tmp_path / "good", small_state())))
    path = hostile.build(tmp_path)
    with pytest.raises((CheckpointError, UnreadableError)) as caught:
        checker.check(str(path))
    if isinstance(caught.value, CheckpointError):
        assert caught.value.code == hostile.code
