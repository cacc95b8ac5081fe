"""A summary of each run in a folder: its progress, its metric, and whether it is running."""

import contextlib
import datetime
import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stepctl.checkpoint import names, user_block
from stepctl.checkpoint.expected import missing_checkpoints
from stepctl.config.yaml import flatten
from stepctl.errors import CheckpointError, ConfigError, StepctlError, UnreadableError
from stepctl.reports.config_columns import differing_values
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger
from stepctl.rundir.lock import Holder
from stepctl.system import files
from stepctl.system.text import did_you_mean
from stepctl.writers.base import FIRST_KEYS, ROW_KEYS, MetricsRow
from stepctl.writers.jsonl import as_number

# ends of metric names
_LOWER_IS_BETTER = ("loss", "wasserstein", "error", "mse", "rmse", "mae", "perplexity")
# the reason of a segment that ended with an error: its type, then its message
_ERROR = re.compile(r"(\w*(Error|Exception)|TornUpdate)\b")
_KINDS = {"eval": "validation", "train": "training"}

RunState = Literal["running", "held", "finished", "interrupted", "failed", "damaged", "unreadable"]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run.

    A run that is "held" by a process of another `host` is running there, or was killed there; one
    that "failed" ended with an error, such as a loss that is not finite.
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
    config: dict[str, Any] | None = field(default=None, repr=False)  # by dotted key
    # its values of the config keys that differ between the listed runs
    differing: dict[str, Any] = field(default_factory=dict)
    lower_is_better: bool = True  # of the metric


def list_runs(folder: str, now: datetime.datetime, *, sort: str | None = None) -> list[RunSummary]:
    """Return the runs in a folder by name, or the run that the folder is.

    With `sort`, the name of a metric, they are in the order of its best value, and those without it
    are last. The newest checkpoint of each run is read, unless the run is held. ConfigError if the
    folder cannot be listed, or if there are runs and none has the metric.
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
    directories = [RunDirectory(path) for path in (folder, *paths)]
    summaries = [summarize(directory, now, metric=sort) for directory in directories]
    found = [summary for summary in summaries if summary is not None]
    if sort is not None and found and all(run.metric is None for run in found):
        raise ConfigError(
            f"--sort {sort}: no run has this metric{_other_metrics(sort, directories)}"
        )
    differing = differing_values([run.config for run in found])
    found = [replace(run, differing=values) for run, values in zip(found, differing, strict=True)]
    return found if sort is None else _sorted(found)


def _other_metrics(metric: str, directories: Sequence[RunDirectory]) -> str:
    """Return the metrics that the runs have, for the message about an unknown one."""
    known = set(FIRST_KEYS)
    for directory in directories:
        with contextlib.suppress(StepctlError, OSError):  # reported as the run's state
            for row in directory.read_metrics():
                known |= new_metrics(row, known)
    names = sorted(known.difference(FIRST_KEYS))
    if not names:
        return "; there are none yet"
    return f"{did_you_mean(metric, names)}; there are: {', '.join(names)}"


def new_metrics(row: MetricsRow, known: Collection[str]) -> set[str]:
    """Return the keys of a row that have numbers and are not known yet."""
    return {name for name in row if name not in known and as_number(row[name]) is not None}


def _sorted(runs: list[RunSummary]) -> list[RunSummary]:
    with_value = [run for run in runs if run.best is not None]
    without = [run for run in runs if run.best is None]
    is_descending = any(not run.lower_is_better for run in with_value)
    with_value.sort(key=lambda run: run.best or 0.0, reverse=is_descending)
    return with_value + without


def _may_be_run(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or entry.name == "lost+found":
        return False
    try:
        return entry.is_dir()
    except OSError:  # `summarize` reports it
        return True


def summarize(
    directory: RunDirectory, now: datetime.datetime, *, metric: str | None = None
) -> RunSummary | None:
    """Return the summary of a run, None if there is no run; an error becomes the run's state.

    `metric` is the metric to show; by default it is the main one.
    """
    name = directory.name
    try:
        holder = directory.holder()
        ledger = directory.read_ledger()
        if holder is None and not directory.holds_run(ledger):
            return None
        return _summarize(directory, ledger, holder, now, metric)
    except UnreadableError as error:
        return RunSummary(name=name, state="unreadable", reason=str(error))
    except MemoryError:
        reason = "not enough memory to read its records"
        return RunSummary(name=name, state="damaged", reason=reason)
    except (StepctlError, OSError) as error:
        return RunSummary(name=name, state="damaged", reason=str(error))


def _summarize(
    directory: RunDirectory,
    ledger: Ledger,
    holder: Holder | None,
    now: datetime.datetime,
    requested: str | None,
) -> RunSummary:
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
        rows = directory.newest_metrics().rows
        step = max([*steps, *(row["step"] for row in rows), *started], default=0)
    config = _newest_config(directory, ledger)
    metric, last, best, lower_is_better = _summarize_metric(directory, config, requested)
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
        config=None if config is None else flatten(config),
        lower_is_better=lower_is_better,
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
    if is_done:
        return "finished", newest["reason"]
    is_error = _ERROR.match(newest["reason"]) is not None
    return "failed" if is_error else "interrupted", newest["reason"]


def _summarize_metric(
    directory: RunDirectory, config: dict[str, Any] | None, requested: str | None
) -> tuple[str | None, float | None, float | None, bool]:
    """Return a metric, its last value, its best, and whether lower is better.

    The evaluation rows are used if there are some; for a requested metric, if some have it.
    """
    configured, mode = _configured_metric(config)
    kind = _main_kind(directory, requested)
    name = requested or _main_metric(directory.read_metrics(kind), configured)
    if name is None:
        return None, None, None, True
    if mode is not None and name == configured:
        is_lower_better = mode == "min"
    else:
        is_lower_better = name.endswith(_LOWER_IS_BETTER)
    best_of = min if is_lower_better else max
    last = best = None
    for row in directory.read_metrics(kind):
        value = as_number(row.get(name))
        if value is None:
            continue
        last = value
        if math.isfinite(value):
            best = value if best is None else best_of(best, value)
    if last is None:
        return None, None, None, True
    return f"{_KINDS[kind]} {name}", last, best, is_lower_better


def main_metric(directory: RunDirectory) -> str | None:
    """Return the metric that the config names, the loss, or the first metric; None without rows."""
    configured, _ = _configured_metric(_newest_config(directory, directory.read_ledger()))
    return _main_metric(directory.read_metrics(_main_kind(directory)), configured)


def _main_kind(directory: RunDirectory, metric: str | None = None) -> str:
    """Return the kind of the rows to summarize: evaluations, or training rows if there are none.

    Only rows with `metric` count, if one is given.
    """
    for row in directory.read_metrics("eval"):
        if metric is None or as_number(row.get(metric)) is not None:
            return "eval"
    return "train"


def _main_metric(rows: Iterable[MetricsRow], configured: str | None) -> str | None:
    """Return the main metric of rows: the configured one, else `loss`, another loss, or any other."""
    first_choice = configured or "loss"
    known: dict[str, None] = {}
    for row in rows:
        known |= {key: None for key in row if key not in known and as_number(row[key]) is not None}
        if first_choice in known:
            return first_choice
    losses = [name for name in known if name.endswith(_LOWER_IS_BETTER)]
    others = [name for name in known if name not in ROW_KEYS]
    for name in (configured, "loss", *losses, *others):
        if name in known:
            return name
    return None


def _newest_config(directory: RunDirectory, ledger: Ledger) -> dict[str, Any] | None:
    try:
        config: Any = directory.newest_config(ledger).value
    except (StepctlError, OSError):
        return None
    return config if isinstance(config, dict) else None


def _configured_metric(config: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Return metric and mode of the config's `evaluate` or `checkpoint.keep_best`, if set."""
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
