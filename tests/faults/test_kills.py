"""SIGKILL at random moments: nothing acknowledged is lost, and the resumed run has the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.attack_moments import some_moment
from tests.support.processes import start
from tests.support.run_checks import (
    Trial,
    acknowledged,
    assert_nothing_lost,
    checkpoints,
    leftovers,
    make_trial,
    random_config,
)

Figure = Callable[[str, int], None]


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_at_random_moments_a_run_loses_nothing(
    seed: int, tmp_path: Path, figure: Figure
) -> None:
    attack(seed, 50, tmp_path, figure)


def test_killed_a_few_times_a_run_loses_nothing(tmp_path: Path, figure: Figure) -> None:
    attack(0, 6, tmp_path, figure)


def attack(seed: int, kills: int, folder: Path, figure: Figure) -> None:
    """Kill runs of ever other configs so many times in all, each run up to three times."""
    chance = random.Random(seed)
    done = runs = inside = 0
    while done < kills:
        trial = make_trial(folder / f"config-{runs}", some_config(chance))
        for _ in range(8):
            if done < kills:
                killed, in_saves = broken_run(
                    trial, trial.new_run(runs), min(3, kills - done), chance
                )
                done, inside, runs = done + killed, inside + in_saves, runs + 1
    figure("kills", done)
    figure("kills inside a save", inside)
    figure("runs killed and finished", runs)


def some_config(chance: random.Random) -> dict[str, Any]:
    """Return a config of digits, or of a text's windows, whose order and integer dtype are kept."""
    if chance.random() < 0.8:
        return random_config(chance)
    tokens = "tests.support.token_model"
    return random_config(
        chance,
        data={
            "name": f"{tokens}:windows",
            "batch_size": 24,
            "shards": chance.choice((1, 4)),
            "order": "sequential",
            "validation_fraction": 0.1,
        },
        model={"name": f"{tokens}:Bigram"},
        task={"name": "loss"},
        optimizer={"name": "adam", "learning_rate": 0.01},
    )


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
            trial.assert_finished(run)
            return killed, inside
        assert code == -9, child.said()
        killed, inside = killed + 1, inside + was_saving(run, before, trial.keep_last)
    trial.finish(run)
    return killed, inside


def was_saving(run: Path, before: set[int], keep_last: int | None) -> bool:
    """Tell whether a save stands half done: not published, not acknowledged, or what it replaces not removed."""
    files = set(checkpoints(run))
    unacknowledged = files - before - {step for step, _ in acknowledged(run)}
    return bool(leftovers(run) or unacknowledged) or (
        keep_last is not None and len(files) > keep_last
    )
