"""Checks of a config against the components that it names."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepctl.config import registry, yaml
from stepctl.config.model import Config, NumericsConfig, SamplesConfig, TaskConfig
from stepctl.config.registry import is_builtin
from stepctl.data.base import Source
from stepctl.data.integers import is_integer
from stepctl.errors import ConfigError
from stepctl.hooks.base import Hook
from stepctl.hooks.evaluate import Evaluate
from stepctl.hooks.log import Log
from stepctl.hooks.samples import picture_shape
from stepctl.hooks.stop_request import HookStop, StopRequest
from stepctl.hooks.watch import Best, EarlyStopping, TargetMetric
from stepctl.models.base import Model
from stepctl.models.loss_model import LossModel
from stepctl.optimizers.base import Optimizer
from stepctl.programs.base import Mode, Task
from stepctl.programs.model_loss import ModelLoss
from stepctl.programs.program import ProgramTask
from stepctl.state.arena import Shape
from stepctl.state.counters import GLOBAL_STEP, SAMPLES_SEEN
from stepctl.state.train_state import TrainState
from stepctl.system import optional
from stepctl.system.blas import Numerics
from stepctl.system.text import a_or_an, did_you_mean, in_one_line
from stepctl.system.user_code import defined_at, describe_error

_MAX_STEP = 1 << 62  # exclusive
_OWN_HOOKS = (Log, Evaluate, Best, EarlyStopping, TargetMetric, StopRequest, HookStop)


def check_target(config: Config) -> None:
    """Raise ConfigError if the target is below the initial step, or too large to count."""
    target = config.target(config.initial_step)
    if target < config.initial_step:
        raise ConfigError(
            f"stop.last_step: {target} is below initial_step {config.initial_step}; raise it"
        )
    if target >= _MAX_STEP:
        raise ConfigError(
            f"stop: {target} is more steps than can be counted; lower stop or initial_step"
        )


def check_targets(config: TaskConfig, task: Task) -> None:
    """Raise ConfigError if classes are described for targets that are numbers."""
    if task.targets == "classes":
        return
    for key in ("n_classes", "class_names"):
        if getattr(config.data, key) is not None:
            raise ConfigError(
                f"data.{key}: the targets of {config.task.name} are numbers, not classes; leave it "
                "out"
            )


def check_source(source: Source, config: TaskConfig, task: Task, *, integer_inputs: bool) -> None:
    """Raise ConfigError if the task needs targets that the data lack, or a dtype does not fit."""
    if task.needs_targets and not source.has_targets:
        raise ConfigError(
            f"{source.origin}: it has no targets, and the task {config.task.name} learns from them"
        )
    if source.x_dtype is not None and is_integer(np.dtype(source.x_dtype)) and not integer_inputs:
        raise ConfigError(
            f"{source.origin}: x has dtype {np.dtype(source.x_dtype)}, but the model takes "
            f"{config.dtype}; declare x_dtype only if the source's argument integer_inputs is "
            "true, or use a model with integer_inputs = True"
        )


def check_models(config: TaskConfig, task: Task, models: Mapping[str, Model]) -> None:
    """Raise ConfigError if the task loss has another model than a LossModel, or another task has one."""
    for model in models.values():
        name = type(model).__name__
        if isinstance(task, ModelLoss) and not isinstance(model, LossModel):
            raise ConfigError(
                f"task.name: loss needs a stepctl.LossModel, but the model is {a_or_an(name)}; choose "
                f"another task or model ({defined_at(type(model))})"
            )
        if isinstance(model, LossModel) and not isinstance(task, ModelLoss):
            raise ConfigError(
                f"task.name: {config.task.name} needs models with forward, but {name} is a LossModel; set "
                f"task: {{name: loss}} ({defined_at(type(model))})"
            )


def check_buffers(config: TaskConfig, task: Task, models: Mapping[str, Model]) -> None:
    """Raise ConfigError if a model has buffers that the task or the mode does not update."""
    names = [name for model in models.values() for name in model.buffer_shapes()]
    if not names:
        return
    has = f"the model has buffers ({names[0]}{', ...' if len(names) > 1 else ''})"
    if not task.buffered:
        raise ConfigError(
            f"model: {has}, which the task {config.task.name} does not update; remove batch_norm, "
            "or use layer_norm"
        )
    if config.is_async:
        raise ConfigError(
            f"distributed.mode: {has}, which async ranks would not share; use sync, or layer_norm"
        )


def check_numerics(asked: NumericsConfig, here: Numerics) -> None:
    """Raise ConfigError if a config asks for other threads or another BLAS kernel than here."""
    if asked.threads != "auto" and asked.threads != here["threads"]:
        raise ConfigError(
            f"numerics.threads: this BLAS runs {here['threads']}, not {asked.threads}; use auto"
        )
    if asked.blas_kernel != "auto" and asked.blas_kernel.lower() != here["blas_kernel"].lower():
        raise ConfigError(
            f"numerics.blas_kernel: NumPy was loaded with {here['blas_kernel']}, not "
            f"{asked.blas_kernel}; use auto, or a kernel of this CPU"
        )


def check_hooks(hooks: Sequence[Hook]) -> None:
    """Raise ConfigError if an object is not a hook, or two hooks have the same name."""
    for hook in hooks:
        kind = type(hook).__name__
        if not isinstance(hook, Hook):
            raise ConfigError(f"hooks: {a_or_an(kind)} is not a hook; subclass stepctl.Hook")
        if not isinstance(getattr(hook, "name", None), str):
            raise ConfigError(
                f"hooks: {kind} has no name; give the class one, such as name = {kind.lower()!r}"
            )
    names = [hook.name for hook in hooks if not is_builtin(hook)]
    names += [kind.name for kind in _OWN_HOOKS]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"hooks: two hooks have the name {name!r}; each needs a `name` of its own"
            )


def check_samples(config: SamplesConfig, task: Task, state: TrainState, shape: Shape) -> None:
    """Raise ConfigError if the task generates no samples, or they cannot be shown as pictures."""
    if task.generate(state, 1) is None:
        raise ConfigError("samples: this task generates none; remove the section")
    picture_shape(config, shape)
    optional.require("matplotlib.image", "plot")


def check_names(config: Config, task: Task) -> None:
    """Raise ConfigError if the config names a metric or a counter that the task does not have."""
    wrong = [*_wrong_metrics(config, task), *_wrong_counters(config, task)]
    if wrong:
        raise ConfigError("\n".join(wrong))


def _wrong_counters(config: Config, task: Task) -> Iterator[str]:
    """Yield a line for each schedule or cadence that names an unknown counter."""
    named = {
        f"{section}.counter": cadence.counter for section, cadence in config.cadences().items()
    }
    for key, rate in config.rates().items():
        if "counter" in rate:
            named[f"{key}.counter"] = rate["counter"]
    known = [GLOBAL_STEP, SAMPLES_SEEN, *task.models]
    if isinstance(task, ProgramTask):  # which has no samples
        known = [GLOBAL_STEP]
    for key, name in named.items():
        if name not in known:
            hint = did_you_mean(name, known)
            yield f"{key}: unknown counter {name!r}{hint}; there are: {', '.join(known)}"


def _wrong_metrics(config: Config, task: Task) -> Iterator[str]:
    """Yield a line for each section that names a metric that no evaluation measures."""
    sections: dict[str, object] = {
        "evaluate": config.evaluate if config.evaluate.metric else None,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "stop.early_stopping": config.stop.early_stopping,
        "stop.target_metric": config.stop.target_metric,
    }
    if config.evaluate.ema and not config.has_average:
        yield "evaluate.ema: there is no moving average; set ema: {decay: 0.999}, or leave it out"
    if isinstance(task, ProgramTask) and not task.can_evaluate:
        sections["evaluate.every"] = config.evaluate.every
        for key, section in sections.items():
            if section is not None:
                yield (
                    f"{key}: the program cannot evaluate; give it a method evaluate(self, state, "
                    "rng), or leave it out"
                )
        return
    for key, section in sections.items():
        if section is None:
            continue
        try:
            metric_and_mode(config, task, key, section)
        except ConfigError as error:
            yield str(error)
        if config.evaluate.every is None and key != "evaluate":
            yield f"{key}: nothing is evaluated; set evaluate.every"


def metric_and_mode(config: Config, task: Task, key: str, section: Any) -> tuple[str, Mode]:
    """Return the metric that a section decides by, and which of its values are better.

    `key` is the section's, None if the config lacks it. ConfigError if no evaluation measures the
    metric.
    """
    if isinstance(task, ProgramTask):
        return _program_metric_and_mode(config, key, section)
    modes = dict(task.metrics)
    if config.evaluate.ema:
        modes |= {f"ema_{name}": mode for name, mode in task.metrics.items()}
    evaluate = config.evaluate
    default = evaluate.metric if evaluate.metric in modes else next(iter(task.metrics))
    name = getattr(section, "metric", None) or default
    if name not in modes:
        raise ConfigError(
            f"{key}.metric: no evaluation measures {name!r}{did_you_mean(name, list(modes))}; "
            f"allowed: {', '.join(modes)}"
        )
    mode = getattr(section, "mode", None)
    if mode is None and name == default:
        mode = evaluate.mode
    return name, mode or modes[name]


def _program_metric_and_mode(config: Config, key: str, section: Any) -> tuple[str, Mode]:
    """Return a section's metric and mode; a program's metrics are not known in advance.

    The metric is empty if the config lacks the section.
    """
    evaluate = config.evaluate
    name = getattr(section, "metric", None) or evaluate.metric or ""
    mode = getattr(section, "mode", None) or evaluate.mode
    in_use = section is not None and section is not evaluate
    if in_use and not name:
        raise ConfigError(f"{key}.metric: is missing; name a metric that evaluate returns")
    if (in_use or name) and mode is None:
        missing = f"{key}.mode" if in_use else "evaluate.mode"
        raise ConfigError(f"{missing}: is missing; give min or max")
    return name, mode or "min"


def check_rate(optimizer: Optimizer, config: TaskConfig, name: str) -> None:
    """Raise ConfigError if the first learning rate for model `name` is not a number >= 0."""
    key = config.learning_rate_key(name)
    schedule = optimizer.learning_rate
    step = config.initial_step if schedule.counter == GLOBAL_STEP else 0
    try:
        rate: object = schedule(step)
    except registry.USER_CODE_ERRORS as error:
        raise ConfigError(
            in_one_line(f"{key}: fails at step {step}: {describe_error(error)}")
        ) from error
    if not isinstance(rate, numbers.Real) or not 0 <= float(rate) < math.inf:
        text = in_one_line(repr(rate), 60)
        raise ConfigError(f"{key}: gives {text} at step {step}; it must be a number >= 0")


def check_groups(optimizer: Optimizer, model: Model, config: TaskConfig, name: str) -> None:
    """Raise ConfigError if a pattern of paths does not fit the parameters of model `name`."""
    shapes = model.parameter_shapes()
    try:
        optimizer.settings(shapes)
    except ConfigError as error:
        raise ConfigError(f"{config.optimizer_key(name)}.{error}") from error


def check_size(config: Config) -> None:
    """Raise ConfigError if a config is longer than can be read back."""
    n_bytes = len(config.text)
    if n_bytes > yaml.MAX_BYTES // 2:
        raise ConfigError(
            f"config: {n_bytes} bytes with its defaults; at most {yaml.MAX_BYTES // 2} can be kept"
        )
