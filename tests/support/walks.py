"""A random walk as a program, and programs that break the protocol."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

import stepctl
from stepctl import File
from stepctl.state.streams import Streams
from tests.support.program_states import Emulator

BROKEN_AT = 3  # completed steps before the step that `wrong` breaks


class Walk(stepctl.Program):
    """A walk with an evaluation. `built` and `closed` count the instances of all its classes."""

    built: ClassVar[int] = 0
    closed: ClassVar[int] = 0

    def __init__(
        self,
        *,
        scale: float = 1.0,
        table: File | None = None,
        tables: list[File] | None = None,
    ) -> None:
        Walk.built += 1
        self.scale = scale
        self.seed = 5
        self.n_tables = len(tables or ()) + (table is not None)

    def initial_state(self, rng: Streams) -> dict[str, Any]:
        return {
            "x": rng("start").standard_normal(3),
            "chain": np.zeros((0, 3)),
            "rng": np.random.default_rng(self.seed),
            "norms": [],
            "emulator": Emulator(),
        }

    def step(self, state: dict[str, Any], step: int, rng: Streams) -> Any:
        noise = rng("noise")
        assert rng("noise") is noise
        state["x"] += self.scale * noise.standard_normal(3) + state["rng"].random(3)
        state["chain"] = np.concatenate([state["chain"], state["x"][np.newaxis]])
        norm = np.linalg.norm(state["x"])
        state["norms"].append(norm)
        state["emulator"].names.append(f"step {step}")
        return {"norm": norm, "left": 10.0 - step}

    def evaluate(self, state: dict[str, Any], rng: Streams) -> Any:
        return {"distance": abs(state["x"].sum() - rng("target").random())}

    def close(self) -> None:
        Walk.closed += 1


class Plain(stepctl.Program):
    """A program that counts, and cannot evaluate."""

    def initial_state(self, rng: Streams) -> dict[str, Any]:
        return {"n": 0}

    def step(self, state: dict[str, Any], step: int, rng: Streams) -> Any:
        state["n"] += 1
        return None


def _fail() -> None:
    raise ValueError("the matrix is singular")


def _interrupt() -> None:
    raise KeyboardInterrupt


ERRORS: dict[str, Callable[[], object]] = {
    "error": _fail,
    "library": lambda: np.linalg.inv(np.zeros((2, 2))),
    "exit": lambda: sys.exit(3),
    "empty": lambda: sys.exit(),
    "interrupt": _interrupt,
    "config": lambda: Streams(0, "x").normal,
}
RETURNED: dict[str, Any] = {
    "list": [1.0],
    "text": {"norm": "1"},
    "array": {"norm": np.zeros(3)},
    "name": {3: 1.0},
    "row key": {"step": 1.0},
    "tuple": (1.0, 2.0, 3.0),
}
DRAWN: dict[str, Callable[[], Any]] = {
    "numpy": lambda: np.random.random(3),  # noqa: NPY002
    "python": random.random,
    "entropy": lambda: float(np.frombuffer(os.urandom(4), np.uint8).sum()),
}
INITIAL: dict[str, Callable[[Streams], Any]] = {
    "list": lambda rng: [1],
    "none": lambda rng: None,
    "key": lambda rng: {3: 1},
    "set": lambda rng: {"x": {1}},
    "stream": lambda rng: {"x": rng("x")},
    "normal": lambda rng: {"x": rng.normal(3)},
    "error": lambda rng: _fail(),
    "exit": lambda rng: sys.exit(),
}


class Broken(Walk):
    """Breaks the protocol in the way that `wrong` names."""

    def __init__(self, *, wrong: str, at: int = BROKEN_AT, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.place, _, self.case = wrong.partition(":")
        self.at = at
        if self.place == "constructor":
            _fail()

    def initial_state(self, rng: Streams) -> Any:
        if self.place == "initial":
            return INITIAL[self.case](rng)
        return super().initial_state(rng)

    def step(self, state: dict[str, Any], step: int, rng: Streams) -> Any:
        metrics = super().step(state, step, rng)
        if step >= self.at and self.place == "step":
            ERRORS[self.case]()
        if step >= self.at and self.place == "returned":
            return RETURNED[self.case]
        if self.place == "drawn":
            state["x"] += DRAWN[self.case]()
        return metrics

    def evaluate(self, state: dict[str, Any], rng: Streams) -> Any:
        if self.place == "evaluate":
            if self.case == "array":
                state["x"][1] += 1
            elif self.case == "value":
                state["norms"].append(1.0)
            elif self.case == "generator":
                state["rng"].random()
            elif self.case == "none":
                return None
            elif self.case == "error":
                _fail()
        return super().evaluate(state, rng)


class Keeping(Plain):
    """Keeps the generator of a step, or of the initial state."""

    def __init__(self, *, initial: bool = False) -> None:
        self.initial = initial
        self.kept: Any = None

    def initial_state(self, rng: Streams) -> dict[str, Any]:
        if self.initial:
            self.kept = rng("x")
        return {"drawn": np.zeros(0)}

    def step(self, state: dict[str, Any], step: int, rng: Streams) -> Any:
        if self.kept is None:
            self.kept = rng("x")
        state["drawn"] = np.append(state["drawn"], self.kept.random())
        return None


class Reserved(Plain):
    """Has an argument that the run passes to models."""

    def __init__(self, *, dtype: str = "float32") -> None:
        self.dtype = dtype


class NoStep(stepctl.Program):
    """Lacks its step."""

    def initial_state(self, rng: Streams) -> dict[str, Any]:
        return {}
