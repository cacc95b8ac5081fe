"""What people want to know about all their runs: where each is, and how good."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from stepctl import files
from stepctl.checkpoint import names, userblock
from stepctl.checkpoint.expected import expected_checkpoints
from stepctl.errors import CheckpointError, ConfigError, StepctlError, UnreadableError
from stepctl.rundir import Holder, RunDirectory
from stepctl.writers.base import Row
from stepctl.writers.jsonl import as_number

_LESS_IS_BETTER = ("loss", "wasserstein")
_KINDS = {"eval": "validation", "train": "training"}


class Run(NamedTuple):
    """One run. `last` and `best` are values of `metric`; `age` is seconds since the ledger's newest line of its own.

    One that is "held" by a process on another `host` is running there, or was killed there; its `age` is seconds since
    anything was written.
    """

    name: str
    step: int
    target: int | None
    metric: str | None
    last: float | None
    best: float | None
    state: str  # "running", "held", "finished", "interrupted", "damaged" or "unreadable"
    reason: str
    age: float | None
    host: str | None = None


def runs_in(folder: str, now: datetime.datetime) -> list[Run]:
    """Return the runs in a folder by name, or the one that it is; what is no run is passed over.

    Of each run that nobody trains the newest checkpoint is read. ConfigError if there is no such folder.
    """
    own = RunDirectory(folder)
    parts = {path.name for path in (own.checkpoints, own.samples, own.tensorboard)}  # of the run that it may be
    try:
        entries = [entry for entry in os.scandir(folder) if entry.name not in parts and not _is_no_run(entry.name)]
        children = sorted(entry.path for entry in entries if _may_be_directory(entry))
    except OSError as error:
        if files.is_unavailable(error):
            raise files.unreadable(folder, error) from error
        raise ConfigError(f"{folder}: cannot be listed: {error.strerror}; give the folder that holds runs") from error
    return [run for path in [folder, *children] if (run := look(RunDirectory(path), now)) is not None]


def _is_no_run(name: str) -> bool:
    return name.startswith(".") or name == "lost+found"


def _may_be_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # `look` reports it
        return True


def look(directory: RunDirectory, now: datetime.datetime) -> Run | None:
    """Return what is known of a run, None if there is none; nothing in the directory makes it fail."""
    try:
        holder = directory.holder()
        return _look(directory, holder, now) if holder or directory.holds_run() else None
    except UnreadableError as error:
        return Run(directory.name, 0, None, None, None, None, "unreadable", str(error), None)
    except MemoryError:
        reason = "its records need more memory than there is"
        return Run(directory.name, 0, None, None, None, None, "damaged", reason, None)
    except (StepctlError, OSError) as error:
        return Run(directory.name, 0, None, None, None, None, "damaged", str(error), None)


def _look(directory: RunDirectory, holder: Holder | None, now: datetime.datetime) -> Run:
    ledger, rows = directory.read_ledger(), directory.read_metrics()
    starts = [row for row in ledger if row["event"] == "start"]
    steps = names.steps(files.list_directory(directory.checkpoints))
    age, host = _age(ledger, now), None
    if holder:
        state, reason, host = "running", holder.description, holder.other_host
        if host is not None:
            state, age = "held", _since_last_write(directory, now)
        step = max([*steps, *(row["step"] for row in rows), *(row["step"] for row in starts[-1:])], default=0)
    else:
        state, reason, step = _at_rest(directory, ledger, steps)
    metric, last, best = _metric(rows, *_asked(directory))
    target = starts[-1]["target"] if starts else None
    return Run(directory.name, step, target, metric, last, best, state, reason, age, host)


def _at_rest(directory: RunDirectory, ledger: list[Row], steps: list[int]) -> tuple[str, str, int]:
    """Return the state of a run that nobody trains, the reason, and its newest step."""
    try:
        step, damage = _newest_good(directory, steps)
    except UnreadableError as error:
        return "unreadable", str(error), max(steps)
    if damage is not None:
        return "damaged", damage, step
    return *_ended(ledger), step


def _newest_good(directory: RunDirectory, steps: list[int]) -> tuple[int, str | None]:
    """Return the newest step whose file has its digest (0 if none), and what is wrong with the run's files."""
    problems: list[str] = []
    for step in reversed(steps):
        try:
            userblock.open_verified(directory.checkpoints / names.file_name(step)).file.close()
            break
        except CheckpointError as error:
            problems.append(str(error))
    else:
        step = 0
    lost = sorted(expected_checkpoints(directory.read_ledger()).keys() - set(steps))
    problems += [f"{names.file_name(lost[-1])}: acknowledged in ledger.jsonl, but it is not there"] if lost else []
    return step, problems[0] if problems else None


def _ended(ledger: list[Row]) -> tuple[str, str]:
    newest = [row for row in ledger if row["event"] in ("start", "end")][-2:]
    if not newest or newest[-1]["event"] == "start":
        return "interrupted", "no end is recorded"
    end = newest[-1]
    reached = newest[0]["event"] == "start" and end["step"] >= newest[0]["target"]
    done = end["done"] if isinstance(end.get("done"), bool) else reached
    return "finished" if done else "interrupted", end["reason"]


def _metric(rows: list[Row], wanted: str | None, mode: str | None) -> tuple[str | None, float | None, float | None]:
    """Return the main metric's name, its last value and its best: of evaluations, if there are some."""
    kind, rows, name = _of_main_kind(rows, wanted)
    if name is None:
        return None, None, None
    values = [value for row in rows if (value := as_number(row.get(name))) is not None]
    finite = [value for value in values if math.isfinite(value)]
    least = mode == "min" if mode and name == wanted else name.endswith(_LESS_IS_BETTER)
    best = (min if least else max)(finite, default=None)
    return f"{_KINDS[kind]} {name}", values[-1], best


def _of_main_kind(rows: list[Row], wanted: str | None) -> tuple[str, list[Row], str | None]:
    kind = "eval" if any(row.get("kind") == "eval" for row in rows) else "train"
    rows = [row for row in rows if row.get("kind") == kind]
    return (
        kind,
        rows,
        _main(dict.fromkeys(key for row in rows for key in row if as_number(row[key]) is not None), wanted),
    )


def main_metric(directory: RunDirectory) -> str | None:
    """Return the name of the metric that a run goes by, or its loss; None if it has no such row."""
    return _of_main_kind(directory.read_metrics(), _asked(directory)[0])[2]


def _main(known: Iterable[str], wanted: str | None) -> str | None:
    known = list(known)
    less = [name for name in known if name.endswith(_LESS_IS_BETTER)]
    return next((name for name in (wanted, "loss", *less) if name in known), None)


def _asked(directory: RunDirectory) -> tuple[str | None, str | None]:
    """Return the metric that the config goes by and its mode, where it says so: evaluate's, or keep_best's."""
    try:
        config: Any = directory.newest_config().value
    except (StepctlError, OSError):
        return None, None
    for keys in (("evaluate",), ("checkpoint", "keep_best")):
        section = config
        for key in keys:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get("metric"), str):
            return section["metric"], section["mode"] if isinstance(section.get("mode"), str) else None
    return None, None


def _age(ledger: list[Row], now: datetime.datetime) -> float | None:
    try:
        own = [row for row in ledger if "child" not in row]
        then = datetime.datetime.fromisoformat(own[-1]["time"])
        return max(round((now - then).total_seconds(), 3), 0.0)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _since_last_write(directory: RunDirectory, now: datetime.datetime) -> float | None:
    written = []
    for path in (directory.metrics, directory.ledger, directory.checkpoints):
        with contextlib.suppress(OSError):
            written.append(os.stat(path).st_mtime)
    if not written:
        return None
    return max(round(now.timestamp() - max(written), 3), 0.0)
