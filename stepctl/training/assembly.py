"""The parts of a run, built from its config: data, task, hooks and state."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stepctl.config.model import Config, TaskConfig
from stepctl.data.base import Source, check_labels, check_rows, label_warnings
from stepctl.data.batches import Batch, Batches, EvaluationBatches, TrainingBatches
from stepctl.data.integers import RoundedIntegers
from stepctl.distributed.comm import Comm
from stepctl.errors import NonFiniteError
from stepctl.hooks.base import Hook
from stepctl.hooks.stop_request import HookStop
from stepctl.hooks.watch import Best, EarlyStopping, MetricWatch, TargetMetric
from stepctl.programs.base import Task
from stepctl.state.arena import Array
from stepctl.state.program_state import SavedProgramState
from stepctl.state.read_only import explain_read_only
from stepctl.state.train_state import SavedHook, TrainState
from stepctl.stopping.base import StopRule
from stepctl.stopping.signals import default_signal_actions
from stepctl.system.blas import Numerics
from stepctl.training.checks import metric_and_mode
from stepctl.writers.row_buffer import RowBuffer
from stepctl.writers.series import SeriesBuffer


@dataclass(frozen=True)
class Assembly(ABC):
    """The parts of a run. `config` has no open value; `rows` collects the hooks' metrics rows,
    `series` the rows that a program appends.

    `validation` is None if nothing can be evaluated.
    """

    config: Config
    numerics: Numerics
    task: Task
    training: Batches
    validation: Iterable[Batch] | None
    rows: RowBuffer
    watches: list[MetricWatch]
    hooks: list[Hook]
    state: TrainState
    comm: Comm
    series: SeriesBuffer
    hook_stop: HookStop

    @abstractmethod
    def trial(self) -> None:
        """Compute the first step without applying it; ConfigError if a part breaks its protocol."""

    @abstractmethod
    def check_data(self, say: Callable[[str], None]) -> None:
        """Read all data once; warn about suspect labels and sizes. DataError if invalid."""

    @property
    def data_section(self) -> str:
        """The section of the config that names the data."""
        return "data"

    @property
    @abstractmethod
    def origins(self) -> str:
        """The origins of the data, for messages."""

    @abstractmethod
    def data_fingerprint(self) -> str:
        """Return a text that changes when the data do; only the first call reads them."""

    @abstractmethod
    def has_data(self, fingerprint: str) -> bool:
        """Tell whether a fingerprint, recorded by this or an earlier version, is the data's."""

    def stop_rules(self) -> list[StopRule]:
        """Return the stop rules that depend on metrics or hooks."""
        watches = [
            watch
            for watch in self.watches
            if isinstance(watch, EarlyStopping | TargetMetric) and watch.in_use
        ]
        return [*watches, self.hook_stop]

    def reset_changed_watches(self, before: Config) -> list[str]:
        """Reset the watches whose criterion differs from the config `before`; return their names.

        Watches that the config does not use are reset too, and not named. A stop is reset if the hook
        that requested it was changed or removed.
        """
        known = {}
        if before.program_name == self.config.program_name:
            known = {watch.name: watch.criterion for watch in build_watches(before, self.task)}
        changed = [watch for watch in self.watches if known.get(watch.name) != watch.criterion]
        for watch in changed:
            watch.reset()
        names = [watch.name for watch in changed if watch.in_use]
        if self.hook_stop.is_obsolete(before, self.config):
            self.hook_stop.reset()
            names.append(self.hook_stop.name)
        return names

    def count_at(self, counter: str, step: int) -> int:
        """Return the value of a counter at a global step of a run that skips no batch."""
        initial_step = self.config.initial_step
        return self.task.count_at(
            counter,
            step - initial_step,
            initial_step=initial_step,
            batch_size=self.training.samples // self.task.batches_per_step,
        )

    def close(self) -> None:
        """Release the resources of the task."""
        self.task.close()


@dataclass(frozen=True)
class TaskAssembly(Assembly):
    """The parts of a run that trains models on data."""

    config: TaskConfig
    training: TrainingBatches
    validation: EvaluationBatches | None
    sources: list[Source]

    @np.errstate(all="ignore")
    def trial(self) -> None:
        # whether a non-finite loss stops the run is decided by the first step
        with contextlib.suppress(NonFiniteError), explain_read_only(self.state):
            batch = self.training.batch(self.state.counters.samples_seen)
            n_classes = self.config.data.n_classes
            if n_classes is not None:  # a source may return other labels than it was counted with
                where = f"{self.sources[0].origin}: the first batch"
                check_labels(where, 0, batch.y, n_classes)
            self.task.trial(self.state, batch)

    def check_data(self, say: Callable[[str], None]) -> None:
        n_classes = self.config.data.n_classes
        occurring = []
        rounding: list[str] = []
        with default_signal_actions(is_rank=self.comm.rank > 0):
            for source in self.sources:
                if type(source).check is not Source.check:  # the default is check_rows
                    source.check(n_classes)
                rounded = RoundedIntegers(self.training.x_dtype, self.training.y_dtype)
                occurring.append(check_rows(source, n_classes, rounded))
                rounding += [*source.warnings(), *rounded.warnings()]
        for warning in [*self._data_warnings(occurring), *rounding]:
            say(f"warning: {warning}")

    def _data_warnings(self, occurring: list[npt.NDArray[np.bool_]]) -> Iterator[str]:
        config = self.config.data
        if config.n_classes is not None and self.task.learns_labels:
            yield from label_warnings(self.sources, occurring, config.class_names)
        if len(self.sources) == 2:
            # the joined fingerprint "<training>; <validation>" is computed anyway, for the ledger
            fingerprints = self.data_fingerprint()
            half = fingerprints[: len(fingerprints) // 2 - 1]
            if fingerprints == f"{half}; {half}":
                origin = self.sources[1].origin
                yield f"{origin}: the validation data are the training data; use other files"
        n = self.training.subset.n
        if config.batch_size > n:
            yield (
                f"data.batch_size: {config.batch_size} is more than the {n} training rows, so a "
                "batch repeats some; lower it"
            )

    @property
    def origins(self) -> str:
        return ", ".join(source.origin for source in self.sources)

    def data_fingerprint(self) -> str:
        return self._data_fingerprint

    @cached_property
    def _data_fingerprint(self) -> str:
        with default_signal_actions(is_rank=self.comm.rank > 0):
            return "; ".join(source.fingerprint() for source in self.sources)

    def has_data(self, fingerprint: str) -> bool:
        if fingerprint == self.data_fingerprint():
            return True
        with default_signal_actions(is_rank=self.comm.rank > 0):
            return fingerprint == "; ".join(source.former_fingerprint() for source in self.sources)


def with_stored_hooks(
    assembly: Assembly, shapes: Mapping[str, tuple[tuple[int, ...], str]]
) -> Assembly:
    """Add the hooks whose arrays a checkpoint holds, if the run is opened without its program.

    `shapes` are the shapes and dtypes of its arrays. The hooks keep their arrays as they are.
    """
    if not isinstance(assembly.state.program, SavedProgramState):
        return assembly
    known = {hook.name for hook in assembly.state.hooks}
    arrays: dict[str, dict[str, Array]] = {}
    for path, (shape, dtype) in shapes.items():
        folder, _, rest = path.partition("/")
        name, _, key = rest.partition("/")
        if folder == "hooks" and name not in known:
            arrays.setdefault(name, {})[key] = np.zeros(shape, dtype)
    stored = [SavedHook(name, found) for name, found in arrays.items()]
    state = replace(assembly.state, hooks=(*assembly.state.hooks, *stored))
    return replace(assembly, state=state)


def build_watches(config: Config, task: Task) -> list[MetricWatch]:
    """Return the watches; those that the config does not ask for only record."""
    early = config.stop.early_stopping
    target = config.stop.target_metric
    evaluations = config.evaluate.cadence()
    return [
        Best(*metric_and_mode(config, task, "evaluate", config.evaluate)),
        EarlyStopping(
            *metric_and_mode(config, task, "stop.early_stopping", early), early, evaluations
        ),
        TargetMetric(
            *metric_and_mode(config, task, "stop.target_metric", target), target, evaluations
        ),
    ]
