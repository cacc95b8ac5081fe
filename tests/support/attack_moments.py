"""Moments at which an attack strikes: a random time, or the appearance of a file."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.support.processes import Process, until
from tests.support.run_checks import content

Moment = Callable[
    [Process, Path], None
]  # comes back when it is there, or when the process has ended
START_UP = 0.12  # seconds, or so, from the first line of a process to its first step


def some_moment(chance: random.Random) -> Moment:
    """Return a function that waits for a moment to kill: a time, or a change in the run."""
    share = chance.random()
    if share < 0.2:
        return after(chance.uniform(0, START_UP))
    if share < 0.4:
        return after(chance.uniform(0, 5 * START_UP))
    if share < 0.6:
        return when_there_are(chance.randint(1, 12), "ledger.jsonl", chance.uniform(0, 0.002))
    if share < 0.7:
        return when_there_are(chance.randint(1, 30), "metrics.jsonl", chance.uniform(0, 0.01))
    return inside_a_save(
        chance.randint(1, 8), chance.choice((0, 0, 0.001, 0.004)) * chance.random()
    )


def after(seconds: float) -> Moment:
    def moment(child: Process, run: Path) -> None:
        child.running(after=seconds)

    return moment


def when_there_are(more: int, name: str, then: float) -> Moment:
    """So many more lines in a file of the run than there were, and a little later."""

    def moment(child: Process, run: Path) -> None:
        before = lines(run / name)
        until(lambda: lines(run / name) >= before + more or not child.running())
        child.running(after=then)

    return moment


def inside_a_save(number: int, then: float) -> Moment:
    """Wait until an unpublished checkpoint is seen for the k-th time, and a little longer."""

    def moment(child: Process, run: Path) -> None:
        seen = 0
        was_there = False

        def enough() -> bool:
            nonlocal seen, was_there
            there = any(name.startswith(".") for name in names(run / "checkpoints"))
            if there and not was_there:
                seen += 1
            was_there = there
            return seen >= number or not child.running()

        until(enough, every=0.0003)
        child.running(after=then)

    return moment


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def lines(path: Path) -> int:
    return content(path).count(b"\n")
