"""Building a run from its config.

`resolve` decides every open value of the config, and `build` makes the parts from the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from stepctl.checkpoint import codec
from stepctl.config.model import Config, ProgramConfig, ScriptConfig, TaskConfig
from stepctl.config.registry import has_user_components
from stepctl.data.base import Sources
from stepctl.data.batches import EvaluationBatches, TrainingBatches
from stepctl.distributed.comm import SINGLE_PROCESS, Comm
from stepctl.errors import ConfigError
from stepctl.hooks.base import Hook, hook_states
from stepctl.hooks.evaluate import Evaluate
from stepctl.hooks.log import Log
from stepctl.hooks.watch import MetricWatch
from stepctl.optimizers.moving_average import MovingAverage
from stepctl.programs.learner import Learner
from stepctl.state.train_state import TrainState
from stepctl.system import optional
from stepctl.system.closing import close_on_error
from stepctl.training.assembly import Assembly, TaskAssembly, build_watches
from stepctl.training.checks import check_hooks, check_samples, check_target
from stepctl.training.resolve import ResolvedConfig, build_hooks, resolve
from stepctl.writers.row_buffer import RowBuffer
from stepctl.writers.series import SeriesBuffer


def prepare(
    config: Config,
    hooks: Sequence[Hook] = (),
    comm: Comm = SINGLE_PROCESS,
    say: Callable[[str], None] = lambda line: None,
) -> Assembly:
    """Assemble a fresh run, read all its data once, and try its first step."""
    if isinstance(config, ScriptConfig):
        raise ConfigError(f"script: {config.script} makes the steps of this run; run the script")
    check_target(config)
    assembly = assemble(config, hooks, comm=comm, record_numerics=True)
    with close_on_error(assembly):
        assembly.check_data(say)
        assembly.trial()
    return assembly


def assemble(
    config: Config,
    hooks: Sequence[Hook] = (),
    *,
    target: int | None = None,
    comm: Comm = SINGLE_PROCESS,
    sources: Sources | None = None,
    record_numerics: bool = False,
    restored: bool = False,
) -> Assembly:
    """Build the parts of a run. ConfigError or DataError if they do not fit.

    `hooks` are the caller's own, besides those of the config; their arrays become part of the state.
    `target` is the global step at which an open decay ends (None: the config's own target). With
    `restored` a checkpoint is to be read into the state, so that weights need no initial values.
    See `resolve` for the others.
    """
    if target is None:
        target = config.target(config.initial_step)
    try:
        if isinstance(config, ProgramConfig):
            from stepctl.training.build_program import assemble_program

            return assemble_program(config, hooks, comm=comm, record_numerics=record_numerics)
        if isinstance(config, ScriptConfig):
            from stepctl.training.build_program import assemble_stored

            return assemble_stored(config, hooks)
        assert isinstance(config, TaskConfig)
        resolved = resolve(
            config, target=target, comm=comm, sources=sources, record_numerics=record_numerics
        )
        return build(resolved, hooks, restored=restored)
    except (MemoryError, OverflowError) as error:
        raise ConfigError(
            f"model and batch do not fit in memory ({error}); make them smaller"
        ) from error


def build(
    resolved: ResolvedConfig, hooks: Sequence[Hook] = (), *, restored: bool = False
) -> TaskAssembly:
    """Build the state, the batches and the hooks of a resolved config."""
    config = resolved.config
    task = resolved.task
    state = initial_state(resolved, restored=restored)
    numerics = resolved.numerics
    if task.needs_autograd:
        numerics = {**numerics, "autograd": optional.version("autograd")}
    training = TrainingBatches(
        resolved.training,
        seed=config.seed,
        batch_size=config.data.batch_size,
        dtype=config.dtype,
        order=config.data.order,
        per_step=task.batches_per_step,
        rank=resolved.sharing.rank,
        ranks=resolved.sharing.size,
    )
    validation = None
    watches: list[MetricWatch] = []
    if resolved.validation is not None:
        validation = EvaluationBatches(
            resolved.validation, batch_size=config.data.batch_size, dtype=config.dtype
        )
        watches = build_watches(config, task)
    rows = RowBuffer()
    own_hooks = _own_hooks(resolved, rows, watches, validation)
    config_hooks, hook_stop = build_hooks(config)
    all_hooks = [*own_hooks, *watches, hook_stop, *config_hooks, *hooks]
    check_hooks(all_hooks)
    state = replace(state, hooks=hook_states(all_hooks))
    codec.check_storable(state)
    if config.samples is not None:
        check_samples(config.samples, task, state, resolved.sources[0].sample_shape)
    return TaskAssembly(
        config=config,
        numerics=numerics,
        task=task,
        sources=resolved.sources,
        training=training,
        validation=validation,
        rows=rows,
        watches=watches,
        hooks=all_hooks,
        state=state,
        comm=resolved.comm,
        series=SeriesBuffer(),
        hook_stop=hook_stop,
    )


def _learners(resolved: ResolvedConfig, *, initialize: bool) -> dict[str, Learner]:
    config = resolved.config
    average = None
    if config.ema is not None:
        average = MovingAverage(config.ema.decay, config.ema.warmup)
    return {
        name: Learner(
            name,
            model,
            resolved.optimizers[name],
            resolved.shapes[name],
            seed=config.seed,
            dtype=config.dtype,
            threads=resolved.numerics["threads"],
            average=average,
            norms=config.log.norms or config.log.tensorboard,
            initialize=initialize,
        )
        for name, model in resolved.models.items()
    }


def initial_state(resolved: ResolvedConfig, *, restored: bool = False) -> TrainState:
    """Attach the learners to the task, and return the state before the first update.

    With `restored`, weights stay zero, which takes neither time nor memory, unless code of the user
    may do more than fill them.
    """
    config = resolved.config
    task = resolved.task
    initialize = not restored or has_user_components()
    task.attach(_learners(resolved, initialize=initialize), resolved.sharing)
    try:
        state = task.initial_state(config.initial_step)
    except ValueError as error:
        names = ", ".join(spec["name"] for spec in config.model.specs().values())
        raise ConfigError(f"model: {names}: {error}") from error
    writable = [folder for folder, arena in state.arenas.items() if not arena.read_only]
    if writable and task.sliced:
        raise ConfigError(
            f"task.name: {config.task.name} writes arrays of its own ({writable[0]}): set sliced = "
            "False"
        )
    return replace(state, preprocessing=resolved.sources[0].preprocessing_arrays())


def _own_hooks(
    resolved: ResolvedConfig,
    rows: RowBuffer,
    watches: list[MetricWatch],
    validation: EvaluationBatches | None,
) -> list[Hook]:
    """Return the hooks that write the training and evaluation rows."""
    config = resolved.config
    task = resolved.task
    names = [*task.training_metrics]
    for learner in task.learners.values():
        names += learner.metric_names()
    log = Log(
        config.log,
        rows,
        names,
        first_step=config.initial_step + 1,
        n_samples=resolved.training.n,
    )
    if validation is None:
        return [log]
    return [log, Evaluate(config.evaluate, task, validation, rows, watches)]
