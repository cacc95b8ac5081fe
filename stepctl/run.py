"""The composition root: a fresh run and a resumed one come from the same assembly."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stepctl import __version__, numerics, registry, rundir, yamlio
from stepctl import config as configs
from stepctl.checkpoint import codec
from stepctl.checkpoint.store import Store
from stepctl.config import Config, Stop
from stepctl.data.base import Source, Sources, count_classes
from stepctl.data.batches import EvaluationBatches, Part, TrainingBatches, split_parts
from stepctl.errors import ConfigError, NumericsError
from stepctl.hooks.base import Hook, StopReason
from stepctl.hooks.evaluate import Evaluate
from stepctl.hooks.log import Log
from stepctl.hooks.save import Save
from stepctl.hooks.signals import Signals
from stepctl.hooks.stop import StopAtStep
from stepctl.models.base import Model
from stepctl.optimizers.base import Optimizer
from stepctl.rundir import RunDirectory
from stepctl.state import TrainState
from stepctl.tasks.base import Task
from stepctl.trainer import Trainer
from stepctl.writers.base import Writer
from stepctl.writers.jsonl import JSONLines

Say = Callable[[str], None]
_PROTOCOLS: dict[str, type] = {"data": Sources, "model": Model, "task": Task, "optimizer": Optimizer}


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

    def data_fingerprint(self) -> str:
        """Return a text that changes when the data do."""
        return "; ".join(source.fingerprint() for source in self.sources)


@dataclass(frozen=True)
class Outcome:
    """How a segment ended."""

    reason: StopReason
    start: int
    step: int


def assemble(config: Config, hooks: Sequence[Hook] = ()) -> Assembly:
    """Build data, model, optimizer, task and initial state. ConfigError or DataError if they do not fit.

    `hooks` are the caller's own; what they remember becomes part of the state.
    """
    try:
        return _assemble(config, hooks)
    except (MemoryError, OverflowError) as error:
        raise ConfigError(f"model and batch do not fit in memory ({error}); make them smaller") from error


def _assemble(config: Config, hooks: Sequence[Hook]) -> Assembly:
    here = numerics.settle(config.numerics.threads)
    task_class: type[Task] = registry.resolve("tasks", config.task.name)  # type: ignore[assignment]
    train, validation = _build("data", config.data.spec(), targets=task_class.targets, dtype=config.dtype)
    sources = [train, validation] if validation is not None else [train]
    if task_class.targets != "classes" and config.data.n_classes is not None:
        raise ConfigError(f"data.n_classes: the targets of {config.task.name} are numbers, not classes; leave it out")
    if task_class.targets == "classes" and config.data.n_classes is None:
        config = config.with_values({"data.n_classes": count_classes(sources)})
    training_part, validation_part = _parts(config, train, validation)
    batch_size = config.data.batch_size
    n_outputs = task_class.n_outputs(config.data.n_classes, train.target_shape)
    model = _build("model", config.model.spec(), input_shape=train.sample_shape, n_outputs=n_outputs)
    optimizer = _build("optimizer", config.optimizer.spec())
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


def _build(section: str, spec: dict[str, Any], **context: Any) -> Any:
    try:
        built = registry.build(configs.FAMILIES[section], spec, **context)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{section}: {spec['name']} cannot be built: {error}") from error
    if not isinstance(built, _PROTOCOLS[section]):
        needed = _PROTOCOLS[section]
        raise ConfigError(
            f"{section}: {spec['name']} is no {needed.__name__}; subclass {needed.__module__}:{needed.__name__}"
        )
    return built


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


def prepare(config: Config, hooks: Sequence[Hook] = ()) -> Assembly:
    """Assemble a fresh run: check the data, and write into the config what this machine and the target decide."""
    target = config.target(config.initial_step)
    if target < config.initial_step:
        raise ConfigError(f"stop.last_step: {target} is below initial_step {config.initial_step}; raise it")
    config = config.with_values(dict.fromkeys(config.horizon_keys(), max(target, 1)))
    assembly = assemble(config, hooks)
    here, asked = assembly.numerics, config.numerics
    if asked.threads != "auto" and asked.threads != here["threads"]:
        raise ConfigError(f"numerics.threads: this BLAS runs {here['threads']}, not {asked.threads}; use auto")
    if asked.blas_kernel != "auto" and asked.blas_kernel.lower() != here["blas_kernel"].lower():
        raise ConfigError(f"numerics.blas_kernel: NumPy was loaded with {here['blas_kernel']}, not "
                          f"{asked.blas_kernel}; use auto, or a kernel of this CPU")  # fmt: skip
    for source in assembly.sources:
        source.check(assembly.config.data.n_classes)
    resolved = {"numerics.threads": here["threads"], "numerics.blas_kernel": here["blas_kernel"]}
    assembly.config = assembly.config.with_values(resolved)
    return assembly


class Segment:
    """One invocation of train or resume: an assembly, its run directory (locked), and its target."""

    def __init__(self, directory: RunDirectory, assembly: Assembly, *, target: int, restored: str | None) -> None:
        self.directory, self.assembly, self.target = directory, assembly, target
        self.config, self.state = assembly.config, assembly.state
        self.start = assembly.state.counters.global_step
        self.store = Store(directory.checkpoints)
        self.restored = restored
        self.facts: dict[str, Any] = {}  # for the ledger
        self.report: Say = lambda message: None  # told of each checkpoint

    def train(self, writers: Sequence[Writer] = (), hooks: Sequence[Hook] = ()) -> Outcome:
        """Run to the target; every row, checkpoint and end is on disk when this returns.

        `writers` get the rows beside metrics.jsonl; `hooks` run after the segment's own.
        """
        self.directory.mend_ledger()
        self.directory.cut_metrics(self.start)
        number = 1 + sum(row["event"] == "start" for row in self.directory.read_ledger())
        self._record_start(number)
        writers = [JSONLines(self.directory.metrics), *writers]
        with Signals() as signals:
            trainer = Trainer(
                self.assembly.task,
                self.assembly.training,
                self.state,
                stop=[StopAtStep(self.target), signals],
                hooks=[*self._hooks(writers, signals), *hooks],
            )
            try:
                reason = trainer.run()
            except BaseException as error:
                with contextlib.suppress(OSError):
                    self._record_end(number, f"{type(error).__name__}: {error}")
                raise
            finally:
                for writer in writers:
                    writer.close()
        self._record_end(number, reason.text)
        return Outcome(reason, self.start, self.state.counters.global_step)

    def _hooks(self, writers: Sequence[Writer], signals: Signals) -> list[Hook]:
        config, assembly = self.config, self.assembly

        def publish(state: TrainState) -> None:
            # rows up to this step must survive whatever the checkpoint survives
            for writer in writers:
                writer.sync()
            self._publish(state)

        n_samples = assembly.training.part.n
        hooks: list[Hook] = [Log(config.log, writers, first_step=config.initial_step + 1, n_samples=n_samples)]
        if assembly.validation is not None:
            hooks.append(Evaluate(config.evaluate, assembly.task, assembly.validation, writers))
        saved_step = self.start if self.restored else None
        hooks += assembly.hooks
        hooks.append(Save(config.checkpoint, publish, signals.save_requested, saved_step))
        return hooks

    def _publish(self, state: TrainState) -> None:
        step = state.counters.global_step
        parts = codec.encode(
            state,
            run=self.directory.name,
            config=yamlio.dumps(self.config.plain()),
            numerics=json.dumps(self.assembly.numerics),
        )
        digest = self.store.publish(step, parts)
        self.directory.append_ledger("checkpoint", step=step, file=codec.file_name(step), sha256=digest)
        self.report(f"saved {codec.file_name(step)}")
        self.store.prune(step, self.config.checkpoint.keep_last)

    def _record_start(self, number: int) -> None:
        holder = {"host": os.uname().nodename, "pid": os.getpid(), "argv": sys.argv, "version": __version__}
        self.directory.append_ledger(
            "start",
            segment=number,
            step=self.start,
            target=self.target,
            restored=self.restored,
            **holder,
            numerics=self.assembly.numerics,
            data=self.assembly.data_fingerprint(),
            **self.facts,
        )

    def _record_end(self, number: int, reason: str) -> None:
        step = self.state.counters.global_step
        self.directory.append_ledger("end", segment=number, step=step, local_step=step - self.start, reason=reason)


@contextlib.contextmanager
def create(config: Config, directory: RunDirectory, hooks: Sequence[Hook] = ()) -> Iterator[Segment]:
    """Make a fresh run, and hold it. ConfigError if one is there already; nothing is left behind on an error."""
    directory.refuse_run()
    assembly = prepare(config, hooks)
    config = assembly.config
    directory.make()
    with directory.lock():
        directory.refuse_run()
        directory.clear_temporaries()
        directory.clear_stillborn()
        directory.freeze_config(config.plain())
        yield Segment(directory, assembly, target=config.target(config.initial_step), restored=None)


@dataclass(frozen=True)
class ResumeOptions:
    """What a resume may ask for beside the run itself."""

    document: yamlio.Document | None = None  # a config file given anew
    assignments: tuple[str, ...] = ()
    allow_change: tuple[str, ...] = ()
    stop: Stop | None = None
    from_step: int | None = None
    strict_numerics: bool = False


@contextlib.contextmanager
def resume(directory: RunDirectory, options: ResumeOptions, say: Say, hooks: Sequence[Hook] = ()) -> Iterator[Segment]:
    """Restore the newest good checkpoint (or `from_step`) into a fresh assembly, and hold the run."""
    with directory.lock():
        directory.clear_temporaries()
        base = configs.parse(directory.newest_config())
        config = _changed_config(base, options, directory)
        changed = configs.changes(base, config)
        configs.refuse_unknown(options.allow_change, base, config)
        configs.refuse_locked(changed, options.allow_change)
        assembly = assemble(config, hooks)
        store, ledger = Store(directory.checkpoints), directory.read_ledger()
        with store.newest(say) if options.from_step is None else store.open(options.from_step) as reader:
            codec.restore(reader, assembly.state)
            header, name = reader.header, reader.name
        assembly.task.check_counters(assembly.state.counters, config.initial_step)
        _check_data(assembly, ledger, options)
        step = header.global_step
        stop_changed = any(change["key"].startswith("stop.") for change in changed)
        segment = Segment(
            directory, assembly, target=_target(config, options, ledger, step, stop_changed), restored=name
        )
        segment.facts = _numerics_facts(header.numerics, assembly.numerics, options.strict_numerics, say)
        if changed:
            segment.facts |= {"changes": changed, "config": config.plain()}
        if options.from_step is not None:
            segment.facts["set_aside"] = _set_aside_later(store, step, segment.target, say)
        yield segment


def _changed_config(base: Config, options: ResumeOptions, directory: RunDirectory) -> Config:
    if options.document is None:
        document = yamlio.Document(base.plain(), {(): str(directory.config)})
    else:
        document = options.document
    for assignment in options.assignments:
        document.set(assignment)
    config = configs.parse(document)
    # what was left open when the run started was decided then
    open_keys = [key for key, value in configs.flatten(config.numerics.model_dump()).items() if value == "auto"]
    decided = [f"numerics.{key}" for key in open_keys] + config.horizon_keys()
    decided += ["data.n_classes"] if config.data.n_classes is None else []
    before = configs.flatten(base.plain())
    return config.with_values({key: before.get(key) for key in decided})


def _target(config: Config, options: ResumeOptions, ledger: list[dict[str, Any]], step: int, changed: bool) -> int:
    # 1. what this command asks for  2. a changed stop section  3. the newest recorded target
    if options.stop is not None:
        return options.stop.last_step if options.stop.last_step is not None else step + (options.stop.num_steps or 0)
    recorded = rundir.newest_target(ledger)
    return config.target(step) if changed or recorded is None else recorded


def _check_data(assembly: Assembly, ledger: list[dict[str, Any]], options: ResumeOptions) -> None:
    recorded = [row["data"] for row in ledger if row["event"] == "start"]
    if recorded and recorded[-1] != assembly.data_fingerprint() and "data" not in options.allow_change:
        origins = ", ".join(source.origin for source in assembly.sources)
        raise ConfigError(
            f"{origins}: the data are not those that the run was trained on; a resume would not be exact; "
            "bring them back, or pass --allow-change data"
        )


def _numerics_facts(recorded: str, here: dict[str, Any], strict: bool, say: Say) -> dict[str, Any]:
    differences = numerics.differences(json.loads(recorded), here)
    if not differences:
        return {"exact": True}
    words = "; ".join(differences)
    if strict:
        raise NumericsError(f"not exact on this machine: {words}; resume where they agree, or drop --strict-numerics")
    say(f"warning: no longer exact: this machine computes other last bits ({words}); the ledger records it")
    return {"exact": False, "inexact_because": differences}


def _set_aside_later(store: Store, step: int, target: int, say: Say) -> list[str]:
    if step >= target:
        return []
    aside = [store.set_aside(later).name for later in store.steps() if later > step]
    if aside:
        say(f"going back to step {step}: later checkpoints are kept as {', '.join(aside)}")
    return aside
