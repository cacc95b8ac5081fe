"""Whether a checkpoint, or a whole run, is what it should be; every problem is found, and nothing is changed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from stepctl import files, yamlio
from stepctl.checkpoint import names
from stepctl.checkpoint.expected import expected_checkpoints, missing_checkpoints
from stepctl.checkpoint.store import refuse_other_run
from stepctl.config import Config
from stepctl.errors import CheckpointError, ConfigError, StepctlError, UnreadableError
from stepctl.run import check_same_run, excused_keys
from stepctl.rundir import RunDirectory
from stepctl.sandbox import Sandbox
from stepctl.state import GLOBAL_STEP

_SHOWN = 100  # missing rows of a segment that are listed, at least


Span = tuple[int, int, dict[str, Any]]  # from a step, to a step, with this config


class Problem(NamedTuple):
    """What is wrong: a short code, the file, and a sentence."""

    code: str
    file: str
    message: str


class Found(NamedTuple):
    """A checkpoint that is good."""

    step: int
    sha256: str
    file: str
    config: str  # as text
    run_id: str | None


def verify(path: str) -> tuple[list[Found], list[Problem]]:
    """Check a checkpoint (digest, structure, the three step numbers), or a run: each of its files, and its records."""
    if not files.is_directory(path):
        return verify_files([path])
    directory = RunDirectory(path)
    if not files.is_directory(directory.checkpoints):
        raise CheckpointError("none", f"{path}: neither a checkpoint nor a run (no checkpoints/ in it)")
    found, problems = verify_files([str(directory.checkpoints / names.file_name(step)) for step in _steps(directory)])
    problems = [*_without_pruned(directory, problems), *check_ledger(directory, found)]
    problems += [*check_config(directory, found), *check_metrics(directory)]
    return found, problems


def verify_files(paths: list[str]) -> tuple[list[Found], list[Problem]]:
    """Check checkpoint files, in a sandbox."""
    found, problems = [], []
    with Sandbox() as sandbox:
        for path in paths:
            try:
                answer = sandbox.call("stepctl.checkpoint.codec:check", path)
                found.append(Found(**answer, file=os.path.basename(path)))
            except CheckpointError as error:
                problems.append(Problem(error.code, os.path.basename(path), str(error)))
            except UnreadableError as error:
                problems.append(Problem("unreadable", os.path.basename(path), str(error)))
    return found, problems


def _steps(directory: RunDirectory) -> list[int]:
    return names.steps(files.list_directory(directory.checkpoints))


def _without_pruned(directory: RunDirectory, problems: list[Problem]) -> Iterator[Problem]:
    """Leave out the files that are gone by now, as the ledger, read after that was seen, says they may be."""
    gone = {problem.file for problem in problems if not files.is_there(directory.checkpoints / problem.file)}
    wanted = {names.file_name(step) for step in expected_checkpoints(directory.read_ledger())} if gone else set()
    for problem in problems:
        if problem.file not in gone or problem.file in wanted:
            yield problem


def check_ledger(directory: RunDirectory, found: list[Found]) -> Iterator[Problem]:
    """Compare the ledger with the good files: what it acknowledges is there, and what is there it acknowledges.

    Of a run that is being trained the newest file may still have to be acknowledged.
    """
    holder = directory.holder()  # looked for first: whoever lets go has written the ledger's line
    expected, records = expected_checkpoints(directory.read_ledger()), directory.records()
    for step in missing_checkpoints(directory.read_ledger, lambda: _steps(directory)):
        file = names.file_name(step)
        yield Problem("lost", file, f"{file}: acknowledged in ledger.jsonl, but it is not there")
    for good in found:
        if expected.get(good.step, good.sha256) != good.sha256:
            yield Problem("other", good.file, f"{good.file}: whole, but not the file that ledger.jsonl acknowledges")
    for good in found:
        try:
            refuse_other_run(good.file, good.run_id, good.sha256, records)
        except CheckpointError as error:
            yield Problem(error.code, good.file, str(error))
            continue
        is_new = holder is not None and good.step > max(expected, default=-1)
        if good.sha256 not in records.acknowledged and not is_new:
            hint = "; if a kill came before its line, the next resume writes that" if good.step not in expected else ""
            yield Problem("unknown", good.file, f"{good.file}: whole, but ledger.jsonl does not know it{hint}")


def check_config(directory: RunDirectory, found: list[Found]) -> Iterator[Problem]:
    """Compare the config that a resume goes by with the one that the newest good file was made with."""
    file, newest = directory.config.name, max(found, default=None)
    if not files.is_there(directory.config):
        yield Problem("config", file, f"{file}: is missing, and a resume needs it; the checkpoints hold it, in /config")
        return
    try:
        plain = directory.newest_config().value  # nothing that it names is imported
        unknown = [key for key in plain if key not in Config.model_fields] if isinstance(plain, dict) else ["?"]
        if unknown:
            raise ConfigError(f"no config of a run (key {unknown[0]!r})")
        if newest is not None:
            check_same_run(newest.file, newest.config, plain, excused_keys(directory.read_ledger(), []))
    except StepctlError as error:
        yield Problem(
            "config",
            file,
            f"{file}: {str(error).splitlines()[0].removeprefix(f'{directory.shown(directory.config)}: ')}",
        )


def check_metrics(directory: RunDirectory) -> Iterator[Problem]:
    """Compare metrics.jsonl with the ledger: no row twice, none missing up to the newest checkpoint, none late.

    The run may be going on: rows are there before the ledger's line of a checkpoint, so what the ledger asks for is
    looked for after it was read, and what it must allow is asked of a ledger that is read after the rows.
    """
    before, _ = _spans(directory)
    rows = directory.read_metrics()
    file = directory.metrics.name
    seen: set[tuple[int, str]] = set()
    for row in rows:
        key = (row["step"], str(row.get("kind")))
        if key in seen:
            yield Problem("twice", file, f"{file}: two {key[1]} rows of step {key[0]}")
        seen.add(key)
    after, last = _spans(directory)
    most = len(seen) + _SHOWN
    for step, kind in sorted((_wanted(before, most) & _wanted(after, most)) - seen):
        yield Problem("row", file, f"{file}: the {kind} row of step {step} is missing")
    if last is not None and (late := max((step for step, _ in seen), default=0)) > last:
        yield Problem("row", file, f"{file}: has a row of step {late}, but the run ended at step {last}")


def _spans(directory: RunDirectory) -> tuple[list[Span], int | None]:
    """Return what each segment did that stands, and the last step if the newest segment ended in order."""
    spans: list[Span] = []
    config, end = _first_config(directory), None
    for row in directory.read_ledger():
        if row["event"] == "start":
            config = row.get("config") or config
            # what an earlier segment did past this start was cut, and is done again
            spans = [(first, min(to, row["step"]), with_) for first, to, with_ in spans]
            spans.append((row["step"], row["step"], config))
            end = None
        elif row["event"] == "checkpoint" and spans:
            first, to, with_ = spans[-1]
            spans[-1] = (first, max(to, row["step"]), with_)
        elif row["event"] == "end":
            end = row["step"]
    return spans, end


def _wanted(spans: list[Span], most: int) -> set[tuple[int, str]]:
    """Return the rows on the grid that must be there.

    Of each segment and kind up to `most`: a ledger may speak of more steps than anybody can list.
    """
    wanted = set()
    for first, to, with_ in spans:
        for kind, section in (("train", "log"), ("eval", "evaluate")):
            grid = _grid(with_.get(section), first + 1, to)
            wanted |= {(step, kind) for step in itertools.islice(grid, most)}
    return wanted


def _first_config(directory: RunDirectory) -> dict[str, Any]:
    try:
        config = yamlio.load(str(directory.config)).value
    except ConfigError:  # `check_config` says it
        return {}
    return config if isinstance(config, dict) else {}


def _grid(cadence: Any, first: int, last: int) -> range:
    cadence = cadence if isinstance(cadence, dict) else {}
    every, offset = cadence.get("every"), cadence.get("offset") or 0
    if cadence.get("counter", GLOBAL_STEP) != GLOBAL_STEP:
        return range(0)  # the records do not say where another counter stood
    if not isinstance(every, int) or not isinstance(offset, int) or every < 1:
        return range(0)
    return range(first + (offset - first) % every, last + 1, every)
