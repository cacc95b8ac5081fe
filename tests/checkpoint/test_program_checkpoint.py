"""The checkpoint of a program: `/state` and `/values`, and their way back to the bit."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings

from stepctl.checkpoint import codec, layout
from stepctl.errors import CheckpointError
from stepctl.state import values
from stepctl.state.train_state import SavedHook
from tests.support.checkpoints import NAME, encoded, full_state, small_state, written
from tests.support.program_states import (
    empty_program,
    full_program,
    program_state,
    same_values,
)
from tests.support.state_strategies import STATES

# by version of HDF5: sha256 of `full_state` and of `small_state` from byte 512 on, as stepctl 0.2.0
# wrote them before a file could hold a program
VERSION = "0.2.0"
DIGESTS = {
    "2.0.0": [
        "4177a9223061bf0005a39fda7b72e5953e8cc1b2534d44d5236424297d6a7dda",
        "a870cd882913990df427850ba8efd84daf36998b52b1467f116b756624e46fce",
    ],
    "1.14.4": [
        "edd07215ac4569b897a935885c46282403f5e963dd8de88da4836db23bbacf06",
        "acf4b20cfe3e313fc6ffcacc7c8c6e0b0576225aa290378699c392493be00d5e",
    ],
}


def restored(path: Path, live: dict[str, Any]) -> dict[str, Any]:
    """Restore a checkpoint into a live state, and return it."""
    state = program_state(live, step=0)
    with codec.Reader(path) as reader:
        codec.restore(reader, state)
        assert dict(state.counters) == reader.header.counters
    return live


def test_a_program_comes_back_to_the_bit(tmp_path: Path) -> None:
    path = written(tmp_path, program_state(full_program()))
    for live in (empty_program(), full_program()):
        held = live["arrays"]
        assert same_values(restored(path, live), full_program())
        assert live["arrays"] is held or held is None


@settings(deadline=None, max_examples=50)
@given(state=STATES)
def test_any_state_comes_back_from_its_file(
    state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("state"), program_state(state))
    for live in (dict.fromkeys(state), copy.deepcopy(state)):
        found = restored(path, live)
        assert same_values({key: found[key] for key in state}, state)
        assert program_state(found).same_bits(program_state(state))


def test_a_state_at_the_limits_is_saved(tmp_path: Path) -> None:
    arrays = [np.full(1, n) for n in range(values.MAX_OBJECTS - 1)]  # in one list
    live = {"arrays": arrays, "text": "x" * (values.MAX_TEXT - 150_000)}
    state = program_state(live)
    codec.check_storable(state)
    assert len(state.values or "") > 0.9 * values.MAX_TEXT
    found = restored(written(tmp_path, state), {"arrays": [], "text": ""})
    assert same_values(found, live)


def test_the_next_draws_and_children_equal_those_of_the_saved_generators(tmp_path: Path) -> None:
    saved = full_program()
    path = written(tmp_path, program_state(saved))
    live = restored(path, empty_program())
    for mine, other in zip(live["generators"], saved["generators"], strict=True):
        assert mine.random(3).tolist() == other.random(3).tolist()
        assert mine.spawn(1)[0].random() == other.spawn(1)[0].random()


def test_the_same_state_gives_the_same_bytes_whether_it_is_live_or_a_snapshot() -> None:
    state = program_state(full_program())
    assert encoded(state) == encoded(state.snapshot()) == encoded(state.with_copies())


def test_other_programs_read_the_arrays_as_they_are(tmp_path: Path) -> None:
    live = full_program()
    with h5py.File(written(tmp_path, program_state(live))) as file:
        assert set(file) == {"counters", "state", "hooks", "config", "numerics", "values"}
        for dtype, array in live["arrays"].items():
            assert file[f"state/arrays/{dtype}"][()].tobytes() == array.tobytes()
            assert file[f"state/arrays/{dtype}"].dtype == array.dtype
        assert file["state/θ"][()].tolist() == [0, 1, 2, 3]
        assert file["state"].id.links.get_info("θ".encode()).cset == h5py.h5t.CSET_UTF8
        assert file["state/by columns"].shape == (5, 3)
        assert file["state/by columns"][()].tobytes() == live["by columns"].tobytes(order="C")
        assert h5py.check_string_dtype(file["values"].dtype).encoding == "ascii"


def test_the_file_of_a_task_has_the_bytes_of_earlier_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = DIGESTS.get(h5py.version.hdf5_version)
    if expected is None:
        pytest.skip(f"the digests are of HDF5 {', '.join(DIGESTS)}")
    monkeypatch.setattr(layout, "__version__", VERSION)
    layout._template.cache_clear()
    bodies = [encoded(state)[512:] for state in (full_state(), small_state())]
    layout._template.cache_clear()
    assert [hashlib.sha256(body).hexdigest() for body in bodies] == expected


def test_a_snapshot_does_not_change_with_the_state() -> None:
    live = {"x": np.zeros(3), "items": [1, {"y": np.asfortranarray(np.ones((2, 2)))}]}
    state = program_state(live)
    before = copy.deepcopy(live)
    snapshot = state.snapshot()
    live["x"][:] = 7
    live["items"][1]["y"][:] = 7
    live["items"].append(2)
    assert not state.same_bits(snapshot)
    assert snapshot.same_bits(program_state(before))
    assert snapshot.snapshot().same_bits(snapshot)
    assert snapshot.arrays()["state/items/1/y"].flags.f_contiguous


def test_the_arrays_of_a_live_state_are_not_copied() -> None:
    x = np.zeros(3)
    assert program_state({"x": x}).arrays()["state/x"] is x
    assert program_state({"x": x}).n_bytes == 24


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": True}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": 0.0}, {"a": -0.0}),
        ({"a": [1]}, {"a": (1,)}),
        ({"a": np.float32(1)}, {"a": np.float64(1)}),
        ({"a": np.zeros((2, 2))}, {"a": np.zeros((2, 2), order="F")}),
        ({"a": np.zeros(2)}, {"a": -np.zeros(2)}),
        ({"a": np.random.default_rng(0)}, {"a": np.random.default_rng(1)}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}),
    ],
)
def test_states_that_differ_do_not_have_the_same_bits(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert program_state(one).same_bits(program_state(copy.deepcopy(one)))
    assert not program_state(one).same_bits(program_state(other))


def test_a_program_may_have_nan_and_infinity() -> None:
    state = program_state({"x": np.array([np.nan, np.inf])})
    assert state.first_non_finite() is None
    task = small_state()
    task.params["weight"][:] = np.nan
    assert replace(task, program=state.program).first_non_finite() == "params/weight"


def test_shapes_come_from_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, program_state({"chain": np.ones((5, 2)), "n": [np.zeros(1)] * 1}))
    live = restored(path, {"chain": np.zeros((1, 2)), "n": []})
    assert live["chain"].shape == (5, 2)
    assert len(live["n"]) == 1


def test_arrays_are_filled_in_place_in_either_order(tmp_path: Path) -> None:
    saved = {
        "c": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    path = written(tmp_path, program_state(saved))
    c, f = np.zeros((2, 3)), np.zeros((2, 3), order="F")
    live = restored(path, {"c": c, "f": f})
    assert live["c"] is c
    assert live["f"] is f
    assert same_values(live, saved)


def test_a_program_with_plain_values_only(tmp_path: Path) -> None:
    path = written(tmp_path, program_state({"n": 3}))
    assert restored(path, {"n": 0}) == {"n": 3}


def test_hooks_beside_a_program_come_back(tmp_path: Path) -> None:
    state = replace(program_state({"n": 3}), hooks=[SavedHook("best", {"loss": np.ones(2)})])
    path = written(tmp_path, state)
    other = replace(program_state({"n": 0}), hooks=[SavedHook("best", {"loss": np.zeros(2)})])
    with codec.Reader(path) as reader:
        codec.restore(reader, other)
    assert other.same_bits(state)


def test_the_checkpoint_of_a_program_does_not_fit_a_task_and_the_reverse(tmp_path: Path) -> None:
    program, task = program_state({"n": 3}), small_state()
    for saved, other, message in (
        (program, task, "holds the state of a program, and this config has a task"),
        (task, program, "holds the state of a task, and this config has a program"),
    ):
        with (
            codec.Reader(written(tmp_path, saved)) as reader,
            pytest.raises(CheckpointError, match=f"^{NAME}: {message}") as caught,
        ):
            codec.restore(reader, other)
        assert caught.value.code == "mismatch"
        assert "\n" not in str(caught.value)
