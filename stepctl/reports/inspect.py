"""The contents of a checkpoint: header, counters, config, numerics, and statistics of the arrays."""

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NotRequired, TypedDict

import numpy as np

from stepctl import programs
from stepctl.checkpoint import codec
from stepctl.checkpoint.expected import describe_missing, missing_checkpoints
from stepctl.checkpoint.store import Store
from stepctl.config import registry, yaml
from stepctl.errors import CheckpointError, StepctlError
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger, RecordedChange
from stepctl.rundir.mirror_status import MirrorStatus, read_status
from stepctl.runs.messages import Say
from stepctl.state.arena import Array
from stepctl.state.counters import GLOBAL_STEP
from stepctl.state.value_decoder import parse
from stepctl.state.value_text import value_texts
from stepctl.system import files, store_url


class Statistics(TypedDict):
    """Statistics of the finite elements, in float64; None if there are none, or beyond float64.

    Those of complex numbers are of their absolute values.
    """

    count: int  # of all elements
    min: float | None  # exact for integers
    max: float | None
    mean: float | None
    std: float | None
    non_finite: int


class ArrayContents(Statistics):
    """One array."""

    path: str
    shape: list[int]
    dtype: str


# "from" is a keyword in Python
SegmentSummary = TypedDict(
    "SegmentSummary",
    {
        "number": int,
        "from": int,
        "to": int,  # without an end, the step of its newest checkpoint
        "target": int,
        "started": str,
        "ended": str | None,  # None: it is running or was killed
        "reason": str | None,
    },
)


class ForkOrigin(TypedDict):
    """The checkpoint that a run was forked from."""

    run: str  # directory
    step: int
    sha256: str
    changes: list[RecordedChange]


class MirrorState(TypedDict):
    """How far the mirror of a run is behind its newest acknowledged checkpoint."""

    url: str
    step: int | None  # None: nothing is mirrored yet
    behind_steps: int
    behind_seconds: float  # since the oldest checkpoint after the mirrored one was saved
    error: str | None  # why a newer one is not there


class CheckpointContents(TypedDict):
    """One checkpoint; if a run was given, also its newest segment and its origin."""

    file: str
    global_step: int
    created_by: str
    run: str
    run_id: str | None
    sha256: str
    counters: dict[str, int]
    relations: dict[str, bool] | None  # see `check_relations`
    parameters: int  # elements
    arrays: list[ArrayContents]
    values: dict[str, Any] | None  # tagged JSON, see runs/README.md; None for a task
    config: dict[str, Any]
    numerics: dict[str, Any]
    segment: NotRequired[SegmentSummary | None]  # None: the run was never trained
    parent: NotRequired[ForkOrigin | None]  # None: the run is not a fork
    mirror: NotRequired[MirrorState | None]  # None: the run has no mirror


class Inspection(TypedDict):
    """The contents, the values as text by key, and messages about files that were skipped."""

    contents: CheckpointContents
    value_texts: dict[str, str]
    messages: list[str]


def open_path(path: str, report: Say) -> codec.Reader:
    """Open a checkpoint, or the newest good one of a run; skipped files are reported."""
    if not files.is_directory(path):
        return codec.Reader(path)
    reader, _ = _open_run(path, report)
    return reader


def _open_run(path: str, report: Say) -> tuple[codec.Reader, Ledger]:
    """Open the newest good checkpoint of a run, and return the ledger too."""
    directory = RunDirectory(path)
    refuse_other_folder(directory)
    store = Store(directory.checkpoint_folder, directory.read_ledger)
    reader = store.newest(report)
    ledger = store.ledger_with(reader.header.sha256)
    assert ledger is not None
    message = describe_missing(missing_checkpoints(directory, ledger), reader.header.global_step)
    if message is not None:
        report(message)
    return reader, ledger


def refuse_other_folder(directory: RunDirectory) -> None:
    """Raise CheckpointError if a folder is no run."""
    if not files.is_directory(directory.checkpoints):
        what = "neither a checkpoint nor a run (no checkpoints/ in it)"
        raise CheckpointError("none", f"{directory.path}: {what}")


def inspect_path(path: str, pattern: str) -> Inspection:
    """Return the contents of a checkpoint, or of a run and its newest good checkpoint.

    `pattern` (fnmatch) selects arrays and values by path, such as "params/*" or "values/accepted".
    """
    messages: list[str] = []
    ledger = None
    if files.is_directory(path):
        opened, ledger = _open_run(path, messages.append)
    else:
        opened = codec.Reader(path)
    with opened as reader:
        texts = {} if reader.header.values is None else value_texts(reader.header.values)
        contents = inspect_checkpoint(reader, pattern)
    if ledger is not None:
        contents["segment"] = newest_segment(ledger)
        contents["parent"] = fork_origin(ledger)
        contents["mirror"] = mirror_state(_mirror_status(RunDirectory(path), ledger), ledger)
    selected = {key: text for key, text in texts.items() if fnmatchcase(f"values/{key}", pattern)}
    return {"contents": contents, "value_texts": selected, "messages": messages}


def newest_segment(ledger: Ledger) -> SegmentSummary | None:
    """Return the newest segment of a run; None if it was never trained."""
    start = end = None
    saved_step = 0
    for event in ledger:
        if event["event"] == "start":
            start = event
            end = None
            saved_step = event["step"]
        elif event["event"] == "checkpoint":
            saved_step = max(saved_step, event["step"])
        elif event["event"] == "end" and end is None:
            end = event
    if start is None:
        return None
    summary: SegmentSummary = {
        "number": start["segment"],
        "from": start["step"],
        "to": saved_step,
        "target": start["target"],
        "started": _text(start.get("time")),
        "ended": None,
        "reason": None,
    }
    if end is not None:
        summary["to"] = end["step"]
        summary["ended"] = _text(end.get("time"))
        summary["reason"] = end["reason"]
    return summary


def _mirror_status(directory: RunDirectory, ledger: Ledger) -> MirrorStatus | None:
    """Return the status of the mirror in the run's newest config; None if that has none."""
    try:
        config = directory.newest_config(ledger).value
    except StepctlError:
        return None
    url = store_url.mirror_of(config)
    if url is None:
        return None
    status = read_status(directory.folder)
    if status is None or status.url != store_url.canonical(url):
        return MirrorStatus(url)
    return status


def mirror_state(status: MirrorStatus | None, ledger: Ledger) -> MirrorState | None:
    """Return how far a mirror is behind; None without one."""
    if status is None:
        return None
    newest = 0
    missing_since: str | None = None
    for event in ledger:
        if event["event"] != "checkpoint":
            continue
        newest = event["step"]
        if event["sha256"] == status.sha256:
            missing_since = None
        elif missing_since is None:
            missing_since = _text(event.get("time"))
    step = status.step
    behind = newest - (0 if step is None else step)
    return {
        "url": status.url,
        "step": step,
        "behind_steps": max(behind, 0),
        "behind_seconds": _seconds_since(missing_since) if behind > 0 else 0.0,
        "error": status.error,
    }


def _seconds_since(time: str | None) -> float:
    """Return the seconds since a time of the ledger; 0.0 if it is not one."""
    try:
        then = datetime.datetime.fromisoformat(time or "")
        passed = datetime.datetime.now(datetime.UTC) - then
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(round(passed.total_seconds(), 3), 0.0)


def _text(value: object) -> str:
    return value if isinstance(value, str) else "?"


def fork_origin(ledger: Ledger) -> ForkOrigin | None:
    """Return the checkpoint that a run was forked from; None if it is not a fork."""
    for event in ledger:
        if event["event"] != "fork":
            continue
        parent = event.get("parent")
        if isinstance(parent, str):
            return {
                "run": parent,
                "step": event["step"],
                "sha256": event["sha256"],
                "changes": event.get("changes", []),
            }
    return None


def inspect_checkpoint(reader: codec.Reader, pattern: str = "*") -> CheckpointContents:
    """Return the contents of an open checkpoint, with the arrays whose path matches `pattern`."""
    header = reader.header
    config = yaml.loads(header.config, f"{reader.name}:/config").value
    n_parameters = 0
    arrays: list[ArrayContents] = []
    for path, (shape, dtype) in reader.array_shapes().items():
        if path.startswith("params/"):
            n_parameters += math.prod(shape)
        if fnmatchcase(path, pattern):
            statistics = compute_statistics(reader.parts(path))
            arrays.append({"path": path, "shape": list(shape), "dtype": dtype, **statistics})
    return {
        "file": reader.name,
        "global_step": header.global_step,
        "created_by": header.created_by,
        "run": header.run,
        "run_id": header.run_id,
        "sha256": header.sha256,
        "counters": header.counters,
        "relations": check_relations(header.counters, config),
        "parameters": n_parameters,
        "arrays": arrays,
        "values": None if header.values is None else parse(header.values),
        "config": config,
        "numerics": json.loads(header.numerics),
    }


def check_relations(
    counters: Mapping[str, int], config: Mapping[str, Any]
) -> dict[str, bool] | None:
    """Return for each optimizer's counter whether it is consistent with the global step.

    None for a task that is not built in: what a checkpoint's config names is never imported.
    """
    spec = config.get("task")
    initial_step = config.get("initial_step")
    if not isinstance(spec, dict) or not isinstance(initial_step, int):
        return None
    if spec.get("name") not in programs.NAMES:
        return None
    try:
        task = registry.build("task", spec, seed=0, dtype="float32", shards=1)
        expected = task.counts(counters[GLOBAL_STEP] - initial_step)
    except (StepctlError, LookupError, ValueError, TypeError, ArithmeticError):
        return None
    return {name: counters.get(name) == count for name, count in expected.items()}


def compute_statistics(parts: Iterable[Array]) -> Statistics:
    """Return the statistics of one array, given in parts.

    Sums are of differences from the first finite element, which keeps the variance accurate.
    """
    count = n_finite = 0
    low: float = math.inf
    high: float = -math.inf
    shift = total = squares = 0.0
    for values in parts:
        count += values.size
        real = _magnitudes(values)
        finite = real[np.isfinite(real)]
        if not finite.size:
            continue
        low = min(low, finite.min().item())
        high = max(high, finite.max().item())
        wide = finite.astype(np.float64)
        if not n_finite:
            shift = float(wide[0])
        n_finite += finite.size
        with np.errstate(over="ignore", invalid="ignore"):
            total += float((wide - shift).sum())
            squares += float(np.square(wide - shift).sum())
    found: Statistics = {
        "count": count,
        "min": None,
        "max": None,
        "mean": None,
        "std": None,
        "non_finite": count - n_finite,
    }
    if n_finite:
        mean = total / n_finite
        variance = max(squares / n_finite - mean * mean, 0.0)
        found["min"] = low
        found["max"] = high
        if math.isfinite(mean + shift):
            found["mean"] = mean + shift
        if math.isfinite(variance):
            found["std"] = math.sqrt(variance)
    return found


def _magnitudes(values: Array) -> Array:
    """Return real numbers: the absolute values of complex ones, 0 and 1 for false and true."""
    if values.dtype.kind == "c":
        with np.errstate(over="ignore"):
            return np.abs(values.astype(np.complex128))
    if values.dtype.kind == "b":
        return values.view(np.uint8)
    return values
