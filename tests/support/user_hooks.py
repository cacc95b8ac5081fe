"""A user's hooks; configs name them by their import path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

import stepctl
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState


class Smoothed(stepctl.Hook):
    """A hook whose state depends on a metric, or on all, of every step; it stops the run at `last`."""

    name = "smoothed"

    def __init__(self, *, metric: str | None = "loss", decay: float = 0.9, last: int | None = None):
        assert os.environ.get("PMI_RANK", "0") == "0", "only rank 0 has hooks"
        self._metric = metric
        self._decay = decay
        self._last = last
        self.value = np.zeros(2)

    def state(self) -> Mapping[str, Array]:
        return {"value": self.value}

    def after_step(self, state: TrainState, metrics: Metrics) -> str | None:
        step = state.counters.global_step
        measured = sum(metrics.values()) if self._metric is None else metrics[self._metric]
        self.value *= self._decay
        self.value += [measured, step]
        return "smooth enough" if step == self._last else None


class Lines(stepctl.Hook):
    """A hook without state: appends the step to a file, and stops the run at the step `last`."""

    def __init__(self, *, file: stepctl.File, last: int | None = None, label: str = "lines"):
        self.name = label
        self._file = file
        self._last = last

    def after_step(self, state: TrainState, metrics: Metrics) -> str | None:
        step = state.counters.global_step
        with open(self._file, "a") as file:
            file.write(f"{step}\n")
        return "enough lines" if step == self._last else None


class Returns(stepctl.Hook):
    """Returns a value that is no reason."""

    name = "returns"

    def __init__(self, *, value: Any):
        self._value = value

    def after_step(self, state: TrainState, metrics: Metrics) -> Any:
        return self._value


class Refuses(stepctl.Hook):
    """Accepts no limit below zero."""

    name = "refuses"

    def __init__(self, *, limit: float):
        if limit < 0:
            raise ValueError(f"limit {limit} is negative")


class Nameless(stepctl.Hook):
    """A hook without a name."""


class Named(stepctl.Hook):
    """Has an argument of the name that the import path has."""

    def __init__(self, *, name: str):
        self.name = name


class Shaped(stepctl.Hook):
    """Has an argument that the run passes to models."""

    name = "shaped"

    def __init__(self, *, input_shape: int):
        pass


def make_lines(*, file: stepctl.File) -> stepctl.Hook:
    """Return a hook; what kind of hook it is cannot be told without the call."""
    return Lines(file=file)


def make_stateless(*, file: stepctl.File) -> Lines:
    """Return a hook without state."""
    return Lines(file=file)


def make_other(*, file: stepctl.File) -> Any:
    """Return no hook."""
    return file
