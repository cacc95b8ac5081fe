"""The writers that a config asks for beside metrics.jsonl."""

from __future__ import annotations

from stepctl.config import Log as LogConfig
from stepctl.rundir import RunDirectory
from stepctl.writers import tensorboard
from stepctl.writers.base import Writer
from stepctl.writers.csv import CSV
from stepctl.writers.tensorboard import TensorBoard


def check(config: LogConfig) -> None:
    """Raise ConfigError if a package that they need is missing."""
    if config.tensorboard:
        tensorboard.load()


def open_beside(
    directory: RunDirectory, config: LogConfig, *, segment: int, start: int, batch_size: int
) -> list[Writer]:
    """Open them for a segment that starts at the global step `start`; metrics.jsonl must end there."""
    writers: list[Writer] = []
    if config.csv:
        writers.append(CSV(directory))
    if config.tensorboard:
        folder = directory.folder.subfolder(directory.tensorboard.name)
        writers.append(TensorBoard(folder, segment=segment, start=start, batch_size=batch_size))
    return writers
