"""Resolving a config: open values are decided, components are built and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np

from stepctl.config import registry
from stepctl.config.model import Config, ProgramConfig, TaskConfig
from stepctl.data.base import Source, Sources, Targets, count_classes
from stepctl.data.batches import Subset, split_source
from stepctl.data.integers import is_integer
from stepctl.data.names import AUTO
from stepctl.distributed.comm import SINGLE_PROCESS, Comm
from stepctl.errors import ConfigError, StepctlError
from stepctl.hooks.base import Hook
from stepctl.hooks.stop_request import HookStop
from stepctl.models.base import Model, ModelShapes
from stepctl.optimizers.base import Optimizer
from stepctl.programs.base import OneUpdate, Task
from stepctl.programs.program import ProgramTask
from stepctl.state.arena import Array
from stepctl.stopping.signals import default_signal_actions
from stepctl.system import blas
from stepctl.system.closing import close_on_error
from stepctl.system.text import in_one_line
from stepctl.system.user_code import describe_error
from stepctl.training.checks import (
    check_buffers,
    check_groups,
    check_hooks,
    check_models,
    check_names,
    check_numerics,
    check_rate,
    check_size,
    check_source,
    check_targets,
)
from stepctl.writers.from_config import check_packages


@dataclass(frozen=True)
class ResolvedConfig:
    """A config without open values, and its components, which hold no arrays of the state.

    `comm` are all processes of the job, `sharing` those that share each step: alone in asynchronous
    training.
    """

    config: TaskConfig
    numerics: blas.Numerics
    task: Task
    sources: list[Source]
    training: Subset
    validation: Subset | None
    shapes: dict[str, ModelShapes]
    models: dict[str, Model]
    optimizers: dict[str, Optimizer]
    comm: Comm
    sharing: Comm


def resolve(
    config: TaskConfig,
    *,
    target: int,
    comm: Comm = SINGLE_PROCESS,
    sources: Sources | None = None,
    record_numerics: bool = False,
) -> ResolvedConfig:
    """Read the data, build the components, and decide the number of classes, horizons and threads.

    `target` is the global step at which an open decay ends, and `sources` are the data if they are
    read already. With `record_numerics` this process's threads and BLAS kernel are written into the
    config. ConfigError or DataError if the parts do not fit.
    """
    check_packages(config.log)
    task = build_task(config)
    sharing = _sharing(config, task, comm)
    specs = config.model.specs()
    integer_inputs = _take_integers(config)
    train, validation = sources or read_sources(config, task, is_rank=comm.rank > 0)
    all_sources = [train] if validation is None else [train, validation]
    decided = {f"data.{key}": value for key, value in train.decided_config().items()}
    check_targets(config, task)
    for source in all_sources:
        check_source(source, config, task, integer_inputs=integer_inputs)
    n_classes = config.data.n_classes
    class_names = decided.get("data.class_names", config.data.class_names)
    if n_classes is not None and class_names is not None and n_classes != len(class_names):
        raise ConfigError(
            f"data.n_classes: is {n_classes}, but {train.origin} has {len(class_names)} classes; "
            "leave it out"
        )
    if task.targets == "classes" and n_classes is None and train.has_targets:
        with default_signal_actions(is_rank=comm.rank > 0):
            n_classes = count_classes(all_sources) if class_names is None else len(class_names)
        decided["data.n_classes"] = n_classes
    decided["data.sample_shape"] = [*train.sample_shape]
    decided["data.target_shape"] = [*train.target_shape]
    if integer_inputs and config.data.integer_samples is None:
        x_dtype = np.dtype(train.x_dtype or config.dtype)
        decided["data.integer_samples"] = x_dtype.kind in "iub"
    training_subset, validation_subset = _subsets(config, task, train, validation)
    if train.preprocessing_arrays() and sources is None:  # given sources are fitted already
        train.fit_preprocessing(training_subset.rows(np.arange(training_subset.n)))
    check_names(config, task)
    decided |= _open_horizons(config, task, target)
    shapes = task.ends(n_classes, train.sample_shape, train.target_shape)
    models = {
        name: build_component("model", specs[name], **shapes[name]._asdict())
        for name in task.models
    }
    check_models(config, task, models)
    for name, model in models.items():
        if model.integer_inputs and not _takes_integers(specs[name]):
            raise ConfigError(
                f"model.name: {specs[name]['name']} returns a model that takes integers, but does "
                f"not declare it; annotate it: -> {type(model).__name__}"
            )
    check_buffers(config, task, models)
    numerics = blas.set_threads(_threads(config, models.values()))
    if record_numerics:
        decided |= decided_numerics(config, numerics)
    config = config.with_values(decided)
    check_size(config)
    optimizers = _build_optimizers(config, task)
    for name, optimizer in optimizers.items():
        check_rate(optimizer, config, name)
        check_groups(optimizer, models[name], config, name)
    return ResolvedConfig(
        config=config,
        numerics=numerics,
        task=task,
        sources=all_sources,
        training=training_subset,
        validation=validation_subset,
        shapes=shapes,
        models=models,
        optimizers=optimizers,
        comm=comm,
        sharing=sharing,
    )


def decided_numerics(config: Config, here: blas.Numerics) -> dict[str, Any]:
    """Return this process's numerics as config keys; ConfigError if the config has others."""
    check_numerics(config.numerics, here)
    return {"numerics.threads": here["threads"], "numerics.blas_kernel": here["blas_kernel"]}


def build_program(config: ProgramConfig) -> ProgramTask:
    """Build a user's program; ConfigError if that fails, or the config names wrong counters."""
    program = build_component("program", config.program.spec(), seed=config.seed)
    needed_metric = None if config.when is None else config.when.metric
    task = ProgramTask(program, seed=config.seed, needed_metric=needed_metric)
    with close_on_error(task):
        check_names(config, task)
    return task


def build_hooks(config: Config) -> tuple[list[Hook], HookStop]:
    """Build the hooks of a config, and the stop that they may request.

    They are checked again: a recorded config may be older than their classes.
    """
    hooks: list[Hook] = []
    paths = {}
    for number, spec in enumerate(config.hook_specs):
        full, problems = registry.check("hook", spec)
        if problems:
            where = ".".join(str(key) for key in ("hooks", number, *problems[0].path))
            raise ConfigError(f"{where}: {problems[0].message}")
        hook = build_component("hook", full, seed=config.seed)
        check_hooks([hook])
        hooks.append(hook)
        paths[hook.name] = full["name"]
    return hooks, HookStop(paths)


def check_without_data(config: Config) -> None:
    """Raise ConfigError if a config's metrics, counters, optimizers or hooks are wrong."""
    hooks, _ = build_hooks(config)
    check_hooks(hooks)
    if isinstance(config, ProgramConfig):
        build_program(config).close()
        return
    assert isinstance(config, TaskConfig)
    task = build_task(config)
    check_names(config, task)
    horizons = _open_horizons(config, task, config.target(config.initial_step))
    if horizons:
        config = config.with_values(horizons)
    _build_optimizers(config, task)


def build_task(config: TaskConfig) -> Task:
    """Build the task of a config; ConfigError if that fails."""
    found = cast(type[Task], registry.resolve("task", config.task.name))
    if getattr(found, "targets", None) not in get_args(Targets):
        known = ", ".join(get_args(Targets))
        raise ConfigError(
            f"task.name: {config.task.name} does not declare its targets; set targets to one of: "
            f"{known}"
        )
    task = build_component(
        "task",
        config.task.spec(),
        seed=config.seed,
        dtype=config.dtype,
        shards=config.data.shards,
    )
    return cast(Task, task)


def read_sources(config: TaskConfig, task: Task, *, is_rank: bool = False) -> Sources:
    """Build the data sources of a config; DataError if they cannot be read."""
    with default_signal_actions(is_rank=is_rank):
        sources: Sources = build_component(
            "data",
            config.data.spec(),
            targets=task.targets,
            dtype=config.dtype,
            integer_inputs=_take_integers(config),
            needs_targets=task.needs_targets,
            class_names=config.data.class_names,
        )
        return sources


def _take_integers(config: TaskConfig) -> bool:
    """Return whether integer data stay integers: all models declare that they take them.

    It is known before they are built, because their shapes come from the data.
    """
    if config.data.integer_samples is False:
        return False
    return all(_takes_integers(spec) for spec in config.model.specs().values())


def _takes_integers(spec: dict[str, Any]) -> bool:
    """Return whether a model declares that it takes an integer x in its own dtype."""
    built = registry.built_class(registry.resolve("model", spec["name"]))
    return getattr(built, "integer_inputs", False) is True


def _build_optimizers(config: TaskConfig, task: Task) -> dict[str, Optimizer]:
    specs = config.optimizer.specs()
    return {name: build_component("optimizer", specs[name]) for name in task.models}


def build_component(section: str, spec: dict[str, Any], **context: Any) -> Any:
    """Build the component that a section names; ConfigError if that fails."""
    try:
        return registry.build(section, spec, **context)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error
    except (StepctlError, MemoryError, OverflowError):
        raise
    except registry.USER_CODE_ERRORS as error:
        raise ConfigError(
            in_one_line(f"{section}: {spec['name']} cannot be built: {describe_error(error)}")
        ) from error


def _sharing(config: TaskConfig, task: Task, comm: Comm) -> Comm:
    """Return the processes that share each step; ConfigError if they cannot."""
    if config.is_async:
        if not isinstance(task, OneUpdate):
            raise ConfigError(
                f"distributed.mode: {config.task.name} has more than one update a step; use sync"
            )
        return SINGLE_PROCESS
    comm.check_shards(config.data.shards)
    if comm.size > 1 and not task.divisible:
        raise ConfigError(
            f"task.name: {config.task.name} cannot be shared by {comm.size} processes; start one, "
            "or have its step compute comm.mine(shards) and set divisible = True"
        )
    return comm


def _subsets(
    config: TaskConfig, task: Task, train: Source, validation: Source | None
) -> tuple[Subset, Subset | None]:
    """Return the training rows and the validation rows, if there are any."""
    fraction = config.data.validation_fraction
    if validation is None:
        if fraction:
            labels = _labels_to_split(task, train) if config.data.stratify else None
            return split_source(train, fraction, config.seed, config.data.order, labels)
        if config.evaluate.every is not None:
            raise ConfigError(
                "evaluate.every: there is no validation part; set data.validation_fraction, or "
                "name validation files in data"
            )
        return Subset(train, train.n), None
    if fraction:
        remedy = "give one or the other"
        keys = config.data.spec()
        if keys.get("validation_x") == AUTO and keys["validation_path"] is None:
            remedy += ", or set data.validation_x: null"
        raise ConfigError(
            f"data.validation_fraction: there are validation samples already, {validation.origin}; "
            f"{remedy}"
        )
    if train.has_targets != validation.has_targets:
        have, lack = (train, validation) if train.has_targets else (validation, train)
        raise ConfigError(
            f"{lack.origin}: there is no y, but {have.origin} has one; give both a y, or set "
            "data.y: null and data.validation_y: null"
        )
    for name in ("x_dtype", "y_dtype"):
        dtypes = [getattr(source, name) for source in (train, validation)]
        if len({dtype is not None and is_integer(np.dtype(dtype)) for dtype in dtypes}) == 2:
            raise ConfigError(
                f"{validation.origin}: {name[0]} has dtype {dtypes[1]}, but {train.origin} has "
                f"{dtypes[0]}; both must be integers, or neither"
            )
    shapes = (train.sample_shape, train.target_shape)
    if (validation.sample_shape, validation.target_shape) != shapes:
        raise ConfigError(
            f"{validation.origin}: samples of shape {validation.sample_shape} and targets "
            f"{validation.target_shape}, but {train.origin} has {train.sample_shape} and "
            f"{train.target_shape}; they must be equal"
        )
    return Subset(train, train.n), Subset(validation, validation.n)


def _labels_to_split(task: Task, source: Source) -> Array:
    """Return the labels for a stratified split; ConfigError if there are none in memory."""
    if task.targets != "classes" or not source.has_targets:
        raise ConfigError("data.stratify: there are no classes; remove it")
    labels = source.labels_in_memory()
    if labels is None:
        raise ConfigError(
            f"data.stratify: the labels of {source.origin} are not in memory; remove it, or name "
            "validation files"
        )
    return labels


def _open_horizons(config: TaskConfig, task: Task, target: int) -> dict[str, int]:
    """Return the open decay horizons: the value of each one's counter at the target."""
    n_steps = max(target - config.initial_step, 0)
    horizons = {}
    for key, counter in config.horizon_keys().items():
        count = task.count_at(
            counter,
            n_steps,
            initial_step=config.initial_step,
            batch_size=config.data.batch_size,
        )
        horizons[key] = max(1, count)
    return horizons


def _threads(config: TaskConfig, models: Iterable[Model]) -> int:
    if config.numerics.threads != blas.AUTO:
        return config.numerics.threads
    n_parameters = 0
    for model in models:
        n_parameters += sum(math.prod(shape) for shape in model.parameter_shapes().values())
    return blas.auto_threads(config.data.batch_size // config.data.shards * n_parameters)
