"""The ledger, `ledger.jsonl`: the events of a run, and the facts that follow from them.

ledger = RunDirectory("runs/quickstart").read_ledger()
ledger.target                      # the step that a plain resume trains up to
ledger.acknowledged                # sha256 -> step of the published checkpoints
[event["step"] for event in ledger if event["event"] == "start"]
"""

import functools
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NotRequired, TypedDict, cast

_RUN_ID = re.compile(r"[0-9a-f]{32}")
MAX_STEP = 2**63 - 1


class RecordedChange(TypedDict):
    """A `config.changes.KeyChange` as read from the ledger: only its key is checked."""

    key: str
    old: NotRequired[object]
    new: NotRequired[object]


class _Event(TypedDict):
    """A line of the ledger. Keys typed `object` are not checked when the file is read."""

    time: NotRequired[object]


class StartEvent(_Event):
    """A segment started at `step`."""

    event: Literal["start"]
    segment: int  # 1, 2, ...
    step: int
    target: int
    data: str  # fingerprint
    argv: NotRequired[object]  # command line
    run_id: NotRequired[object]
    config: NotRequired[dict[str, Any]]  # of this segment, if it differs from the one before
    changes: NotRequired[list[RecordedChange]]
    set_aside: NotRequired[object]  # new names of the later checkpoints of a run that goes back


class CheckpointEvent(_Event):
    """A checkpoint was published, and is acknowledged by this line."""

    event: Literal["checkpoint"]
    step: int
    sha256: str
    pruned: NotRequired[object]  # steps of the checkpoints removed after it
    series: NotRequired[object]  # number of rows of each series up to the step


class EndEvent(_Event):
    """A segment ended at `step`."""

    event: Literal["end"]
    segment: int
    step: int
    reason: str
    done: NotRequired[object]  # whether the run reached its target


class PruneEvent(_Event):
    """Checkpoints were removed by `stepctl prune`, or found missing and given up."""

    event: Literal["prune"]
    steps: list[object]


class ForkEvent(_Event):
    """A fork at `step`: with `parent` in the new run's ledger, with `child` in the parent's."""

    event: Literal["fork"]
    step: int
    sha256: str
    run_id: NotRequired[object]
    parent: NotRequired[object]
    child: NotRequired[object]
    data: NotRequired[object]
    changes: NotRequired[list[RecordedChange]]


class MirrorEvent(_Event):
    """The state of the mirror changed."""

    event: Literal["mirror"]
    url: str
    state: str  # "failing", "working", "lost" or "refused"
    error: NotRequired[object]


LedgerEvent = StartEvent | CheckpointEvent | EndEvent | PruneEvent | ForkEvent | MirrorEvent

_REQUIRED: dict[str, dict[str, type[Any]]] = {
    "start": {"segment": int, "step": int, "target": int, "data": str},
    "checkpoint": {"step": int, "sha256": str},
    "end": {"segment": int, "step": int, "reason": str},
    "prune": {"steps": list},
    "fork": {"step": int, "sha256": str},
    "mirror": {"url": str, "state": str},
}


class Ledger:
    """The events of a run, in order, as they were when the file was read.

    What follows from them is computed once.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        """Rows that are not events are skipped: no segment wrote them."""
        self.events = [cast(LedgerEvent, row) for row in rows if _is_event(row)]

    def __iter__(self) -> Iterator[LedgerEvent]:
        return iter(self.events)

    @functools.cached_property
    def starts(self) -> list[StartEvent]:
        """The start of each segment."""
        return [event for event in self.events if event["event"] == "start"]

    @functools.cached_property
    def run_id(self) -> str | None:
        """The id in the first line; None for a run of format version 1, until it is resumed."""
        for event in self.events:
            run_id = event.get("run_id")
            if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id):
                return run_id
        return None

    @functools.cached_property
    def acknowledged(self) -> dict[str, int]:
        """The published checkpoints, removed ones too: sha256 -> step."""
        return {
            event["sha256"]: event["step"]
            for event in self.events
            if event["event"] == "checkpoint"
        }

    @property
    def target(self) -> int | None:
        """The target of the newest segment."""
        starts = self.starts
        return starts[-1]["target"] if starts else None

    @property
    def config(self) -> dict[str, Any] | None:
        """The newest changed config; None if config.yaml still holds."""
        changed = [start["config"] for start in self.starts if "config" in start]
        return changed[-1] if changed else None

    @property
    def data(self) -> str | None:
        """The fingerprint of the data that the newest segment, or the fork, used."""
        for event in reversed(self.events):
            if event["event"] == "start" or event["event"] == "fork":
                data = event.get("data")
                if isinstance(data, str):
                    return data
        return None

    def newest_checkpoint(self, step: int) -> CheckpointEvent | None:
        """Return the newest acknowledgement of a step's checkpoint."""
        found = [
            event
            for event in self.events
            if event["event"] == "checkpoint" and event["step"] == step
        ]
        return found[-1] if found else None

    def series_rows(self, step: int) -> dict[str, int]:
        """Return the number of rows of each series up to the newest checkpoint of a step."""
        event = self.newest_checkpoint(step)
        rows = None if event is None else event.get("series")
        if not isinstance(rows, dict):
            return {}
        return {name: n for name, n in rows.items() if type(n) is int}

    @property
    def changed_keys(self) -> set[str]:
        """The config keys that some resume changed."""
        return {change["key"] for start in self.starts for change in start.get("changes", ())}

    @functools.cached_property
    def forks(self) -> dict[int, list[str]]:
        """The forks of this run: step -> directories. Retention keeps these checkpoints."""
        found: dict[int, list[str]] = {}
        for event in self.events:
            if event["event"] == "fork":
                child = event.get("child")
                if isinstance(child, str):
                    found.setdefault(event["step"], []).append(child)
        return found

    def owns(self, run_id: str | None, sha256: str) -> bool:
        """Tell whether a checkpoint belongs to this run. Without a ledger, every one does."""
        acknowledged = self.acknowledged
        if self.run_id is None and not acknowledged:
            return True
        if run_id is None or self.run_id is None:
            return sha256 in acknowledged
        return run_id == self.run_id

    def data_between(self, first: int, last: int) -> set[str]:
        """Return the fingerprints of the data that made the steps after `first` up to `last`."""
        found = set()
        end = last
        for start in reversed(self.starts):
            # A segment's steps past the start of a later one were discarded.
            if start["step"] < end:
                found.add(start["data"])
                end = start["step"]
            if end <= first:
                break
        return found


def new_run_id() -> str:
    """Return a random run id: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def _is_event(row: dict[str, Any]) -> bool:
    """Tell whether a line of the ledger has the keys of its event."""
    required = _REQUIRED.get(str(row.get("event")))
    if required is None:
        return False
    for name, kind in required.items():
        value: Any = row.get(name)
        if not isinstance(value, kind) or (kind is int and not 0 <= value <= MAX_STEP):
            return False
    if "config" in row and not isinstance(row["config"], dict):
        return False
    return "changes" not in row or _are_changes(row["changes"])


def _are_changes(changes: object) -> bool:
    if not isinstance(changes, list):
        return False
    return all(
        isinstance(change, dict) and isinstance(change.get("key"), str) for change in changes
    )
