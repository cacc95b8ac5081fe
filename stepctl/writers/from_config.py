"""The optional writers that the `log` section of a config enables."""

from stepctl.config.model import LogConfig
from stepctl.rundir.directory import RunDirectory
from stepctl.writers import tensorboard
from stepctl.writers.base import Writer
from stepctl.writers.csv import CSV
from stepctl.writers.tensorboard import TensorBoard


def check_packages(config: LogConfig) -> None:
    """Raise ConfigError if a package that an enabled writer needs is not installed."""
    if config.tensorboard:
        tensorboard.load()


def open_writers(
    directory: RunDirectory, config: LogConfig, *, segment: int, start: int, batch_size: int
) -> list[Writer]:
    """Open the enabled writers for a segment from step `start`, where metrics.jsonl must end."""
    writers: list[Writer] = []
    if config.csv:
        writers.append(CSV(directory))
    if config.tensorboard:
        folder = directory.folder.subfolder(directory.tensorboard.name)
        writers.append(TensorBoard(folder, segment=segment, start=start, batch_size=batch_size))
    return writers
