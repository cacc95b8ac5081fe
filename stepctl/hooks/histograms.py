"""Histograms of the parameters for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from stepctl.config import Log as LogConfig
from stepctl.hooks.base import Hook
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics
from stepctl.writers.base import Writer
from stepctl.writers.tensorboard import TensorBoard

_PARAMS = "params/"  # what their paths begin with


class Histograms(Hook):
    """Writes the histogram of every parameter array where `every` divides the step."""

    name = "histograms"

    def __init__(self, every: int, writer: TensorBoard) -> None:
        self._every, self._writer = every, writer

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        step = state.counters.global_step
        if step % self._every == 0:
            arrays = state.arrays().items()
            params = {path.removeprefix(_PARAMS): array for path, array in arrays if path.startswith(_PARAMS)}
            self._writer.histograms(step, params)


def histograms_of(config: LogConfig, writers: Sequence[Writer]) -> list[Hook]:
    """Return the hook that a config asks for, if it does."""
    if config.histograms is None:
        return []
    return [Histograms(config.histograms, writer) for writer in writers if isinstance(writer, TensorBoard)]
