"""From a config to everything that training needs: the one assembly that a fresh run and a resume share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np

from stepctl import config as configs
from stepctl import numerics, registry, yamlio
from stepctl.checkpoint import codec
from stepctl.config import Config
from stepctl.data.base import Source, Targets, count_classes
from stepctl.data.batches import EvaluationBatches, Part, TrainingBatches, split_parts
from stepctl.errors import ConfigError, StepctlError
from stepctl.hooks.base import Hook
from stepctl.models.base import Model
from stepctl.optimizers.base import Optimizer
from stepctl.problems import in_one_line, reason
from stepctl.state import TrainState
from stepctl.tasks.base import Task


@dataclass
class Assembly:
    """Everything that training needs, built from a config alone."""

    config: Config  # with what the data and this machine decided written in
    numerics: dict[str, Any]
    task: Task
    sources: list[Source]
    training: TrainingBatches
    validation: EvaluationBatches | None
    hooks: list[Hook]
    state: TrainState

    @np.errstate(all="ignore")
    def trial(self) -> None:
        """Try the first step without taking it, so that a model that breaks its protocol is refused before it."""
        self.task.trial(self.state, self.training.batch(self.state.counters.samples_seen))

    def check_data(self) -> None:
        """Look through all data once; DataError if they are not what the task can learn from."""
        for source in self.sources:
            source.check(self.config.data.n_classes)

    def data_fingerprint(self) -> str:
        """Return a text that changes when the data do."""
        return "; ".join(source.fingerprint() for source in self.sources)


def assemble(config: Config, hooks: Sequence[Hook] = ()) -> Assembly:
    """Build data, model, optimizer, task and initial state. ConfigError or DataError if they do not fit.

    `hooks` are the caller's own; what they remember becomes part of the state.
    """
    try:
        return _assemble(config, hooks)
    except (MemoryError, OverflowError) as error:
        raise ConfigError(f"model and batch do not fit in memory ({error}); make them smaller") from error


def _assemble(config: Config, hooks: Sequence[Hook]) -> Assembly:
    task_class = _task_class(config.task.name)
    train, validation = _build("data", config.data.spec(), targets=task_class.targets, dtype=config.dtype)
    sources = [train, validation] if validation is not None else [train]
    if task_class.targets != "classes" and config.data.n_classes is not None:
        raise ConfigError(f"data.n_classes: the targets of {config.task.name} are numbers, not classes; leave it out")
    if task_class.targets == "classes" and config.data.n_classes is None:
        config = config.with_values({"data.n_classes": count_classes(sources)})
    training_part, validation_part = _parts(config, train, validation)
    _check_keep_best(config, task_class)
    batch_size = config.data.batch_size
    n_outputs = task_class.n_outputs(config.data.n_classes, train.target_shape)
    model = _build("model", config.model.spec(), input_shape=train.sample_shape, n_outputs=n_outputs)
    optimizer = _build("optimizer", config.optimizer.spec())
    _check_rate(optimizer, config.initial_step)
    here = numerics.settle(_threads(config, model))
    task = _build(
        "task",
        config.task.spec(),
        model=model,
        optimizer=optimizer,
        n_outputs=n_outputs,
        seed=config.seed,
        dtype=config.dtype,
        shards=config.data.shards,
        threads=here["threads"],
    )
    try:
        state = task.initial_state(config.initial_step)
    except ValueError as error:
        raise ConfigError(f"model: {config.model.name}: {error}") from error
    if len({hook.name for hook in hooks}) < len(hooks):
        raise ConfigError(f"hooks: two have one name; they are called {', '.join(hook.name for hook in hooks)}")
    state.hooks = {hook.name: remembered for hook in hooks if (remembered := hook.state())}
    codec.check_storable(state)
    return Assembly(
        config=config,
        numerics=here,
        task=task,
        sources=sources,
        training=TrainingBatches(training_part, seed=config.seed, batch_size=batch_size, dtype=config.dtype),
        validation=EvaluationBatches(validation_part, batch_size=batch_size, dtype=config.dtype)
        if validation_part is not None
        else None,
        hooks=list(hooks),
        state=state,
    )


def _task_class(name: str) -> type[Task]:
    found = cast(type[Task], registry.resolve("tasks", name))
    if getattr(found, "targets", None) not in get_args(Targets):
        raise ConfigError(f"task.name: {name} does not say its targets: one of {', '.join(get_args(Targets))}")
    return found


def _check_rate(optimizer: Optimizer, step: int) -> None:
    try:
        rate: object = optimizer.learning_rate(step)
    except registry.FOREIGN as error:
        raise ConfigError(in_one_line(f"optimizer.learning_rate: fails at step {step}: {reason(error)}")) from error
    if not isinstance(rate, numbers.Real) or not 0 <= float(rate) < math.inf:
        text = in_one_line(repr(rate), 60)
        raise ConfigError(f"optimizer.learning_rate: gives {text} at step {step}; a number from 0 on is needed")


def _threads(config: Config, model: Model) -> int:
    if config.numerics.threads != numerics.AUTO:
        return config.numerics.threads
    n_parameters = sum(math.prod(shape) for shape in model.parameter_shapes().values())
    return numerics.threads_for(config.data.batch_size // config.data.shards * n_parameters)


def _build(section: str, spec: dict[str, Any], **context: Any) -> Any:
    try:
        return registry.build(configs.FAMILIES[section], spec, **context)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error
    except (StepctlError, MemoryError, OverflowError):
        raise
    except registry.FOREIGN as error:
        raise ConfigError(in_one_line(f"{section}: {spec['name']} cannot be built: {reason(error)}")) from error


def _parts(config: Config, train: Source, validation: Source | None) -> tuple[Part, Part | None]:
    fraction = config.data.validation_fraction
    if validation is None and not fraction:
        if config.evaluate.every is not None:
            raise ConfigError("evaluate.every: there is no validation part; set data.validation_fraction, or name "
                              "validation files in data")  # fmt: skip
        return Part(train, train.n), None
    if validation is None:
        return split_parts(train, fraction, config.seed)
    if fraction:
        raise ConfigError("data.validation_fraction: validation files are named too; give one or the other")
    if (validation.sample_shape, validation.target_shape) != (train.sample_shape, train.target_shape):
        raise ConfigError(
            f"{validation.origin}: samples of shape {validation.sample_shape} and targets {validation.target_shape}, "
            f"but {train.origin} has {train.sample_shape} and {train.target_shape}; they must be equal"
        )
    return Part(train, train.n), Part(validation, validation.n)


def _check_keep_best(config: Config, task: type[Task]) -> None:
    best = config.checkpoint.keep_best
    if best is None:
        return
    if best.metric not in task.metrics:
        known = ", ".join(task.metrics)
        raise ConfigError(f"checkpoint.keep_best.metric: no evaluation gives {best.metric!r}; allowed: {known}")
    if config.evaluate.every is None:
        raise ConfigError("checkpoint.keep_best: nothing is evaluated; set evaluate.every")


def prepare(config: Config, hooks: Sequence[Hook] = ()) -> Assembly:
    """Assemble a fresh run: check the data, and write into the config what this machine and the target decide."""
    target = config.target(config.initial_step)
    if target < config.initial_step:
        raise ConfigError(f"stop.last_step: {target} is below initial_step {config.initial_step}; raise it")
    assembly = assemble(with_horizon(config, target), hooks)
    settle_numerics(assembly)
    check_size(assembly.config)
    assembly.check_data()
    assembly.trial()
    return assembly


def with_horizon(config: Config, target: int) -> Config:
    """Write a run's first target where the horizon of a decay was left open; ConfigError if it is out of reach."""
    if target >= 1 << 62:
        raise ConfigError(f"stop: {target} is more steps than can be counted; lower stop or initial_step")
    return config.with_values(dict.fromkeys(config.horizon_keys(), max(target, 1)))


def settle_numerics(assembly: Assembly) -> None:
    """Write threads and kernel as they are into the config; ConfigError if it asks for others."""
    here, asked = assembly.numerics, assembly.config.numerics
    if asked.threads != "auto" and asked.threads != here["threads"]:
        raise ConfigError(f"numerics.threads: this BLAS runs {here['threads']}, not {asked.threads}; use auto")
    if asked.blas_kernel != "auto" and asked.blas_kernel.lower() != here["blas_kernel"].lower():
        raise ConfigError(f"numerics.blas_kernel: NumPy was loaded with {here['blas_kernel']}, not "
                          f"{asked.blas_kernel}; use auto, or a kernel of this CPU")  # fmt: skip
    resolved = {"numerics.threads": here["threads"], "numerics.blas_kernel": here["blas_kernel"]}
    assembly.config = assembly.config.with_values(resolved)


def check_size(config: Config) -> None:
    """Raise ConfigError if a config is longer than what can be read back."""
    n_bytes = len(yamlio.dumps(config.plain()))
    if n_bytes > yamlio.MAX_BYTES // 2:
        raise ConfigError(f"config: {n_bytes} bytes with its defaults; at most {yamlio.MAX_BYTES // 2} can be kept")
