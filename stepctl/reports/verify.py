"""Checks of a checkpoint, or of a run: its files, ledger, config and metrics. Nothing is changed."""

import itertools
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepctl.checkpoint import names
from stepctl.checkpoint.check import CheckedFile, check
from stepctl.checkpoint.expected import expected_checkpoints, missing_checkpoints
from stepctl.checkpoint.store import refuse_other_run
from stepctl.config import yaml
from stepctl.config.cadence import Cadence, Steps
from stepctl.config.changes import HOOKS
from stepctl.config.model import KEYS
from stepctl.errors import CheckpointError, ConfigError, StepctlError, UnreadableError
from stepctl.reports.inspect import refuse_other_folder
from stepctl.rundir import series
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger
from stepctl.rundir.series import series_folder
from stepctl.runs.compatibility import check_locked_keys
from stepctl.state.counters import GLOBAL_STEP
from stepctl.system import files
from stepctl.system.sandbox import Sandbox
from stepctl.system.text import counted

_MISSING_ROWS = 100  # reported of each segment, at least

_SECTIONS = {
    "train": "log",
    "eval": "evaluate",
}  # of a config, by the kind of the rows they ask for


class FileProblem(NamedTuple):
    """A problem with one file: a short code, the file's name, and a message."""

    code: str
    file: str
    message: str


Verification = tuple[list[CheckedFile], list[FileProblem]]  # the good checkpoints, the problems


@dataclass
class TrainedSteps:
    """The steps of one segment that no later segment discarded: after `first`, up to `last`."""

    first: int
    last: int
    config: dict[str, Any]


def verify(path: str, report: Callable[[float], None] = lambda share: None) -> Verification:
    """Check a checkpoint (digest, structure, step numbers), or all files and records of a run.

    `report` gets the share of the files that are checked.
    """
    if not files.is_directory(path):
        return verify_files([path], report)
    directory = RunDirectory(path)
    refuse_other_folder(directory)
    steps = names.steps(directory.checkpoint_folder.names())
    paths = [str(directory.checkpoints / names.file_name(step)) for step in steps]
    good, problems = verify_files(paths, report)
    gone = {
        problem.file
        for problem in problems
        if not files.exists(directory.checkpoints / problem.file)
    }
    # before the ledger is read: a job writes its last line before it releases the lock
    is_in_use = directory.holder() is not None
    ledger = directory.read_ledger()
    # pruned since they were listed: they were gone before the ledger was read
    pruned = gone - {names.file_name(step) for step in expected_checkpoints(ledger)}
    problems = [
        *(problem for problem in problems if problem.file not in pruned),
        *check_ledger(directory, ledger, good, is_in_use=is_in_use),
        *check_config(directory, ledger, good),
        *check_metrics(directory, ledger),
        *check_series(directory, ledger),
    ]
    return good, problems


def verify_files(paths: list[str], report: Callable[[float], None]) -> Verification:
    """Check checkpoint files, in a sandbox."""
    good = []
    problems = []
    with Sandbox() as sandbox:
        for number, path in enumerate(paths):
            report(number / len(paths))
            name = os.path.basename(path)
            try:
                good.append(sandbox.call(check, path))
            except CheckpointError as error:
                problems.append(FileProblem(error.code, name, str(error)))
            except UnreadableError as error:
                problems.append(FileProblem("unreadable", name, str(error)))
    return good, problems


def check_ledger(
    directory: RunDirectory, ledger: Ledger, good: list[CheckedFile], *, is_in_use: bool
) -> Iterator[FileProblem]:
    """Compare the ledger with the good files: missing ones, and ones that it does not acknowledge.

    While a run is training, its newest file may not be acknowledged yet.
    """
    expected = expected_checkpoints(ledger)
    acknowledged = ledger.acknowledged
    for step in missing_checkpoints(directory, ledger):
        name = names.file_name(step)
        yield FileProblem("lost", name, f"{name}: acknowledged in ledger.jsonl, but missing")
    for file in good:
        name = file["name"]
        if expected.get(file["step"], file["sha256"]) != file["sha256"]:
            message = f"{name}: intact, but not the file that ledger.jsonl acknowledges"
            yield FileProblem("other", name, message)
    for file in good:
        name = file["name"]
        try:
            refuse_other_run(name, file["run_id"], file["sha256"], ledger)
        except CheckpointError as error:
            yield FileProblem(error.code, name, str(error))
            continue
        is_newest = file["step"] > max(expected, default=-1)
        if file["sha256"] in acknowledged or (is_in_use and is_newest):
            continue
        message = f"{name}: intact, but not acknowledged in ledger.jsonl"
        if file["step"] not in expected:
            message += "; if the job was killed before it wrote that line, the next resume adds it"
        yield FileProblem("unknown", name, message)


def check_config(
    directory: RunDirectory, ledger: Ledger, good: list[CheckedFile]
) -> Iterator[FileProblem]:
    """Compare the config that a resume uses with the config of the newest good file."""
    name = directory.config.name
    if not files.exists(directory.config):
        message = f"{name}: missing, and resume needs it; each checkpoint has a copy in /config"
        yield FileProblem("config", name, message)
        return
    try:
        _check_config(directory, ledger, good)
    except StepctlError as error:
        text = str(error).splitlines()[0]
        text = text.removeprefix(f"{directory.display_path(directory.config)}: ")
        yield FileProblem("config", name, f"{name}: {text}")


def _check_config(directory: RunDirectory, ledger: Ledger, good: list[CheckedFile]) -> None:
    plain = directory.newest_config(ledger).value  # plain values: nothing that it names is imported
    if not isinstance(plain, dict):
        raise ConfigError("not the config of a run (not a mapping)")
    for key in plain:
        if key not in KEYS:
            raise ConfigError(f"not the config of a run (key {key!r})")
    if good:
        newest = good[-1]
        without_hooks = {key: value for key, value in plain.items() if key != HOOKS}
        check_locked_keys(newest["name"], newest["config"], without_hooks, ledger.changed_keys)


def check_metrics(directory: RunDirectory, ledger: Ledger) -> list[FileProblem]:
    """Compare metrics.jsonl with the ledger: duplicate rows, missing ones, and ones past the end.

    A resume may cut the file while it is read: a problem counts if a second reading finds it too.
    """
    found = _check_metrics(directory, ledger)
    if not found:
        return []
    again = _check_metrics(directory, directory.read_ledger())
    return [problem for problem in found if problem in again]


def _check_metrics(directory: RunDirectory, ledger: Ledger) -> list[FileProblem]:
    """Return the problems that one reading of the rows finds.

    A job writes the rows before the ledger's line of a checkpoint. The ledger is therefore read
    again after the rows: a row is required if both ledgers require it, and the later one gives the
    run's end.
    """
    first_config = _first_config(directory)
    before, _ = _trained_steps(ledger, first_config)
    unreadable: list[int] = []
    disorder: tuple[int, int] | None = None
    newest = 0
    steps_by_kind: dict[str, array[int]] = {}
    for row in directory.read_metrics(report=unreadable.append):
        step = row["step"]
        steps_by_kind.setdefault(str(row.get("kind")), array("q")).append(step)
        if step < newest and disorder is None:
            disorder = (step, newest)
        newest = max(newest, step)
    after, end = _trained_steps(directory.read_ledger(), first_config)

    problems: list[tuple[str, str]] = []
    if unreadable:
        lines = counted(len(unreadable), "line")
        problems.append(("line", f"{lines} without a row, from line {unreadable[0]} on"))
    if disorder is not None:
        step, earlier = disorder
        problems.append(("order", f"a row of step {step} after one of step {earlier}"))
    limit = sum(map(len, steps_by_kind.values())) + _MISSING_ROWS
    for kind in sorted({*steps_by_kind, *_SECTIONS}):
        steps, counts = np.unique(steps_by_kind.get(kind, array("q")), return_counts=True)
        for step in steps[counts > 1]:
            problems.append(("twice", f"two {kind} rows of step {step}"))
        required = np.intersect1d(
            _required_steps(before, kind, limit), _required_steps(after, kind, limit)
        )
        for step in np.setdiff1d(required, steps):
            problems.append(("row", f"the {kind} row of step {step} is missing"))
    if end is not None and newest > end:
        problems.append(("row", f"has a row of step {newest}, but the run ended at step {end}"))
    name = directory.metrics.name
    return [FileProblem(code, name, f"{name}: {text}") for code, text in problems]


def check_series(directory: RunDirectory, ledger: Ledger) -> Iterator[FileProblem]:
    """Check the order of the rows of each series, and their numbers against the ledger."""
    folder = series_folder(directory)
    newest = max(expected_checkpoints(ledger), default=0)
    recorded = ledger.series_rows(newest)
    known = series.names(folder)
    for name in sorted(recorded.keys() | {*known}):
        file_name = f"series/{name}.bin"
        found = 0
        if name in known:
            try:
                steps = series.read_steps(folder, name)
            except StepctlError as error:
                yield FileProblem("series", file_name, str(error))
                continue
            found = int((steps <= newest).sum())
            if (steps[1:] <= steps[:-1]).any():
                message = f"{file_name}: the steps of its rows are not in ascending order"
                yield FileProblem("series", file_name, message)
        n_rows = recorded.get(name)
        if n_rows is not None and n_rows != found:
            message = (
                f"{file_name}: has {counted(found, 'row')} up to step {newest}, not {n_rows:,}"
            )
            yield FileProblem("series", file_name, message)


def _trained_steps(
    ledger: Ledger, first_config: dict[str, Any]
) -> tuple[list[TrainedSteps], int | None]:
    """Return the trained steps of each segment, and the last step if the newest segment has ended."""
    segments: list[TrainedSteps] = []
    config = first_config
    end = None
    for event in ledger:
        if event["event"] == "start":
            step = event["step"]
            config = event.get("config") or config
            for segment in segments:
                segment.last = min(segment.last, step)  # the new segment repeats later steps
            segments.append(TrainedSteps(step, step, config))
            end = None
        elif event["event"] == "checkpoint" and segments:
            segments[-1].last = max(segments[-1].last, event["step"])
        elif event["event"] == "end":
            end = event["step"]
    return segments, end


def _required_steps(segments: list[TrainedSteps], kind: str, limit: int) -> npt.NDArray[np.int64]:
    """Return the steps at which the grid requires a row of a kind, up to `limit` of each segment.

    A damaged ledger may claim any number of steps.
    """
    required = [np.empty(0, np.int64)]
    for segment in segments:
        section = segment.config.get(_SECTIONS.get(kind, ""))
        steps = _firing_steps(section, segment.first, segment.last)
        required.append(np.fromiter(itertools.islice(steps, limit), np.int64))
    return np.concatenate(required)


def _first_config(directory: RunDirectory) -> dict[str, Any]:
    try:
        config = yaml.load(str(directory.config)).value
    except ConfigError:  # reported by `check_config`
        return {}
    return config if isinstance(config, dict) else {}


def _firing_steps(section: Any, start: int, last: int) -> Steps:
    """Return the steps at which a config section's cadence fires; none if they are unknown."""
    if not isinstance(section, dict) or section.get("counter", GLOBAL_STEP) != GLOBAL_STEP:
        return range(0)
    every = section.get("every")
    offset = section.get("offset") or 0
    if not isinstance(every, int) or not isinstance(offset, int) or every < 1:
        return range(0)
    return Cadence(every, offset).steps(start, last)
