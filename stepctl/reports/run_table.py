"""A summary of each run in a folder: its progress, its metric, and whether it is running."""

import contextlib
import datetime
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from stepctl.checkpoint import names, user_block
from stepctl.checkpoint.expected import missing_checkpoints
from stepctl.errors import CheckpointError, ConfigError, StepctlError, UnreadableError
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger
from stepctl.rundir.lock import Holder
from stepctl.system import files
from stepctl.writers.base import ROW_KEYS, MetricsRow
from stepctl.writers.jsonl import as_number

_LOWER_IS_BETTER = ("loss", "wasserstein")  # ends of metric names
_KINDS = {"eval": "validation", "train": "training"}

RunState = Literal["running", "held", "finished", "interrupted", "damaged", "unreadable"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run.

    A run that is "held" by a process of another `host` is running there, or was killed there.
    """

    name: str
    step: int = 0
    target: int | None = None
    metric: str | None = None
    last: float | None = None  # value of the metric
    best: float | None = None
    state: RunState
    reason: str
    # seconds since the last event in the ledger, forks of it aside; if held, since the last write
    age: float | None = None
    host: str | None = None


def list_runs(folder: str, now: datetime.datetime) -> list[RunSummary]:
    """Return the runs in a folder by name, or the run that the folder is.

    The newest checkpoint of each run is read, unless the run is held. ConfigError if the folder
    cannot be listed.
    """
    own = RunDirectory(folder)
    folders = (own.checkpoints, own.samples, own.series, own.tensorboard)
    own_folders = {path.name for path in folders}
    try:
        paths = sorted(
            entry.path
            for entry in os.scandir(folder)
            if entry.name not in own_folders and _may_be_run(entry)
        )
    except OSError as error:
        if files.is_unavailable(error):
            raise files.unreadable(folder, error) from error
        raise ConfigError(
            f"{folder}: cannot be listed: {error.strerror}; give the folder that holds runs"
        ) from error
    summaries = [summarize(RunDirectory(path), now) for path in (folder, *paths)]
    return [summary for summary in summaries if summary is not None]


def _may_be_run(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or entry.name == "lost+found":
        return False
    try:
        return entry.is_dir()
    except OSError:  # `summarize` reports it
        return True


def summarize(directory: RunDirectory, now: datetime.datetime) -> RunSummary | None:
    """Return the summary of a run, None if there is no run; an error becomes the run's state."""
    name = directory.name
    try:
        holder = directory.holder()
        ledger = directory.read_ledger()
        if holder is None and not directory.holds_run(ledger):
            return None
        return _summarize(directory, ledger, holder, now)
    except UnreadableError as error:
        return RunSummary(name=name, state="unreadable", reason=str(error))
    except MemoryError:
        reason = "not enough memory to read its records"
        return RunSummary(name=name, state="damaged", reason=reason)
    except (StepctlError, OSError) as error:
        return RunSummary(name=name, state="damaged", reason=str(error))


def _summarize(
    directory: RunDirectory, ledger: Ledger, holder: Holder | None, now: datetime.datetime
) -> RunSummary:
    rows = directory.read_metrics()
    steps = names.steps(directory.checkpoint_folder.names())
    age = _age(ledger, now)
    host = None
    state: RunState
    if holder is None:
        state, reason, step = _state_at_rest(directory, ledger, steps)
    else:
        state = "running"
        reason = str(holder)
        host = holder.other_host
        if host is not None:
            state = "held"
            age = _since_last_write(directory, now)
        started = [start["step"] for start in ledger.starts[-1:]]
        step = max([*steps, *(row["step"] for row in rows), *started], default=0)
    metric, last, best = _summarize_metric(directory, ledger, rows)
    return RunSummary(
        name=directory.name,
        step=step,
        target=ledger.target,
        metric=metric,
        last=last,
        best=best,
        state=state,
        reason=reason,
        age=age,
        host=host,
    )


def _state_at_rest(
    directory: RunDirectory, ledger: Ledger, steps: list[int]
) -> tuple[RunState, str, int]:
    """Return the state of a run that no process holds, the reason, and its newest step."""
    step = 0
    damage = []
    for candidate in reversed(steps):
        file = directory.checkpoints / names.file_name(candidate)
        try:
            user_block.open_verified(file).file.close()
            step = candidate
            break
        except CheckpointError as error:
            damage.append(str(error))
        except UnreadableError as error:
            return "unreadable", str(error), max(steps)
    missing = missing_checkpoints(directory, ledger)
    if missing:
        name = names.file_name(missing[-1])
        damage.append(f"{name}: acknowledged in ledger.jsonl, but missing")
    if damage:
        return "damaged", damage[0], step
    state, reason = _end_of_newest_segment(ledger)
    return state, reason, step


def _end_of_newest_segment(ledger: Ledger) -> tuple[RunState, str]:
    newest = None
    for event in ledger:
        if event["event"] == "start":
            newest = None
        elif event["event"] == "end":
            newest = event
    if newest is None:
        return "interrupted", "no end is recorded"
    is_done = newest.get("done")
    if not isinstance(is_done, bool):  # written by an early version
        is_done = ledger.target is not None and newest["step"] >= ledger.target
    return "finished" if is_done else "interrupted", newest["reason"]


def _summarize_metric(
    directory: RunDirectory, ledger: Ledger, rows: list[MetricsRow]
) -> tuple[str | None, float | None, float | None]:
    """Return the main metric, its last value and its best: of the evaluation rows, if there are some."""
    configured, mode = _configured_metric(directory, ledger)
    kind, rows = _rows_of_main_kind(rows)
    name = _main_metric(rows, configured)
    if name is None:
        return None, None, None
    values = [as_number(row.get(name)) for row in rows]
    numbers = [value for value in values if value is not None]
    finite = [value for value in numbers if math.isfinite(value)]
    if mode is not None and name == configured:
        is_lower_better = mode == "min"
    else:
        is_lower_better = name.endswith(_LOWER_IS_BETTER)
    best = min(finite, default=None) if is_lower_better else max(finite, default=None)
    return f"{_KINDS[kind]} {name}", numbers[-1], best


def main_metric(directory: RunDirectory) -> str | None:
    """Return the metric that the config names, the loss, or the first metric; None without rows."""
    configured, _ = _configured_metric(directory, directory.read_ledger())
    _, rows = _rows_of_main_kind(directory.read_metrics())
    return _main_metric(rows, configured)


def _rows_of_main_kind(rows: list[MetricsRow]) -> tuple[str, list[MetricsRow]]:
    """Return the evaluation rows, or the training rows if there are none."""
    evaluations = [row for row in rows if row.get("kind") == "eval"]
    if evaluations:
        return "eval", evaluations
    return "train", [row for row in rows if row.get("kind") == "train"]


def _main_metric(rows: list[MetricsRow], configured: str | None) -> str | None:
    known: Collection[str] = dict.fromkeys(
        key for row in rows for key in row if as_number(row[key]) is not None
    )
    losses = [name for name in known if name.endswith(_LOWER_IS_BETTER)]
    others = [name for name in known if name not in ROW_KEYS]
    for name in (configured, "loss", *losses, *others):
        if name in known:
            return name
    return None


def _configured_metric(directory: RunDirectory, ledger: Ledger) -> tuple[str | None, str | None]:
    """Return metric and mode of the config's `evaluate` or `checkpoint.keep_best`, if set."""
    try:
        config: Any = directory.newest_config(ledger).value
    except (StepctlError, OSError):
        return None, None
    for section in (_item(config, "evaluate"), _item(config, "checkpoint", "keep_best")):
        metric = _item(section, "metric")
        mode = _item(section, "mode")
        if isinstance(metric, str):
            return metric, mode if isinstance(mode, str) else None
    return None, None


def _item(value: Any, *keys: str) -> Any:
    """Return an item of nested mappings; None where a key or a mapping is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _age(ledger: Ledger, now: datetime.datetime) -> float | None:
    own = [event for event in ledger if "child" not in event]
    try:
        then = datetime.datetime.fromisoformat(str(own[-1].get("time")))
        return max(round((now - then).total_seconds(), 3), 0.0)
    except (IndexError, TypeError, ValueError, OverflowError):
        return None


def _since_last_write(directory: RunDirectory, now: datetime.datetime) -> float | None:
    times = []
    for path in (directory.metrics, directory.ledger, directory.checkpoints):
        with contextlib.suppress(OSError):
            times.append(os.stat(path).st_mtime)
    if not times:
        return None
    return max(round(now.timestamp() - max(times), 3), 0.0)
