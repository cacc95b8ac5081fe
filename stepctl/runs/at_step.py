"""Opening an existing run at one of its steps, which resume, plan, replay and fork share.

run = read_run(read_records(directory))
assembly = assemble(changed_config(run, options))
at = open_at_step(run, lambda step: assembly, step=None, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepctl.checkpoint import codec
from stepctl.checkpoint.expected import describe_missing, missing_checkpoints
from stepctl.checkpoint.retention import best_steps
from stepctl.checkpoint.store import Store
from stepctl.config import yaml
from stepctl.config.changes import HOOKS
from stepctl.config.model import Config, KeepBestConfig, StopConfig, TaskConfig, parse_config
from stepctl.config.registry import is_builtin
from stepctl.errors import CheckpointError, ConfigError
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger
from stepctl.runs.compatibility import (
    RESTORE_CONFIG,
    Changes,
    check_locked_keys,
)
from stepctl.runs.messages import Say
from stepctl.runs.records import RunRecords
from stepctl.state.counters import GLOBAL_STEP
from stepctl.system import shell
from stepctl.training.assembly import Assembly, with_stored_hooks
from stepctl.writers.evaluation_history import EvaluationHistory

if TYPE_CHECKING:
    from stepctl.mirror.claimed import ClaimedMirror


class ResumeOptions(NamedTuple):
    """The options of a resume.

    `document` is the config to resume with (None: the run's newest), and `assignments` the KEY=VALUE
    texts that were applied to it. `take_over` claims the mirror even if its owner may be alive, and
    `claimed` is a mirror that was claimed before.
    """

    document: yaml.Document | None = None
    assignments: tuple[str, ...] = ()
    allow_change: tuple[str, ...] = ()
    stop: StopConfig | None = None
    from_step: int | None = None
    strict_numerics: bool = False
    take_over: bool = False
    claimed: ClaimedMirror | None = None


class RunFiles(NamedTuple):
    """A run: its ledger, its newest config, and its checkpoints."""

    directory: RunDirectory
    ledger: Ledger
    config: Config
    store: Store


def read_run(records: RunRecords) -> RunFiles:
    """Check the newest config of a run, except its hooks; ConfigError if it is wrong."""
    directory = records.directory
    # with other hooks a resume needs no module of the former ones
    config = parse_config(records.document, unchecked=(HOOKS,))
    store = Store(directory.checkpoint_folder, lambda: records.ledger)
    return RunFiles(directory, records.ledger, config, store)


class RunAtStep(NamedTuple):
    """An assembly whose state was restored from the checkpoint `file`.

    `differences` has a message for each locked key in which the checkpoint's config is allowed to
    differ.
    """

    assembly: Assembly
    header: codec.Header
    file: str
    differences: dict[str, str]

    @property
    def step(self) -> int:
        """The restored global step."""
        return self.header.global_step


def open_at_step(
    run: RunFiles,
    build: Callable[[int], Assembly],
    *,
    step: int | None,
    say: Say,
    may_differ: Collection[str],
    counters_may_differ: bool = False,
    skip_unfit: bool = True,
    remedy: str = RESTORE_CONFIG,
) -> RunAtStep:
    """Restore the checkpoint of `step`, or the newest good one.

    `build` returns the assembly for a step; its state is overwritten. The assembly's config is
    compared with the checkpoint's: `may_differ` are locked keys, or sections, that may differ, and
    `remedy` ends the message about any other. With `skip_unfit` a newest checkpoint that does not
    fit is reported and an older one is used. CheckpointError if no checkpoint can be used;
    UnreadableError if one cannot be read now.
    """
    restored: list[RunAtStep] = []

    def restore(reader: codec.Reader) -> None:
        header = reader.header
        assembly = with_stored_hooks(build(header.global_step), reader.array_shapes())
        differences = check_locked_keys(
            reader.name, header.config, assembly.config.plain(), may_differ, remedy
        )
        _restore(reader, assembly, may_differ, say)
        if not counters_may_differ:
            assembly.task.check_counters(assembly.state.counters, assembly.config.initial_step)
        restored.append(RunAtStep(assembly, header, reader.name, differences))

    if not skip_unfit:
        with _open(run.store, step, say) as reader:
            restore(reader)
    elif step is None:
        run.store.newest(say, restore).close()
    else:
        run.store.open(step, restore).close()
    at = restored[-1]
    if step is None:
        _report_missing(run.directory, run.ledger, at.step, say)
    return at


def _restore(
    reader: codec.Reader, assembly: Assembly, may_differ: Collection[str], say: Say
) -> None:
    """Restore a checkpoint; report hooks without saved state, and saved state without its hook."""
    fresh, dropped = set[str](), set[str]()
    made_with = yaml.loads(reader.header.config, f"{reader.name}:/config").value
    if HOOKS in may_differ and made_with.get(HOOKS, []) != assembly.config.hook_specs:
        saved = codec.saved_hooks(reader)
        fresh = {hook.name for hook in assembly.state.hooks} - saved
        fresh -= {hook.name for hook in assembly.hooks if is_builtin(hook)}
        dropped = saved - {hook.name for hook in assembly.state.hooks}
    codec.restore(reader, assembly.state, fresh | dropped)
    for name in sorted(fresh):
        say(f"note: {reader.name} has no state of the hook {name}, which starts anew")
    for name in sorted(dropped):
        say(f"note: the hook {name} is gone; its state in {reader.name} is not used")


def _open(store: Store, step: int | None, say: Say) -> codec.Reader:
    """Open the newest good checkpoint, or the one of `step`; its errors name the other steps."""
    if step is None:
        return store.newest(say)
    try:
        return store.open(step)
    except CheckpointError as error:
        if error.code == "none":
            raise
        others = ", ".join(str(other) for other in store.steps() if other != step) or "none"
        raise CheckpointError(error.code, f"{error}; available steps: {others}") from error


def open_checkpoint(records: RunRecords, *, step: int | None, best: bool, say: Say) -> codec.Reader:
    """Open the newest good checkpoint of a run, the one of `step`, or the `best` one.

    Nothing is compared with the run's config. Errors as in `open_at_step`; ConfigError for the best
    one of a run that does not keep it.
    """
    store = Store(records.directory.checkpoint_folder, lambda: records.ledger)
    if best:
        step = _best_step(records, store)
    reader = _open(store, step, say)
    if step is None:
        _report_missing(records.directory, records.ledger, reader.header.global_step, say)
    return reader


def _best_step(records: RunRecords, store: Store) -> int:
    """Return the step of the best checkpoint, as `checkpoint.keep_best` decides."""
    path = records.directory.path
    section = records.document.value.get("checkpoint")
    spec = section.get("keep_best") if isinstance(section, dict) else None
    if spec is None:
        steps = ", ".join(map(str, store.steps())) or "none"
        raise ConfigError(
            f"{path}: the run keeps no best checkpoint (checkpoint.keep_best); name a step: {steps}"
        )
    keep_best = KeepBestConfig.model_validate(spec)
    evaluations = EvaluationHistory(records.directory.read_metrics("eval"))
    found = best_steps(store.steps(), keep_best, evaluations.rows)
    if not found:
        raise CheckpointError(
            "none", f"{path}: no checkpoint has an evaluation of {keep_best.metric}; name a step"
        )
    return found[0]


def _report_missing(directory: RunDirectory, ledger: Ledger, step: int, say: Say) -> None:
    """Report missing checkpoints that are newer than `step`, the newest good one."""
    message = describe_missing(missing_checkpoints(directory, ledger), step)
    if message is not None:
        say(message)


def changed_config(run: RunFiles, options: ResumeOptions) -> Config:
    """Return the config of a resume.

    A key that was "auto" or open when the run started keeps the value that was decided then.
    ConfigError if the config is wrong.
    """
    if options.document is None:
        return run.config
    _replace_stop(options.document, options.assignments)
    config = parse_config(options.document)
    open_keys = [
        f"numerics.{key}"
        for key, value in config.numerics.deciding_bits().items()
        if value == "auto"
    ]
    if isinstance(config, TaskConfig):
        open_keys += config.open_data_keys()
    before = yaml.flatten(run.config.plain())
    for key in config.horizon_keys():
        if before.get(key) is None:
            raise ConfigError(
                f"{key}: is missing; set it, because a schedule that a resume adds has no default "
                "horizon"
            )
        open_keys.append(key)
    if not open_keys:
        return config
    return config.with_values({key: before.get(key) for key in open_keys})


def _replace_stop(document: yaml.Document, assignments: Sequence[str]) -> None:
    """Remove the run's kind of stop (a step, or a number of steps) where --set gives the other."""
    keys = {assignment.partition("=")[0] for assignment in assignments}
    for given, other in (
        ("stop.last_step", "stop.num_steps"),
        ("stop.num_steps", "stop.last_step"),
    ):
        if given in keys and other not in keys:
            document.put(other, None, given)


def target_of(
    run: RunFiles, config: Config, stop: StopConfig | None, step: int, changes: Changes
) -> int:
    """Return the absolute step that a resume from `step` trains to.

    The first of: the `stop` that the command gives, a stop section that `changes` name, the newest
    target in the ledger, the config's.
    """
    if stop is not None:
        if stop.last_step is not None:
            return stop.last_step
        return step + (stop.num_steps or 0)
    stop_changed = any(change["key"] in ("stop.last_step", "stop.num_steps") for change in changes)
    if stop_changed or run.ledger.target is None:
        return config.target(step)
    return run.ledger.target


def horizon_notes(assembly: Assembly, target: int, *, locked: bool) -> Iterator[str]:
    """Yield a note for each learning-rate decay that ends before the target.

    The note has the option that stretches the decay; in an existing run (`locked`) it needs
    --allow-change.
    """
    for rate_key, rate in assembly.config.rates().items():
        if rate["name"] not in ("cosine", "polynomial") or rate.get("decay_steps") is None:
            continue
        horizon = rate["decay_steps"]
        counter = rate.get("counter", GLOBAL_STEP)
        end = assembly.count_at(counter, target)
        if end <= horizon:
            continue
        key = f"{rate_key}.decay_steps"
        remedy = ["--set", f"{key}={end}"]
        if locked:
            remedy += ["--allow-change", key]
        counted = "step" if counter == GLOBAL_STEP else counter
        left = f"{rate['end']:g}"
        if rate["end"] == 0:
            left = "0, which changes no weight"
        yield (
            f"the learning rate's decay ends at {counted} {horizon}; from there to {end} the rate "
            f"is {left} (to stretch the decay: {shell.options(*remedy)})"
        )
