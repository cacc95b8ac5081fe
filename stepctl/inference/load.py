"""Loading a trained model from a run, or from a checkpoint file alone.

The config in the checkpoint describes the model, so no run directory and no data are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepctl.checkpoint import codec
from stepctl.checkpoint.store import open_file
from stepctl.config import yaml
from stepctl.config.messages import KeyPath
from stepctl.config.model import TaskConfig, parse_config
from stepctl.data.base import Source, Sources
from stepctl.data.preprocessing import Preprocessing
from stepctl.errors import ConfigError
from stepctl.inference.trained_model import TrainedModel
from stepctl.programs.learner import MODEL
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import open_checkpoint
from stepctl.runs.messages import Say, silent
from stepctl.runs.records import RunRecords, read_records
from stepctl.state.arena import Array, Shape
from stepctl.system import files, shell
from stepctl.training.build import initial_state
from stepctl.training.resolve import ResolvedConfig, resolve

_OF_THE_MODEL = ("seed", "dtype", "initial_step", "model", "task", "ema", "numerics")
NO_SPLIT = {"validation_fraction": 0.0, "stratify": False}
_NO_OPTIMIZER = {"name": "sgd", "learning_rate": 0.0}  # which has no slots


@dataclass(frozen=True)
class Selection:
    """Which weights to use.

    `step`: of this step; by default the newest good checkpoint's. `best`: those of the best
    checkpoint that `checkpoint.keep_best` keeps. `average`: their moving average. `imports` are the
    import paths of your own model, task or data source that a checkpoint file outside of its run
    may name.
    """

    step: int | None = None
    best: bool = False
    average: bool = False
    imports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.best and self.step is not None:
            raise ConfigError("best and step: give one")


class OpenedCheckpoint(NamedTuple):
    """An open checkpoint, its config as plain values, and the records of its run, if known.

    Nothing that a checkpoint file names is imported unless the config of its run names it too, or
    the user did: the file may come from elsewhere.
    """

    reader: codec.Reader
    config: dict[str, Any]
    records: RunRecords | None
    allowed: Set[str]  # import paths of a user's components that may be imported
    origin: str  # its run or its file, for messages


NEWEST = Selection()


def load_model(path: str, selection: Selection = NEWEST, say: Say = silent) -> TrainedModel:
    """Load the model of a run or of a checkpoint file.

    Of a run the weights are selected; a file has one step. ConfigError if the checkpoint has no
    model, or names code of your own that `selection` does not allow; CheckpointError if it is
    refused.
    """
    with open_selected(path, selection, say) as opened:
        resolved = _resolve_without_data(opened)
        return restore_model(opened, resolved, average=selection.average)


@contextlib.contextmanager
def open_selected(path: str, selection: Selection, say: Say) -> Iterator[OpenedCheckpoint]:
    """Open the selected checkpoint of a run, or a checkpoint file."""
    records = None
    allowed = {*selection.imports}
    if files.is_directory(path):
        records = read_records(RunDirectory(path))
        allowed |= import_paths(records.document.value)
        reader = open_checkpoint(records, step=selection.step, best=selection.best, say=say)
    else:
        if selection.best or selection.step is not None:
            raise ConfigError(
                f"{path}: is a file, so its step is given; name the run to select one"
            )
        reader = open_file(path)
    with reader:
        config = yaml.loads(reader.header.config, f"{reader.name}:/config").value
        yield OpenedCheckpoint(reader, config, records, allowed, path)


def refuse_imports(opened: OpenedCheckpoint, plain: Mapping[str, Any]) -> None:
    """Raise ConfigError if a config names a component that may not be imported."""
    for name in sorted(import_paths(plain) - opened.allowed):
        option = shell.options("--import", name)
        raise ConfigError(
            f"{opened.origin}: its config names {name}, which is not part of stepctl; if you trust "
            f"the source of the file, allow it with {option}"
        )


def import_paths(value: object) -> set[str]:
    """Return the import paths of a user's own components, anywhere in a config."""
    if isinstance(value, list):
        return set().union(*map(import_paths, value))
    if not isinstance(value, dict):
        return set()
    found = set().union(*map(import_paths, value.values()))
    name = value.get("name")
    if isinstance(name, str) and ":" in name:
        found.add(name)
    return found


def refuse_program(opened: OpenedCheckpoint) -> None:
    """Raise ConfigError if a checkpoint holds the state of a program or a script."""
    if opened.reader.header.values is None:
        return
    kind = "script" if "script" in opened.config else "program"
    raise ConfigError(
        f"{opened.origin}: is of a {kind}, which has no model; read its state with "
        "stepctl.load_checkpoint"
    )


def model_config(
    opened: OpenedCheckpoint,
    data: Mapping[str, Any],
    *,
    unchecked: Collection[str] = (),
    places: Mapping[KeyPath, str] = MappingProxyType({}),
) -> TaskConfig:
    """Return a checkpoint's config with other `data`, and without what only training needs.

    `places` are those of keys that do not come from the checkpoint.
    """
    refuse_program(opened)
    plain = {key: opened.config[key] for key in _OF_THE_MODEL if key in opened.config}
    models = plain.get("model")
    optimizer: dict[str, Any] = _NO_OPTIMIZER
    if isinstance(models, dict) and "name" not in models:
        optimizer = dict.fromkeys(models, _NO_OPTIMIZER)
    first = plain.get("initial_step", 0)
    plain |= {"data": dict(data), "optimizer": optimizer, "stop": {"last_step": first}}
    refuse_imports(opened, {key: plain[key] for key in plain if key not in unchecked})
    document = yaml.Document(plain, {(): f"{opened.reader.name}:/config", **places})
    config = parse_config(document, unchecked=unchecked)
    assert isinstance(config, TaskConfig)
    return config


def _resolve_without_data(opened: OpenedCheckpoint) -> ResolvedConfig:
    """Build the model from the shapes that the config records; read the data if it has none."""
    data = opened.config.get("data")
    is_recorded = isinstance(data, dict) and data.get("sample_shape") is not None
    if not isinstance(data, dict) or not is_recorded:
        # written by stepctl 0.2 or earlier, or not a task's
        return resolve_model(model_config(opened, data if isinstance(data, dict) else {}))
    config = model_config(opened, data | NO_SPLIT, unchecked=("data",))
    assert config.data.sample_shape is not None
    preprocessing = Preprocessing(config.data, dtype=config.dtype)
    source = _NoRows(config, preprocessing.arrays)
    return resolve_model(config, Sources(source))


def resolve_model(config: TaskConfig, sources: Sources | None = None) -> ResolvedConfig:
    """Build the components of a config; ConfigError if they do not fit."""
    try:
        return resolve(config, target=config.initial_step, sources=sources)
    except (MemoryError, OverflowError) as error:
        raise ConfigError(f"the model or its data do not fit in memory ({error})") from error


def restore_model(
    opened: OpenedCheckpoint, resolved: ResolvedConfig, *, average: bool
) -> TrainedModel:
    """Read the weights of a checkpoint; CheckpointError if they do not fit the config."""
    expected = {}
    for name, model in resolved.models.items():
        folder = "params" if name == MODEL else f"params/{name}"
        for path, shape in model.parameter_shapes().items():
            expected[f"{folder}/{path}"] = (shape, resolved.config.dtype)
    # before memory is allocated: the sizes in a hostile config are only claims
    codec.refuse_other_arrays(opened.reader, ["params"], expected)
    state = initial_state(resolved, restored=True)
    codec.restore_arenas(opened.reader, state)
    return TrainedModel(
        resolved.task,
        state,
        resolved.config,
        config=opened.config,
        origin=opened.origin,
        threads=resolved.numerics["threads"],
        average=average,
    )


class _NoRows(Source):
    """Stands for the data that a config describes."""

    n = 1

    def __init__(self, config: TaskConfig, statistics: Mapping[str, Array]) -> None:
        """statistics: restored in place with the model."""
        self._statistics = statistics
        self.origin = "the data of the run"
        self.sample_shape: Shape = tuple(config.data.sample_shape or ())
        self.target_shape: Shape = tuple(config.data.target_shape or ())

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        raise NotImplementedError

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        return iter(())

    def preprocessing_arrays(self) -> Mapping[str, Array]:
        return self._statistics

    def fingerprint(self) -> str:
        return ""
