"""From a config to everything that training needs: the one assembly that a fresh run and a resume share."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from stepctl import config as configs
from stepctl import extras, numerics, registry, yamlio
from stepctl.arena import Shape
from stepctl.checkpoint import codec
from stepctl.comm import ALONE, Comm
from stepctl.config import Config, Samples
from stepctl.data.base import Source, Sources, Targets, check_labels, check_rows, count_classes, label_warnings
from stepctl.data.batches import EvaluationBatches, Part, TrainingBatches, split_parts
from stepctl.ema import MovingAverage
from stepctl.errors import ConfigError, NonFiniteError, StepctlError
from stepctl.hooks.base import Hook, HookState
from stepctl.hooks.evaluate import Evaluate
from stepctl.hooks.log import Log
from stepctl.hooks.samples import picture_shape
from stepctl.hooks.signals import ended_by_signals
from stepctl.hooks.watch import Best, EarlyStopping, TargetMetric, Watch
from stepctl.models.base import Ends, Model
from stepctl.optimizers.base import Optimizer
from stepctl.problems import a_or_an, did_you_mean, in_one_line, reason
from stepctl.state import GLOBAL_STEP, SAMPLES_SEEN, TrainState
from stepctl.tasks.base import Mode, OneUpdate, Task
from stepctl.tasks.learner import Learner
from stepctl.tasks.read_only import explained
from stepctl.writers import beside
from stepctl.writers.rows import Rows


@dataclass
class Assembly:
    """Everything that training needs, built from a config alone."""

    config: Config  # with what the data and this machine decided written in
    numerics: dict[str, Any]
    task: Task
    sources: list[Source]
    training: TrainingBatches
    validation: EvaluationBatches | None
    rows: Rows  # where the hooks' rows go
    watches: list[Watch]
    hooks: list[Hook]
    state: TrainState
    comm: Comm

    @np.errstate(all="ignore")
    def trial(self) -> None:
        """Try the first step without taking it, so that a model that breaks its protocol is refused before it."""
        # the first step decides whether a non-finite loss stops the run
        with contextlib.suppress(NonFiniteError), explained(self.state):
            batch = self.training.batch(self.state.counters.samples_seen)
            if self.config.data.n_classes is not None:  # a source may read other labels than it showed
                check_labels(f"{self.sources[0].origin}: the first batch", 0, batch.y, self.config.data.n_classes)
            self.task.trial(self.state, batch)

    def stop_rules(self) -> list[EarlyStopping | TargetMetric]:
        """Return what stops a run on account of its evaluations."""
        return [watch for watch in self.watches if isinstance(watch, EarlyStopping | TargetMetric) and watch.in_use]

    def forget(self, before: Config) -> list[str]:
        """Let watches begin anew that went by something else in the config before; return the names of those in use."""
        same_task = before.task.name == self.config.task.name
        known = {watch.name: watch.goes_by for watch in _watches(before, self.task)} if same_task else {}
        gone = [watch for watch in self.watches if known.get(watch.name) != watch.goes_by]
        for watch in gone:
            watch.forget()
        return [watch.name for watch in gone if watch.in_use]

    def count_at(self, counter: str, step: int) -> int:
        """Return what a counter stands at at a global step, if nothing disturbs the run."""
        start = self.config.initial_step
        known = {"initial_step": start, "batch_size": self.config.data.batch_size}
        return self.task.count_at(counter, step - start, **known)

    def check_data(self, say: Callable[[str], None]) -> None:
        """Read all data once, and warn about suspect labels or sizes.

        DataError if they are not what the task can learn from.
        """
        n_classes = self.config.data.n_classes
        occurs = []
        with ended_by_signals(is_rank=self.comm.rank > 0):
            for source in self.sources:
                if type(source).check is not Source.check:
                    source.check(n_classes)
                occurs.append(check_rows(source, n_classes))
        for warning in self._data_warnings(occurs):
            say(f"warning: {warning}")

    def _data_warnings(self, occurs: list[npt.NDArray[np.bool_]]) -> Iterator[str]:
        if self.config.data.n_classes is not None and self.task.learns_labels:
            yield from label_warnings(self.sources, occurs)
        if len(self.sources) == 2:
            # "<training>; <validation>", which the ledger needs anyway
            fingerprints = self.data_fingerprint
            half = fingerprints[: len(fingerprints) // 2 - 1]
            if fingerprints == f"{half}; {half}":
                yield f"{self.sources[1].origin}: the validation data are the training data; name others"
        batch_size, n = self.config.data.batch_size, self.training.part.n
        if batch_size > n:
            yield f"data.batch_size: {batch_size} is more than the {n} training rows, so a batch repeats some; lower it"

    @property
    def origins(self) -> str:
        """Where the data are from, in words."""
        return ", ".join(source.origin for source in self.sources)

    @cached_property
    def data_fingerprint(self) -> str:
        """A text that changes when the data do."""
        with ended_by_signals(is_rank=self.comm.rank > 0):
            return "; ".join(source.fingerprint() for source in self.sources)

    def has_data(self, fingerprint: str) -> bool:
        """Tell whether a recorded fingerprint is that of these data, by this version or an earlier one."""
        if fingerprint == self.data_fingerprint:
            return True
        with ended_by_signals(is_rank=self.comm.rank > 0):
            return fingerprint == "; ".join(source.former_fingerprint() for source in self.sources)


def assemble(
    config: Config,
    hooks: Sequence[Hook] = (),
    *,
    target: int | None = None,
    comm: Comm = ALONE,
    sources: Sources | None = None,
) -> Assembly:
    """Build data, model, optimizer, task and initial state. ConfigError or DataError if they do not fit.

    `hooks` are the caller's own; what they remember becomes part of the state. A decay's horizon that was left open
    becomes `target`, a global step (None: the config's own, from the initial step). `comm` are the processes that
    share each step. `sources` are the data if they are read already.
    """
    target = config.target(config.initial_step) if target is None else target
    try:
        return _assemble(config, hooks, target, comm, sources)
    except (MemoryError, OverflowError) as error:
        raise ConfigError(f"model and batch do not fit in memory ({error}); make them smaller") from error


def _assemble(config: Config, hooks: Sequence[Hook], target: int, comm: Comm, read: Sources | None) -> Assembly:
    beside.check(config.log)
    task = _task(config)
    _share_out(config, task, comm)
    with ended_by_signals(is_rank=comm.rank > 0):
        train, validation = read or _build("data", config.data.spec(), targets=task.targets, dtype=config.dtype)
    sources = [train, validation] if validation is not None else [train]
    if task.targets != "classes" and config.data.n_classes is not None:
        raise ConfigError(f"data.n_classes: the targets of {config.task.name} are numbers, not classes; leave it out")
    if task.targets == "classes" and config.data.n_classes is None:
        with ended_by_signals(is_rank=comm.rank > 0):
            n_classes = count_classes(sources)
        config = config.with_values({"data.n_classes": n_classes})
    training_part, validation_part = _parts(config, train, validation)
    _check_names(config, task)
    config = _with_horizons(config, task, target)
    batch_size, sharing = config.data.batch_size, task.comm
    learners, here = _learners(config, task, task.ends(config.data.n_classes, train.sample_shape, train.target_shape))
    task.learners = learners
    _check_buffers(config, task)
    try:
        state = task.initial_state(config.initial_step)
    except ValueError as error:
        names = ", ".join(spec["name"] for spec in config.model.specs().values())
        raise ConfigError(f"model: {names}: {error}") from error
    written = next((folder for folder, arena in state.arenas.items() if not arena.read_only), None)
    if written is not None and task.sliced:
        raise ConfigError(f"task.name: {config.task.name} writes arrays of its own ({written}): set sliced = False")
    training = TrainingBatches(
        training_part,
        seed=config.seed,
        batch_size=batch_size,
        dtype=config.dtype,
        per_step=task.batches_per_step,
        rank=sharing.rank,
        ranks=sharing.size,
    )
    evaluation = None
    if validation_part is not None:
        evaluation = EvaluationBatches(validation_part, batch_size=batch_size, dtype=config.dtype)
    rows, watches = Rows(), _watches(config, task) if evaluation else []
    own = _own_hooks(config, task, rows, watches, training, evaluation)
    all_hooks = [*own, *watches, *hooks]
    _check_hooks(all_hooks)
    remembering = [hook for hook in all_hooks if type(hook).state is not Hook.state]
    state = replace(state, hooks=tuple(HookState(hook) for hook in remembering))
    codec.check_storable(state)
    if config.samples is not None:
        _check_samples(config.samples, task, state, train.sample_shape)
    return Assembly(config, here, task, sources, training, evaluation, rows, watches, all_hooks, state, comm)


def _task(config: Config) -> Task:
    found = cast(type[Task], registry.resolve("tasks", config.task.name))
    if getattr(found, "targets", None) not in get_args(Targets):
        known = ", ".join(get_args(Targets))
        raise ConfigError(f"task.name: {config.task.name} does not say its targets: one of {known}")
    spec = config.task.spec()
    return cast(Task, _build("task", spec, seed=config.seed, dtype=config.dtype, shards=config.data.shards))


def _share_out(config: Config, task: Task, comm: Comm) -> None:
    """Let the processes share the task's steps; ConfigError if they cannot."""
    if config.distributed.mode == "async":
        if not isinstance(task, OneUpdate):
            raise ConfigError(f"distributed.mode: {config.task.name} has more than one update a step; use sync")
        return
    comm.refuse_uneven(config.data.shards)
    if comm.size > 1 and not task.divisible:
        raise ConfigError(f"task.name: {config.task.name} cannot be shared by {comm.size} processes; start one, or "
                          "have its step compute comm.mine(shards) and set divisible = True")  # fmt: skip
    task.comm = comm


def _learners(config: Config, task: Task, ends: dict[str, Ends]) -> tuple[dict[str, Learner], dict[str, Any]]:
    models, optimizers = config.model.specs(), config.optimizer.specs()
    built = {name: _build("model", models[name], **ends[name]._asdict()) for name in task.models}
    trained = {name: _build("optimizer", optimizers[name]) for name in task.models}
    for name, optimizer in trained.items():
        _check_rate(optimizer, config.initial_step if optimizer.learning_rate.counter == GLOBAL_STEP else 0, name)
    here = numerics.settle(_threads(config, list(built.values())))
    average = MovingAverage(config.ema.decay, config.ema.warmup) if config.ema else None
    common = {
        "seed": config.seed,
        "dtype": config.dtype,
        "threads": here["threads"],
        "norms": config.log.norms or config.log.tensorboard,
    }
    return {
        name: Learner(name, built[name], trained[name], ends[name], average=average, **common) for name in task.models
    }, here


def _check_buffers(config: Config, task: Task) -> None:
    """Raise ConfigError if a model has buffers that its task, or the mode, would not fill."""
    names = [name for learner in task.learners.values() for name in learner.model.buffer_shapes()]
    if not names:
        return
    has = f"the model has buffers ({names[0]}{', ...' if len(names) > 1 else ''})"
    if not task.buffered:
        raise ConfigError(f"model: {has}, which the task {config.task.name} does not fill; leave batch_norm out, or "
                          "use layer_norm")  # fmt: skip
    if config.distributed.mode == "async":
        raise ConfigError(f"distributed.mode: {has}, which async ranks would not share; use sync, or layer_norm")


def _own_hooks(
    config: Config,
    task: Task,
    rows: Rows,
    watches: list[Watch],
    training: TrainingBatches,
    evaluation: EvaluationBatches | None,
) -> list[Hook]:
    names = [*task.training_metrics, *(name for learner in task.learners.values() for name in learner.measured())]
    first_step = config.initial_step + 1
    hooks: list[Hook] = [Log(config.log, rows, names, first_step=first_step, n_samples=training.part.n)]
    if evaluation is not None:
        hooks.append(Evaluate(config.evaluate, task, evaluation, rows, watches))
    return hooks


def _check_hooks(hooks: list[Hook]) -> None:
    for hook in hooks:
        if not (isinstance(hook, Hook) and isinstance(getattr(hook, "name", None), str)):
            kind = a_or_an(type(hook).__name__)
            raise ConfigError(f"hooks: there is {kind}; each must be a stepctl.Hook, with a class attribute `name`")
    if len({hook.name for hook in hooks}) < len(hooks):
        raise ConfigError(f"hooks: two have one name; they are called {', '.join(hook.name for hook in hooks)}")


def _check_samples(config: Samples, task: Task, state: TrainState, sample_shape: Shape) -> None:
    if task.generate(state, 1) is None:
        raise ConfigError("samples: this task makes none; leave the section out")
    picture_shape(config, sample_shape)
    extras.require("matplotlib.image", "plot")


def _with_horizons(config: Config, task: Task, target: int) -> Config:
    """Write what was left open of a schedule's horizon: what its counter stands at at the first target."""
    steps, open_keys = max(target - config.initial_step, 0), config.horizon_keys()
    known = {"initial_step": config.initial_step, "batch_size": config.data.batch_size}
    values = {key: max(1, task.count_at(counter, steps, **known)) for key, counter in open_keys.items()}
    return config.with_values(values) if values else config


def check_without_data(config: Config) -> None:
    """Raise ConfigError if a config names metrics or counters that its task lacks, or an optimizer cannot be built."""
    task = _task(config)
    _check_names(config, task)
    for spec in _with_horizons(config, task, config.target(config.initial_step)).optimizer.specs().values():
        _build("optimizer", spec)


def _check_names(config: Config, task: Task) -> None:
    if wrong := [*_wrong_metrics(config, task), *_wrong_counters(config, task)]:
        raise ConfigError("\n".join(wrong))


def _wrong_counters(config: Config, task: Task) -> list[str]:
    """Return a line for each schedule or cadence that names a counter that the task does not have."""
    named = {f"{section}.counter": cadence.counter for section, cadence in config.cadences().items()}
    named |= {f"{key}.counter": rate["counter"] for key, rate in config.rates().items() if "counter" in rate}
    known = [GLOBAL_STEP, SAMPLES_SEEN, *task.models]
    return [
        f"{key}: there is no counter {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}"
        for key, name in named.items()
        if name not in known
    ]


def _metric(config: Config, task: Task, key: str, asked: Any) -> tuple[str, Mode]:
    """Return the metric that a section of the config goes by, and which value of it is the better one."""
    modes = dict(task.metrics)
    if config.evaluate.ema:
        modes |= {f"ema_{name}": mode for name, mode in task.metrics.items()}
    evaluate = config.evaluate
    default = evaluate.metric if evaluate.metric in modes else next(iter(task.metrics))
    name = getattr(asked, "metric", None) or default
    if name not in modes:
        raise ConfigError(f"{key}.metric: no evaluation gives {name!r}{did_you_mean(name, list(modes))}; "
                          f"allowed: {', '.join(modes)}")  # fmt: skip
    return name, getattr(asked, "mode", None) or (evaluate.mode if name == default else None) or modes[name]


def _wrong_metrics(config: Config, task: Task) -> Iterator[str]:
    """Yield a line for each section that goes by a metric that no evaluation gives."""
    asked = {
        "evaluate": config.evaluate if config.evaluate.metric else None,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "stop.early_stopping": config.stop.early_stopping,
        "stop.target_metric": config.stop.target_metric,
    }
    if config.evaluate.ema and config.ema is None:
        yield "evaluate.ema: there is no moving average; set ema: {decay: 0.999}, or leave it out"
    for key, section in asked.items():
        if section is not None:
            try:
                _metric(config, task, key, section)
            except ConfigError as error:
                yield str(error)
            if config.evaluate.every is None and key != "evaluate":
                yield f"{key}: nothing is evaluated; set evaluate.every"


def _watches(config: Config, task: Task) -> list[Watch]:
    early, target = config.stop.early_stopping, config.stop.target_metric
    return [
        Best(*_metric(config, task, "evaluate", config.evaluate)),
        EarlyStopping(*_metric(config, task, "stop.early_stopping", early), early),
        TargetMetric(*_metric(config, task, "stop.target_metric", target), target),
    ]


def _check_rate(optimizer: Optimizer, step: int, name: str) -> None:
    key = "optimizer.learning_rate" if name == configs.MODEL else f"optimizer.{name}.learning_rate"
    try:
        rate: object = optimizer.learning_rate(step)
    except registry.FOREIGN as error:
        raise ConfigError(in_one_line(f"{key}: fails at step {step}: {reason(error)}")) from error
    if not isinstance(rate, numbers.Real) or not 0 <= float(rate) < math.inf:
        text = in_one_line(repr(rate), 60)
        raise ConfigError(f"{key}: gives {text} at step {step}; a number from 0 on is needed")


def _threads(config: Config, models: list[Model]) -> int:
    if config.numerics.threads != numerics.AUTO:
        return config.numerics.threads
    n_parameters = sum(math.prod(shape) for model in models for shape in model.parameter_shapes().values())
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


def prepare(
    config: Config, hooks: Sequence[Hook] = (), comm: Comm = ALONE, say: Callable[[str], None] = lambda line: None
) -> Assembly:
    """Assemble a fresh run: check the data, and write into the config what this machine and the target decide."""
    target = config.target(config.initial_step)
    if target < config.initial_step:
        raise ConfigError(f"stop.last_step: {target} is below initial_step {config.initial_step}; raise it")
    if target >= 1 << 62:
        raise ConfigError(f"stop: {target} is more steps than can be counted; lower stop or initial_step")
    assembly = assemble(config, hooks, comm=comm)
    settle_numerics(assembly)
    check_size(assembly.config)
    assembly.check_data(say)
    assembly.trial()
    return assembly


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
    n_bytes = len(config.text)
    if n_bytes > yamlio.MAX_BYTES // 2:
        raise ConfigError(f"config: {n_bytes} bytes with its defaults; at most {yamlio.MAX_BYTES // 2} can be kept")
