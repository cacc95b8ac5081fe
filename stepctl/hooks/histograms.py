"""Histograms of the parameters in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from stepctl.config.cadence import Cadence
from stepctl.config.model import LogConfig
from stepctl.hooks.base import Hook, PeriodicHook
from stepctl.programs.base import Metrics
from stepctl.state.train_state import TrainState
from stepctl.writers.base import Writer
from stepctl.writers.tensorboard import TensorBoard

_FOLDER = "params/"


class Histograms(PeriodicHook):
    """Writes a histogram of each parameter array at the steps that `every` divides."""

    name = "histograms"

    def __init__(self, every: int, writer: TensorBoard) -> None:
        super().__init__(Cadence(every))
        self._writer = writer

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        params = {
            path.removeprefix(_FOLDER): array
            for path, array in state.arrays().items()
            if path.startswith(_FOLDER)
        }
        self._writer.write_histograms(state.counters.global_step, params)


def histogram_hooks(config: LogConfig, writers: Sequence[Writer]) -> list[Hook]:
    """Return the hook that the config enables, or none."""
    if config.histograms is None:
        return []
    boards = [writer for writer in writers if isinstance(writer, TensorBoard)]
    return [Histograms(config.histograms, board) for board in boards]
