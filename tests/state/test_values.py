"""The state of a program is captured and restored to the bit; what cannot be saved is refused by its path."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from syrupy.assertion import SnapshotAssertion

from stepctl.errors import ConfigError
from stepctl.state.generators import BIT_GENERATORS
from stepctl.state.program_state import restore
from stepctl.state.values import MAX_OBJECTS, MAX_TEXT, capture
from tests.support.program_states import Emulator, same_values
from tests.support.state_strategies import STATES


def emptied(value: Any) -> Any:
    """Return a value of the same structure whose arrays and lists hold something else."""
    if isinstance(value, np.ndarray):
        return np.zeros_like(value)
    if isinstance(value, dict):
        return {key: emptied(item) for key, item in value.items()}
    return [] if isinstance(value, list) else None


@settings(deadline=None)
@given(STATES)
def test_a_state_comes_back_to_the_bit(state: dict[str, Any]) -> None:
    captured = capture(state)
    json.loads(captured.values, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for start in (dict.fromkeys(state), emptied(state), copy.deepcopy(state)):
        restore(start, captured)
        assert same_values({key: start[key] for key in state}, state)


def test_a_capture_is_a_copy() -> None:
    state = {"x": np.ones(3), "items": [np.zeros(2)]}
    captured = capture(state)
    state["x"][:] = 7
    state["items"][0][:] = 7
    assert captured.arrays["x"].tolist() == [1, 1, 1]
    assert captured.arrays["items/0"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "value", [float("nan"), -float("nan"), float("inf"), -float("inf"), -0.0, 5e-324]
)
def test_every_float_comes_back(value: float) -> None:
    state = {"x": value, "z": complex(1, value)}
    captured = capture(state)
    restored: dict[str, Any] = {"x": 0, "z": 0}
    restore(restored, captured)
    assert np.float64(restored["x"]).tobytes() == np.float64(value).tobytes()
    assert np.float64(restored["z"].imag).tobytes() == np.float64(value).tobytes()


def test_matching_arrays_are_filled_in_place() -> None:
    state: dict[str, Any] = {
        "x": np.arange(6.0).reshape(2, 3),
        "rng": np.random.default_rng(3),
        "items": [1, [2]],
        "table": {"a": np.ones(2)},
        "old": np.random.RandomState(1),
    }
    captured = capture(state)
    held = dict(state)
    inner = state["table"]["a"]
    state["x"][:] = 0
    state["rng"].random(5)
    state["old"].normal(size=3)
    state["items"][1].append(9)
    state["items"].append(9)
    state["table"]["b"] = 3
    restore(state, captured)
    for key in held:
        assert state[key] is held[key]
    assert state["table"]["a"] is inner
    assert state["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert state["items"] == [1, [2]]
    assert list(state["table"]) == ["a"]
    assert state["rng"].random() == np.random.default_rng(3).random()
    assert state["old"].normal() == np.random.RandomState(1).normal()


@pytest.mark.parametrize(
    "saved",
    [np.zeros((3, 2), order="F"), np.zeros((2, 3)), np.zeros((3, 2), np.float32), np.zeros(0)],
    ids=["other order", "other shape", "other dtype", "empty"],
)
def test_an_array_that_differs_in_layout_is_replaced(saved: np.ndarray[Any, Any]) -> None:
    captured = capture({"x": saved})
    state = {"x": np.ones((3, 2))}
    restore(state, captured)
    assert same_values(state["x"], saved)


@pytest.mark.parametrize("name", BIT_GENERATORS)
@pytest.mark.parametrize("fill", [True, False])
def test_a_generator_draws_and_spawns_what_the_captured_one_would_have(
    name: str, fill: bool
) -> None:
    generator = np.random.Generator(
        BIT_GENERATORS[name](np.random.SeedSequence([1, 2], spawn_key=(3,)))
    )
    generator.standard_normal(7)
    generator.integers(0, 9, dtype=np.uint32)  # leaves half of a 64-bit draw
    generator.spawn(2)
    captured = capture({"rng": generator})
    state = {"rng": copy.deepcopy(generator) if fill else None}
    expected = [
        generator.random(),
        generator.spawn(1)[0].random(),
        generator.integers(0, 9, dtype=np.uint32),
    ]
    restore(state, captured)
    restored: Any = state["rng"]
    assert [
        restored.random(),
        restored.spawn(1)[0].random(),
        restored.integers(0, 9, dtype=np.uint32),
    ] == expected


@pytest.mark.parametrize(
    "generator",
    [
        np.random.Generator(np.random.Philox(key=5)),
        np.random.Generator(np.random.RandomState(4)._bit_generator),
    ],
)
def test_a_generator_without_a_seed_sequence(generator: np.random.Generator) -> None:
    captured = capture({"rng": generator})
    state: dict[str, Any] = {"rng": None}
    restore(state, captured)
    assert state["rng"].bit_generator.seed_seq is None
    assert state["rng"].random(3).tolist() == generator.random(3).tolist()


@pytest.mark.parametrize("name", BIT_GENERATORS)
def test_a_random_state_keeps_the_second_normal(name: str) -> None:
    generator = np.random.RandomState(BIT_GENERATORS[name](3))
    generator.normal()
    captured = capture({"rng": generator})
    state: dict[str, Any] = {"rng": None}
    restore(state, captured)
    assert state["rng"].normal(size=3).tolist() == generator.normal(size=3).tolist()


def test_an_object_is_saved_by_its_state_dict(snapshot: SnapshotAssertion) -> None:
    counter = Emulator()
    counter.memory[:2] = 3, 4
    counter.names.append("a")
    captured = capture({"counter": counter})
    fresh = Emulator()
    restore({"counter": fresh}, captured)
    assert fresh.memory.tolist() == [3, 4, 0, 0]
    assert fresh.names == ["a"]
    with pytest.raises(ConfigError) as caught:
        restore({"counter": None}, captured)
    assert str(caught.value) == snapshot


def test_two_objects_with_equal_states_are_two() -> None:
    capture({"a": Emulator(), "b": Emulator(), "c": Emulator()})


class Odd:
    """An object whose `state_dict` fails, or returns what was given."""

    def __init__(self, found: Any = None) -> None:
        self.found = found

    def state_dict(self) -> Any:
        return self.found if self.found is not None else {}["missing"]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class OwnSeed(np.random.SeedSequence):
    pass


def seeded(seed: Any) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


SHARED = np.zeros(4)
LIST = [1]
GENERATOR = np.random.default_rng(0)
# a state, and the path that the message names
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a key with a slash": ({"a/b": 1}, "state: key 'a/b'"),
    "an empty key": ({"a": {"": 1}}, "state['a']: key ''"),
    "a key that is a number": ({"a": {3: 1}}, "state['a']: key 3"),
    "text beyond UTF-8": ({"a": "\udcff"}, "state['a']"),
    "a set": ({"a": {1}}, "state['a']"),
    "a function": ({"a": [print]}, "state['a/0']"),
    "an array of objects": ({"a": np.array([None])}, "state['a']"),
    "an array of text": ({"a": np.array(["x"])}, "state['a']"),
    "big-endian numbers": ({"a": np.zeros(2, ">f8")}, "state['a']"),
    "long doubles": ({"a": np.zeros(2, np.longdouble)}, "state['a']"),
    "a date": ({"a": np.datetime64("2020-01-01")}, "state['a']"),
    "a masked array": ({"a": np.ma.array([1])}, "state['a']"),
    "strides": ({"a": np.zeros(4)[::2]}, "state['a']"),
    "one array twice": ({"a": SHARED, "b": SHARED}, "state['a'] and state['b']"),
    "views of one array": (
        {"a": SHARED[:3], "b": {"c": SHARED[2:]}},
        "state['a'] and state['b/c']",
    ),
    "one list twice": ({"a": LIST, "b": (LIST,)}, "state['a'] and state['b/0']"),
    "a key that is a dot": ({"a": {".": 1}}, "state['a']: key '.'"),
    "a key of 256 bytes": ({"é" * 128: 1}, "state: key"),
    "an object without a dict": ({"a": [Odd([1])]}, "state['a/0']"),
    "an object with odd keys": ({"a": Odd({1: 2})}, "state['a']: key 1"),
    "a seed sequence of one's own": ({"a": seeded(OwnSeed(1))}, "state['a']"),
    "a seed of many digits": ({"a": seeded(1 << 9000)}, "state['a']"),
    "a large pool": (
        {"a": seeded(np.random.SeedSequence(1, pool_size=65))},
        "state['a']",
    ),
    "many arrays": ({"a": 1, "b": [np.zeros(1) for _ in range(MAX_OBJECTS)]}, "state['b/4999']"),
    "much text": ({"a": "x" * 10, "b": [1.5] * (MAX_TEXT // 4), "c": 3}, "state['b']"),
    "many bytes": ({"a": 1, "$": bytes(MAX_TEXT)}, "state['$']"),
    "one generator twice": (
        {"a": GENERATOR, "b": np.random.Generator(GENERATOR.bit_generator)},
        "state['a'] and state['b']",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_cannot_be_saved_is_named(case: str, snapshot: SnapshotAssertion) -> None:
    state, path = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        capture(state)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value) == snapshot


def test_an_object_that_fails_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        capture({"a": [Odd()]})
    assert re.fullmatch(
        r"state\['a/0'\]: state_dict\(\) failed: KeyError: 'missing' \(.*test_values.py:\d+\)",
        str(caught.value),
    )


def test_a_state_that_contains_itself_is_refused() -> None:
    items: list[Any] = []
    items.append(items)
    with pytest.raises(ConfigError, match="are the same object"):
        capture({"a": items})


def test_deep_nesting_is_refused() -> None:
    deep: Any = 1
    for _ in range(200):
        deep = (deep,)
    with pytest.raises(ConfigError, match="more than 100 levels"):
        capture({"a": deep})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": 1}, "state has no key 'y', which the checkpoint has"),
        ({"x": 1, "y": 2, "z": 3}, r"state\['z'\] is not in the checkpoint"),
    ],
)
def test_other_keys_are_refused_and_nothing_is_changed(state: dict[str, Any], message: str) -> None:
    captured = capture({"x": 5, "y": 6})
    before = dict(state)
    with pytest.raises(ConfigError, match=message):
        restore(state, captured)
    assert state == before
