"""Small states, the bytes of their checkpoints, and the reason of a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepctl.checkpoint import codec
from stepctl.errors import CheckpointError
from stepctl.state.arena import Arena, Array
from stepctl.state.counters import Counters
from stepctl.state.train_state import SavedHook, TrainState
from tests.support.runs import RUN_ID, file_bytes

STEP = 7
NAME = "step-00000007.h5"


def small_state() -> TrainState:
    """The smallest state that an update can move."""
    params = Arena({"weight": (2,)}, "float32")
    params["weight"][:] = 1, -2
    counters = Counters({"global_step": STEP, "samples_seen": 3 * STEP, "model": STEP})
    return TrainState(counters, {"params": params})


def odd_values(dtype: str) -> Array:
    whole = "uint32" if dtype == "float32" else "uint64"
    payload = np.array([0x7FC12345 if dtype == "float32" else 0x7FF8_0000_DEAD_BEEF], whole).view(
        dtype
    )[0]
    tiny = np.finfo(dtype).smallest_subnormal
    return np.array([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan, -np.nan, payload, tiny, -tiny], dtype)


def full_state(dtype: str = "float32", seed: int = 0, step: int = STEP) -> TrainState:
    """A state with all that the format can hold; the values depend on `seed`."""
    shapes = {
        "odd": (10,),
        "dense0/weight": (3, 5),
        "dense0/bias": (5,),
        "scalar": (),
        "empty": (0,),
        "hollow": (3, 0),
    }
    generator = np.random.default_rng(seed)
    params = Arena(shapes, dtype)
    mean = Arena({"norm/mean": (4,), "norm/count": ()}, dtype)
    slots = {
        f"optimizers/{name}/{slot}": params.like()
        for name in ("critic", "generator")
        for slot in ("m", "v")
    }
    arenas = {"params": params, **slots, "ema": params.like()}
    for arena in (mean, *arenas.values()):
        for view in arena.values():
            view[...] = generator.normal(size=view.shape)
    params["odd"][:] = odd_values(dtype) if seed == 0 else 0
    hooks = [
        SavedHook("best", {"loss": np.array(generator.normal()), "step": np.array(2**62 + seed)}),
        SavedHook(
            "seen",
            {"bits": generator.integers(0, 256, (2, 3), np.uint8), "sum": generator.normal(size=3)},
        ),
    ]
    numbers = {
        "global_step": step,
        "samples_seen": 2**63 - 1 - seed,
        "critic": 5 * step,
        "generator": step,
    }
    return TrainState(Counters(numbers), arenas, mean, hooks)


def encoded(state: TrainState) -> bytes:
    return file_bytes(
        codec.encode(
            state, run="moon", run_id=RUN_ID, config="seed: 0  # é\n", numerics='{"threads": 1}'
        )
    )


def written(folder: Path, state: TrainState, name: str = NAME) -> Path:
    path = folder / name
    path.write_bytes(encoded(state))
    return path


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught, codec.Reader(path):
        pass
    assert path.name in str(caught.value)
    return caught.value
