"""A program of a few bytes with two series: one with a row for each step, one for every second."""

from __future__ import annotations

from typing import Any

import numpy as np

import stepctl


class Sampler(stepctl.Program):
    """One step appends a sample."""

    def initial_state(self, rng: Any) -> dict[str, Any]:
        return {"x": np.zeros(3)}

    def step(self, state: dict[str, Any], step: int, rng: Any) -> Any:
        state["x"] += rng("walk").standard_normal(3)
        series = {"samples": state["x"]}
        if step % 2:
            series["odd"] = np.int64(step)
        return {"x": state["x"][0]}, series
