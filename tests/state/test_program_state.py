"""A capture uses the memory of the last one again, but only if nothing else refers to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepctl.state.arena import Array
from stepctl.state.program_state import ProgramState
from stepctl.state.values import CapturedState


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def live_state() -> dict[str, Any]:
    return {"x": np.arange(100_000.0), "f": np.asfortranarray(np.arange(60_000).reshape(300, 200))}


def test_the_memory_of_a_capture_that_is_gone_is_used_again() -> None:
    live = live_state()
    program = ProgramState(live)
    captured = program.capture()
    addresses = {path: address(array) for path, array in captured.arrays.items()}
    del captured
    for step in range(5):
        live["x"] += step
        live["f"][0] -= step
        captured = program.capture()
        assert {path: address(array) for path, array in captured.arrays.items()} == addresses
        assert captured.arrays["f"].flags.f_contiguous
        for path, array in captured.arrays.items():
            assert array.tobytes() == live[path].tobytes()
        del captured, array


HELD: dict[str, Callable[[CapturedState], Any]] = {
    "the capture": lambda captured: captured,
    "its arrays": lambda captured: captured.arrays,
    "an array": lambda captured: captured.arrays["x"],
    "a view": lambda captured: captured.arrays["x"][10:].reshape(-1, 10),
    "a buffer": lambda captured: memoryview(captured.arrays["x"]),
    "bytes": lambda captured: captured.arrays["x"].view(np.uint8).data,
}


@pytest.mark.parametrize("what", HELD)
def test_memory_that_is_in_use_is_left_alone(what: str) -> None:
    live = live_state()
    program = ProgramState(live)
    held = HELD[what](program.capture())
    before = bytes(held) if isinstance(held, memoryview) else None
    if isinstance(held, np.ndarray):
        before = held.tobytes()
    if isinstance(held, CapturedState):
        held = held.arrays
    if isinstance(held, dict):
        before = held["x"].tobytes()
    for _ in range(3):
        live["x"] += 1
        program.capture()
    if isinstance(held, dict):
        held = held["x"]
    assert (bytes(held) if isinstance(held, memoryview) else held.tobytes()) == before


@pytest.mark.parametrize(
    "other",
    [np.zeros(3), np.zeros((4, 3)), np.zeros((3, 4), order="F"), np.zeros((3, 4), np.int64)],
)
def test_an_array_of_another_layout_gets_memory_of_its_own(other: Array) -> None:
    live: dict[str, Any] = {"x": np.ones((3, 4))}
    program = ProgramState(live)
    program.capture()
    live["x"] = other
    captured = program.capture()
    assert captured.arrays["x"].tobytes() == other.tobytes()
    assert captured.arrays["x"].shape == other.shape
    assert captured.arrays["x"].dtype == other.dtype
    assert captured.arrays["x"].flags.c_contiguous == other.flags.c_contiguous
    assert not np.shares_memory(captured.arrays["x"], other)
