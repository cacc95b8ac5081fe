"""States of programs that hold every kind of value, and their comparison to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepctl.state.arena import Array
from stepctl.state.counters import Counters
from stepctl.state.generators import BIT_GENERATORS, encode_state
from stepctl.state.program_state import ProgramState
from stepctl.state.train_state import TrainState
from stepctl.state.values import DTYPES
from tests.support.checkpoints import STEP


class Emulator:
    """An object with a state of its own."""

    def __init__(self) -> None:
        self.memory = np.zeros(4, np.uint8)
        self.names: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory, "names": list(self.names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"]
        self.names = state["names"]


def with_bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Return an array of random bits: NaNs with payloads, infinities and denormals among them."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape))
    data = np.random.default_rng(seed).integers(0, 256, size * kind.itemsize, np.uint8)
    if dtype == "bool":
        data &= 1
    return data.view(kind).reshape(shape)


def full_program() -> dict[str, Any]:
    """A state with all that a program's may hold."""
    emulator = Emulator()
    emulator.memory[:] = 1, 2, 3, 255
    emulator.names.append("é")
    generator = np.random.default_rng(5)
    generator.spawn(3)
    legacy = np.random.RandomState(7)
    legacy.normal()
    return {
        "arrays": {dtype: with_bits(dtype, (3, 4)) for dtype in sorted(DTYPES)},
        "θ": np.arange(4, dtype=np.int16),
        "a key, with spaces": [np.float32(0.1), np.zeros(()), {"$x": np.ones((2, 0, 3))}],
        "by columns": np.asfortranarray(with_bits("float64", (5, 3))),
        "cube": np.asfortranarray(with_bits("complex64", (2, 3, 4))),
        "accepted": 3,
        "large": -(10**40),
        "nan": (float("nan"), -float("inf"), -0.0, complex(1, float("nan"))),
        "text": "é \x1b[2J\n",
        "bytes": bytes(range(256)),
        "none": [None, True, False, (), [], {}],
        "scalars": [np.bool_(True), np.uint64(2**64 - 1), np.complex64(1 + 2j), np.float16(0.1)],
        "rng": generator,
        "generators": [np.random.Generator(kind(1)) for kind in BIT_GENERATORS.values()],
        "legacy": legacy,
        "emulator": emulator,
    }


def empty_program() -> dict[str, Any]:
    """A state with the keys and the objects of `full_program`, and nothing else."""
    return dict.fromkeys(full_program()) | {"emulator": Emulator()}


def program_state(live: dict[str, Any], step: int = STEP) -> TrainState:
    """The state of a program that made `step` steps."""
    counters = Counters({"global_step": step, "samples_seen": 0})
    return TrainState(counters, {}, program=ProgramState(live))


def same_values(one: Any, other: Any) -> bool:
    """Return whether two values are equal in type, structure, memory order and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        layout = (one.shape, one.dtype, one.flags.c_contiguous, one.flags.f_contiguous)
        other_layout = (
            other.shape,
            other.dtype,
            other.flags.c_contiguous,
            other.flags.f_contiguous,
        )
        return bool(layout == other_layout and one.tobytes() == other.tobytes())
    if isinstance(one, np.generic):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_values, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, np.random.Generator):
        return _drawn(one) == _drawn(other)
    if isinstance(one, np.random.RandomState):
        state = encode_state(one.get_state(legacy=False))
        return bool(state == encode_state(other.get_state(legacy=False)))
    if isinstance(one, Emulator):
        return same_values(one.state_dict(), other.state_dict())
    if isinstance(one, float | complex):
        return np.array(one).tobytes() == np.array(other).tobytes()
    return bool(one == other)


def _drawn(generator: np.random.Generator) -> list[Any]:
    """Return the state of a generator, and what its next child would draw."""
    seed: Any = generator.bit_generator.seed_seq
    child = np.random.SeedSequence(
        seed.entropy,
        spawn_key=(*seed.spawn_key, seed.n_children_spawned),
        pool_size=seed.pool_size,
    )
    return [encode_state(generator.bit_generator.state), child.generate_state(4).tolist()]


# --- what hostile files are made of


def small_program() -> dict[str, Any]:
    """A small state with a value of each kind."""
    emulator = Emulator()
    emulator.memory[:] = 1, 2, 3, 4
    spawned = np.random.default_rng(2)
    spawned.spawn(1)
    return {
        "x": np.array([1, -2], np.float32),
        "y": np.array([3, 4], np.float32),
        "flags": np.array([True, False]),
        "θ": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "longer": np.arange(3),
        "real": np.arange(2.0),
        "ordered": np.ones((2, 2)),
        "read-only": np.ones(2),
        "n": 3,
        "large": 1 << 70,
        "nan": float("nan"),
        "z": 1 + 2j,
        "pair": (1.5, "text"),
        "$": {"a": [None, b"x"]},
        "scalar": np.float32(0.1),
        "flag": np.bool_(True),
        "mt": np.random.Generator(np.random.MT19937(1)),
        "philox": np.random.Generator(np.random.Philox(1)),
        "spawned": spawned,
        "legacy": np.random.RandomState(3),
        "emulator": emulator,
    }


def fresh_program() -> dict[str, Any]:
    """A state that `small_program` is restored into; some values cannot be filled in place."""
    read_only = np.zeros(2)
    read_only.flags.writeable = False
    differing = {
        "x": np.zeros(2, np.float32),
        "longer": np.zeros(1, int),
        "real": np.zeros(2, np.int64),
        "ordered": np.zeros((2, 2), order="F"),
        "read-only": read_only,
        "mt": np.random.Generator(np.random.PCG64(1)),
        "philox": np.random.Generator(np.random.Philox(2)),
        "spawned": np.random.default_rng(2),
        "emulator": Emulator(),
    }
    return dict.fromkeys(small_program()) | differing
