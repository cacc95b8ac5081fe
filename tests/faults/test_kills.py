"""`kill -9` at any moment: nothing acknowledged is lost, and the resumed run ends with the unbroken one's bits."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import Process, start, until
from trials import Trial, acknowledged, assert_nothing_lost, checkpoints, leftovers, make_trial, random_config

Figure = Callable[[str, int], None]
Moment = Callable[[Process, Path], None]
START_UP = 0.12  # seconds, or so, from the first line of a process to its first step


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_at_random_moments_a_run_loses_nothing(seed: int, tmp_path: Path, figure: Figure) -> None:
    attack(seed, 50, tmp_path, figure)


def test_killed_a_few_times_a_run_loses_nothing(tmp_path: Path, figure: Figure) -> None:
    attack(0, 6, tmp_path, figure)


def attack(seed: int, kills: int, folder: Path, figure: Figure) -> None:
    """Kill runs of ever other configs so many times in all, each run up to three times."""
    chance = random.Random(seed)
    done = runs = inside = 0
    while done < kills:
        trial = make_trial(folder / f"config-{runs}", random_config(chance))
        for _ in range(4):
            if done < kills:
                killed, in_saves = broken_run(trial, trial.new_run(runs), min(3, kills - done), chance)
                done, inside, runs = done + killed, inside + in_saves, runs + 1
    figure("kills", done)
    figure("kills inside a save", inside)
    figure("runs killed and finished", runs)


def broken_run(trial: Trial, run: Path, kills: int, chance: random.Random) -> tuple[int, int]:
    """Start a run, kill it up to so many times, and finish it; return how many kills it met, and met in a save."""
    killed = inside = 0
    while killed < kills:
        before = set(checkpoints(run))
        with start(trial.go_on(run, either=chance.random() < 0.5), cwd=trial.folder) as child:
            some_moment(chance)(child, run)
            child.kill()
            code = child.wait()
        assert_nothing_lost(run, trial.keep_last)
        if code == 0:
            break
        assert code == -9, child.said()
        killed, inside = killed + 1, inside + was_saving(run, before, trial.keep_last)
    trial.finish(run)
    return killed, inside


def was_saving(run: Path, before: set[int], keep_last: int | None) -> bool:
    """Tell whether a save stands half done: not published, not acknowledged, or what it replaces not removed."""
    files = set(checkpoints(run))
    unacknowledged = files - before - {step for step, _ in acknowledged(run)}
    return bool(leftovers(run) or unacknowledged) or (keep_last is not None and len(files) > keep_last)


# --- moments


def some_moment(chance: random.Random) -> Moment:
    """Return a function that comes back at a moment to kill: of the clock, or of what appears in the run."""
    share = chance.random()
    if share < 0.2:
        return after(chance.uniform(0, START_UP))
    if share < 0.4:
        return after(chance.uniform(0, 5 * START_UP))
    if share < 0.6:
        return when_there_are(chance.randint(1, 12), "ledger.jsonl", chance.uniform(0, 0.002))
    if share < 0.7:
        return when_there_are(chance.randint(1, 30), "metrics.jsonl", chance.uniform(0, 0.01))
    return inside_a_save(chance.randint(1, 8), chance.choice((0, 0, 0.001, 0.004)) * chance.random())


def after(seconds: float) -> Moment:
    return lambda child, run: void(child.running(after=seconds))


def when_there_are(more: int, name: str, then: float) -> Moment:
    """So many more lines in a file of the run than there were, and a little later."""

    def moment(child: Process, run: Path) -> None:
        before = lines(run / name)
        until(lambda: lines(run / name) >= before + more or not child.running())
        child.running(after=then)

    return moment


def inside_a_save(number: int, then: float) -> Moment:
    """When a checkpoint that is not published yet is seen for the so-manieth time, and a little later."""

    def moment(child: Process, run: Path) -> None:
        seen, was_there = 0, False

        def enough() -> bool:
            nonlocal seen, was_there
            there = any(name.startswith(".") for name in names(run / "checkpoints"))
            seen, was_there = seen + (there and not was_there), there
            return seen >= number or not child.running()

        until(enough, every=0)
        child.running(after=then)

    return moment


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def void(_: object) -> None:
    """Take a value and return none."""
