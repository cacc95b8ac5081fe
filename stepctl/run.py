"""The composition root: a fresh run and a resumed one come from the same assembly."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from stepctl import __version__, numerics, rundir, shell, yamlio
from stepctl import config as configs
from stepctl.assembly import Assembly, assemble, prepare
from stepctl.checkpoint import codec, names
from stepctl.checkpoint.expected import missing_checkpoints, newer_missing, pending_set_aside
from stepctl.checkpoint.store import Accept, Store
from stepctl.comm import ALONE, Comm
from stepctl.config import Config, Stop
from stepctl.determinism import find_difference
from stepctl.errors import CheckpointError, ConfigError, UnreadableError
from stepctl.hooks.base import Hook
from stepctl.rundir import RunDirectory
from stepctl.segment import Say, Segment, inexact, silent
from stepctl.state import GLOBAL_STEP

_PUT_BACK = "put config.yaml back, or pass {allow_change} to stepctl resume"


@contextlib.contextmanager
def create(
    config: Config, directory: RunDirectory, say: Say = silent, hooks: Sequence[Hook] = (), comm: Comm = ALONE
) -> Iterator[Segment]:
    """Make a fresh run, and hold it. ConfigError if one is there already; nothing is left behind on an error."""
    directory.refuse_run()
    assembly = prepare(config, hooks, comm, say)
    _ = assembly.data_fingerprint  # it may read all data: now, while a signal still ends the command at once
    config = assembly.config
    target = config.target(config.initial_step)
    if (difference := find_difference(assembly)) is not None:
        say(f"warning: {difference}")
    with founded(directory, config, say) as run_id:
        for note in horizon_notes(assembly, target, locked=False):
            say(f"note: {note}")
        yield Segment(directory, assembly, say, run_id=run_id, target=target, restored=None)


@contextlib.contextmanager
def founded(directory: RunDirectory, config: Config, say: Say) -> Iterator[str]:
    """Make the directory of a new run with its frozen config, hold it, and yield the run's new id.

    RunExistsError if a run began there since.
    """
    directory.make()
    with directory.lock(say):
        directory.refuse_run()
        directory.clear_temporaries()
        directory.clear_stillborn()
        directory.freeze_config(config.text)
        yield rundir.new_run_id()


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
def resume(
    directory: RunDirectory,
    options: ResumeOptions,
    say: Say = silent,
    hooks: Sequence[Hook] = (),
    comm: Comm = ALONE,
) -> Iterator[Segment]:
    """Restore the newest good checkpoint (or `from_step`) into a fresh assembly, and hold the run."""
    with directory.lock(say):
        directory.clear_temporaries()
        directory.mend_ledger(say)
        base = configs.parse(directory.newest_config())
        config = changed_config(base, options, directory)
        changed = configs.changes(base, config)
        configs.refuse_unknown(options.allow_change, base, config)
        ledger = directory.read_ledger()
        moved = moved_files(changed, config, ledger)
        configs.refuse_locked([change for change in changed if change not in moved], options.allow_change)
        assembly = assemble(config, hooks, comm=comm)
        _check_data(assembly, ledger, options, moved, say)
        if moved:
            paths = ", ".join(f"{change['key']}: {change['old']} -> {change['new']}" for change in moved)
            say(f"note: the data are the same under another path ({paths})")
        store = Store(directory.checkpoint_folder, directory.records)
        if options.from_step is None:  # else the newer order replaces one that was broken off
            store.set_aside_all(pending_set_aside(ledger))
        data_files = config.data_files()
        excused = excused_keys(ledger, changed) | set(options.allow_change) | data_files

        asked = {change["key"] for change in changed} | data_files

        def accept(reader: codec.Reader) -> None:
            words = check_same_run(reader.name, reader.header.config, config.plain(), excused)
            codec.restore(reader, assembly.state)
            check_counters(assembly, excused)
            for line in (line for key, line in words.items() if key not in asked):
                say(line)

        back = options.from_step
        with _newest(store, directory, say, accept) if back is None else store.open(back, accept) as reader:
            header, name = reader.header, reader.name
        step = header.global_step
        if back is None:
            report_missing(directory, store, step, say)
        assembly.trial()
        records = directory.records()
        # none: format version 1 began the run, or the ledger is lost
        run_id = records.run_id or header.run_id or rundir.new_run_id()
        if step not in records.acknowledged.values():  # a kill came between the file and its line
            directory.append_ledger("checkpoint", step=step, file=name, sha256=header.sha256, pruned=[])
        for watch in assembly.forget(watched_with(header, base)):
            say(f"note: {watch} goes by something else from here on, and begins anew")
        target = target_of(config, options, ledger, step, changed)
        segment = Segment(directory, assembly, say, run_id=run_id, target=target, restored=name)
        for note in horizon_notes(assembly, segment.target, locked=True):
            say(f"note: {note}")
        segment.facts = _numerics_facts(header.numerics, assembly.numerics, options.strict_numerics, say)
        if header.created_by != f"stepctl {__version__}":
            here = f"stepctl {__version__}"
            say(f"note: {name} was written by {header.created_by}, this is {here}; the ledger records it")
            segment.facts["version_before"] = header.created_by
        if changed:
            segment.facts |= {"changes": changed, "config": config.plain()}
        segment.goes_back, segment.strict = options.from_step is not None, options.strict_numerics
        yield segment


def _newest(store: Store, directory: RunDirectory, say: Say, accept: Accept) -> codec.Reader:
    """Open the newest good checkpoint; an UnreadableError also says how to give up what cannot be read."""
    try:
        return store.newest(say, accept)
    except UnreadableError as error:
        older = shell.command("resume", directory.path, "--from-step", "N")
        raise UnreadableError(f"{error}; or go back to an older checkpoint with: {older}") from error


def report_missing(directory: RunDirectory, store: Store, step: int, say: Say) -> None:
    """Report checkpoints after `step`, the newest good one, that the ledger acknowledges and that are gone."""
    message = newer_missing(missing_checkpoints(directory.read_ledger, store.steps), step)
    if message is not None:
        say(message)


def changed_config(base: Config, options: ResumeOptions, directory: RunDirectory) -> Config:
    """Return a run's newest config with what a resume asks for; what was left open when the run started stays."""
    if options.document is None:
        document = yamlio.Document(base.plain(), {(): str(directory.shown(directory.config))})
    else:
        document = options.document
    for assignment in options.assignments:
        document.set(assignment)
    _replace_stop(document, options.assignments)
    config = configs.parse(document)
    open_keys = [key for key, value in yamlio.flatten(config.numerics.model_dump()).items() if value == "auto"]
    decided = [f"numerics.{key}" for key in open_keys] + list(config.horizon_keys())
    decided += ["data.n_classes"] if config.data.n_classes is None else []
    before = yamlio.flatten(base.plain())
    for key in config.horizon_keys():
        if before.get(key) is None:
            raise ConfigError(f"{key}: is missing; a schedule that comes with a resume needs its own horizon")
    return config.with_values({key: before.get(key) for key in decided})


def _replace_stop(document: yamlio.Document, assignments: Sequence[str]) -> None:
    # a run that has the one kind of stop may be given the other
    keys = {assignment.partition("=")[0] for assignment in assignments}
    for given, other in (("stop.last_step", "stop.num_steps"), ("stop.num_steps", "stop.last_step")):
        if given in keys and other not in keys:
            document.put(other, None, given)


def check_same_run(
    file: str, text: str, plain: Mapping[str, Any], excused: set[str], remedy: str = _PUT_BACK
) -> dict[str, str]:
    """Return in words, by key, what is excused; CheckpointError if a locked key of `plain` differs that is not.

    `text` is the config that a checkpoint, a `file`, was made with.
    """
    # as plain values: what a checkpoint names is never imported
    made_with = yamlio.flatten(yamlio.loads(text, f"{file}:/config").value)
    words = {}
    for key, value in yamlio.flatten(plain).items():
        if configs.policy(key) == "live" or made_with.get(key, value) == value:
            continue
        if not any(f"{key}.".startswith(f"{name}.") for name in excused):
            raise CheckpointError(
                "config",
                f"{file}: made with another config ({key}: {made_with[key]}, not {value}); "
                + remedy.format(key=key, allow_change=shell.options("--allow-change", key)),
            )
        words[key] = f"{file} was made with {key} {made_with[key]}; going on with {value}"
    return words


def check_counters(assembly: Assembly, excused: set[str]) -> None:
    """Raise CheckpointError if the counters do not belong together, unless what relates them was changed."""
    if not any(key.partition(".")[0] in ("task", "initial_step") for key in excused):
        assembly.task.check_counters(assembly.state.counters, assembly.config.initial_step)


def watched_with(header: codec.Header, config: Config) -> Config:
    """Return a config with what decides the watches as it was when a checkpoint was made.

    The newest config may be of a segment that ended before it saved, or come after the checkpoint.
    """
    made_with = yamlio.loads(header.config, f"{names.file_name(header.global_step)}:/config").value
    plain = config.plain()
    kept = {section: made_with.get(section, plain[section]) for section in ("task", "stop", "evaluate")}
    try:
        return Config.model_validate(plain | kept)
    except ValidationError as error:
        raise CheckpointError("config", f"step {header.global_step}: its config is none of this version's") from error


def excused_keys(ledger: list[dict[str, Any]], changed: list[dict[str, Any]]) -> set[str]:
    """Return the keys in which a checkpoint may differ from the config: those that a resume changed, or this one."""
    rows = [row.get("changes", ()) for row in ledger if row["event"] == "start"]
    return {change["key"] for changes in [*rows, changed] for change in changes}


def target_of(
    config: Config, options: ResumeOptions, ledger: list[dict[str, Any]], step: int, changed: list[dict[str, Any]]
) -> int:
    """Return the absolute step that a resume from `step` goes on to."""
    # 1. what this command asks for  2. a changed stop section  3. the newest recorded target
    if options.stop is not None:
        return options.stop.last_step if options.stop.last_step is not None else step + (options.stop.num_steps or 0)
    recorded = rundir.newest_target(ledger)
    stop_changed = any(change["key"] in ("stop.last_step", "stop.num_steps") for change in changed)
    return config.target(step) if stop_changed or recorded is None else recorded


def horizon_notes(assembly: Assembly, target: int, *, locked: bool) -> Iterator[str]:
    """Yield a note for each decay that ends before the target: which rate is left, and how to change that.

    `locked`: whether a resume needs --allow-change for it.
    """
    for rate_key, rate in assembly.config.rates().items():
        horizon = rate.get("decay_steps") if rate["name"] in ("cosine", "polynomial") else None
        counter = rate.get("counter", GLOBAL_STEP)
        there = assembly.count_at(counter, target)
        if horizon is not None and there > horizon:
            key = f"{rate_key}.decay_steps"
            remedy = ["--set", f"{key}={there}"]
            if locked:
                remedy += ["--allow-change", key]
            of = "step" if counter == GLOBAL_STEP else counter
            left = f"{rate['end']:g}"
            if rate["end"] == 0:
                left = "0, which changes no weight"
            yield (
                f"the learning rate's decay ends at {of} {horizon}; from there to {there} the rate is {left} "
                f"(to stretch the decay: {shell.options(*remedy)})"
            )


def moved_files(changed: list[dict[str, Any]], config: Config, ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the changes that name other data files; none if the ledger does not record which data they should hold."""
    if rundir.newest_data(ledger) is None:
        return []
    data_files = config.data_files()
    return [change for change in changed if change["key"] in data_files]


def _check_data(
    assembly: Assembly, ledger: list[dict[str, Any]], options: ResumeOptions, moved: list[dict[str, Any]], say: Say
) -> None:
    recorded = rundir.newest_data(ledger)
    if recorded is None or assembly.has_data(recorded):
        return
    if "data" in options.allow_change:
        assembly.check_data(say)
        return
    paths = "".join(f"{change['key']}: {change['old']} -> {change['new']}: " for change in moved[:1])
    raise ConfigError(
        f"{paths}{assembly.origins}: the data are not those that the run was trained on; a resume would not be exact; "
        "bring them back, or pass --allow-change data to stepctl resume"
    )


def _numerics_facts(recorded: str, here: dict[str, Any], strict: bool, say: Say) -> dict[str, Any]:
    differences = numerics.differences(json.loads(recorded), here)
    if not differences:
        return {"exact": True}
    return inexact(differences, strict, say)
