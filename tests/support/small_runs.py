"""A run of a few kilobytes, and the checks that hold after every fault."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stepctl.runs import open as opening
from tests.support import series_files
from tests.support.isolated import warm_up

CONFIG = """\
seed: 3
data: {name: arrays, path: data.npz, batch_size: 16, validation_fraction: 0.25}
model: {name: linear}
task: {name: classification}
optimizer: {name: sgd, momentum: 0.9, learning_rate: 0.01}
ema: {decay: 0.9}
stop: {last_step: LAST}
log: {every: 1}
evaluate: {every: 3}
checkpoint: {every: EVERY, keep_last: KEEP, on_error: ERROR}
numerics: {threads: 1}
"""
SERIES_CONFIG = """\
seed: 3
program: {name: "tests.support.sampler:Sampler"}
stop: {last_step: LAST}
log: {every: 1}
checkpoint: {every: EVERY, keep_last: KEEP, on_error: ERROR}
numerics: {threads: 1}
"""
_WALL_CLOCK = ("samples_per_second", "steps_per_second")
_HEAD = re.compile(rb"stepctl-checkpoint 2\nsha256: ([0-9a-f]{64})\nlength: ([0-9]+)\n\0*")
_NAME = re.compile(r"step-([0-9]{8,})\.h5")


class Unbroken:
    """The run that nothing happened to: what each step's checkpoint and row must be."""

    def __init__(
        self,
        folder: Path,
        last: int,
        *,
        every: int = 1,
        keep_last: int = 3,
        on_error: str = "stop",
        config: str = CONFIG,
    ) -> None:
        rng = np.random.default_rng(0)
        np.savez(
            folder / "data.npz", x=rng.normal(size=(64, 4)).astype("f4"), y=rng.integers(0, 3, 64)
        )
        values = {
            "data.npz": folder / "data.npz",
            "LAST": last,
            "EVERY": every,
            "KEEP": keep_last,
            "ERROR": on_error,
        }
        text = config
        for word, value in values.items():
            text = text.replace(word, str(value))
        self.config = folder / "small.yaml"
        self.last = last
        self.keep_last = keep_last
        self.config.write_text(text)
        self.path = folder / "unbroken" / "run"  # a checkpoint holds the run's name
        share_run_id()
        warm_up(["train", "--config", self.config, "--run-dir", self.path, "-q"])
        self.digests = {step: {digest} for step, digest in acknowledged(self.path).items()}
        self.rows = rows(self.path)
        assert {0, every, last} <= set(self.digests)

    def admit(self, run: Path) -> None:
        """Take the checkpoints that a run has before it is attacked for as good as one's own."""
        for step, digest in acknowledged(run).items():
            self.digests.setdefault(step, set()).add(digest)

    def faults(self, run: Path, seen: Iterable[int] = (), excused: Iterable[int] = ()) -> list[str]:
        """Return what is lost, broken or altered in a run that was stopped.

        `seen` were acknowledged, whatever the ledger says; the files of `excused` were broken or gone before.
        """
        recorded = acknowledged(run)
        files = checkpoints(run)
        wrong = [
            f"step {step}: acknowledged, and not in the ledger"
            for step in sorted(set(seen) - set(recorded))
        ]
        wrong += [
            f"step {step}: a broken file"
            for step, digest in files.items()
            if not digest and step not in excused
        ]
        wrong += [
            f"step {step}: {what} is not that of the unbroken run"
            for what, digests in (("the ledger's sha256", recorded), ("the file", files))
            for step, digest in digests.items()
            if digest and digest not in self.digests.get(step, ())
        ]
        known = sorted({*seen, *recorded} - set(excused))
        newest = known[-1] if known else -1
        kept = sorted(step for step, digest in files.items() if digest)[
            -self.keep_last :
        ]  # retention takes older ones
        pruned = {step for step in _pruned(run) if len(kept) == self.keep_last and step < kept[0]}
        wrong += [
            f"step {step}: acknowledged, and lost"
            for step in known
            if step not in pruned | set(files)
        ]
        standing = rows(run)
        wrong += [
            f"no row {row}" for row in self.rows if row["step"] <= newest and row not in standing
        ]
        return wrong + series_files.faults(run, self.path, newest)

    def end_faults(self, run: Path, excused: Iterable[int] = ()) -> list[str]:
        """Return what is wrong with a run that should be finished; `excused` as in `faults`."""
        wrong = self.faults(run, excused=excused)
        if checkpoints(run).get(self.last) not in self.digests[self.last]:
            wrong.append("the last checkpoint is not that of the unbroken run")
        if rows(run) != self.rows:
            wrong.append(f"rows {rows(run)} instead of {self.rows}")
        if series_files.contents(run) != series_files.contents(self.path):
            wrong.append("the series are not those of the unbroken run")
        texts = [
            line
            for name in ("ledger", "metrics")
            for line in (run / f"{name}.jsonl").read_bytes().splitlines()
        ]
        wrong += [f"a torn line: {line!r}" for line in texts if _parsed(line) is None]
        return wrong + [f"left behind: {name}" for name in temporaries(run)]


def share_run_id() -> None:
    """Give the same id to all runs of this process and its forks, so that checkpoints are equal."""
    opening.new_run_id = lambda: "0" * 32  # type: ignore[attr-defined]


def acknowledged(run: Path) -> dict[int, str]:
    """Return the sha256 of each checkpoint that the ledger acknowledges."""
    lines = _lines(run / "ledger.jsonl")
    return {line["step"]: line["sha256"] for line in lines if line.get("event") == "checkpoint"}


def _pruned(run: Path) -> set[int]:
    return {step for line in _lines(run / "ledger.jsonl") for step in line.get("pruned", ())}


def checkpoints(run: Path) -> dict[int, str | None]:
    """Return the sha256 of each file with a checkpoint's name, by step; None if it is broken."""
    found = ((path, _NAME.fullmatch(path.name)) for path in (run / "checkpoints").glob("*"))
    return {int(match[1]): digest(path) for path, match in found if match}


def digest(path: Path) -> str | None:
    """Return the sha256 of a checkpoint's bytes from 512 on; None if the user block differs."""
    data = path.read_bytes()
    head = _HEAD.fullmatch(data[:512])
    actual = hashlib.sha256(data[512:]).hexdigest()
    return (
        actual if head and head[1].decode() == actual and int(head[2]) == len(data) - 512 else None
    )


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the metrics rows without the time they took."""
    return [
        {key: value for key, value in row.items() if key not in _WALL_CLOCK}
        for row in _lines(run / "metrics.jsonl")
    ]


def temporaries(run: Path) -> list[str]:
    """Return the names of what is no file of a run's own."""
    return sorted(path.name for path in run.rglob(".*"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return (
        [row for line in path.read_bytes().splitlines() if (row := _parsed(line))]
        if path.exists()
        else []
    )


@functools.lru_cache(maxsize=4096)
def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return row
