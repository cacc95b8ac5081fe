"""SIGKILL at random moments of the example programs and models: the resumed run ends with the same bits and rows.

At least 80 % of the kills come after the first step and before the last checkpoint. `pytest --faults` kills each
program 20 times in each form and each model 20 times with 1 and 4 shards, `pytest --faults=all` 200 times; both print
how the kills are spread over the run.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import series_files
from tests.support.attack_moments import START_UP
from tests.support.processes import Process, start, until
from tests.support.program_examples import (
    EXAMPLES,
    LOSS_EXAMPLES,
    Example,
    LossExample,
    write_data,
)
from tests.support.program_runs import (
    FORMS,
    LOSS,
    AnyExample,
    config,
    rows,
    saved_state,
    script_process,
    train,
)
from tests.support.run_checks import acknowledged, assert_nothing_lost, checkpoints, leftovers

Figure = Callable[[str, int], None]
KEEP_LAST = 3
MOST_AHEAD = 15  # steps between two kills of a run
LEAST_INSIDE = 0.8  # of the kills, after the first step and before the last checkpoint
BEFORE = "before the first checkpoint of a step"
AFTER = "after the last checkpoint"
by_form = pytest.mark.parametrize("form", FORMS)


@pytest.mark.faults
@by_form
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_killed_at_random_moments_a_program_ends_with_the_same_bits(
    example: Example, form: str, tmp_path: Path, figure: Figure, pytestconfig: pytest.Config
) -> None:
    kills = 200 if pytestconfig.option.faults == "all" else 20
    places = attack(example, form, kills, tmp_path)
    for place, count in places.items():
        figure(f"kills of programs {place}", count)
    figure("kills of programs", kills)
    outside = places[BEFORE] + places[AFTER]
    assert kills - outside >= LEAST_INSIDE * kills, places


@by_form
def test_killed_a_few_times_a_program_ends_with_the_same_bits(form: str, tmp_path: Path) -> None:
    example = next(example for example in EXAMPLES if example.name == "hmc")
    places = attack(example, form, 4, tmp_path)
    assert places.total() == 4


@pytest.mark.faults
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", LOSS_EXAMPLES)
def test_killed_at_random_moments_a_trained_model_has_the_same_bits(
    name: str, shards: int, tmp_path: Path, figure: Figure, pytestconfig: pytest.Config
) -> None:
    write_data(tmp_path)
    kills = 200 if pytestconfig.option.faults == "all" else 20
    places = attack(LossExample(name, tmp_path, shards), LOSS, kills, tmp_path)
    figure("kills of models that give their loss", kills)
    outside = places[BEFORE] + places[AFTER]
    assert kills - outside >= LEAST_INSIDE * kills, places


def attack(example: AnyExample, form: str, kills: int, folder: Path) -> Counter[str]:
    """Kill runs of an example so many times in all; return how many of the kills fell into which part of the run."""
    chance = random.Random(f"{example.name} {form} {kills}")
    expected = folder / "expected"
    train(example, form, expected, log_every=1)
    last = max(checkpoints(expected))
    places: Counter[str] = Counter()
    number = 0
    while places.total() < kills:
        number += 1
        run = folder / f"run-{number}"
        command = Command(example, form, run, checkpoint_every=chance.randint(1, 3))
        while places.total() < kills:
            with command.start(folder) as child:
                wait_for_moment(child, run, chance)
                child.kill()
                code = child.wait()
            assert_nothing_lost(run, KEEP_LAST)
            newest = max((step for step, _ in acknowledged(run)), default=0)
            assert series_files.faults(run, expected, newest) == []
            assert series_files.is_beginning(run, expected)
            if code == 0:
                break
            assert code == -9, child.said()
            places[place_of_kill(run, last)] += 1
        with command.start(folder) as child:
            assert child.wait() == 0, child.said()
        assert saved_state(run) == saved_state(expected)
        assert rows(run) == rows(expected)
        assert series_files.contents(run) == series_files.contents(expected)
        assert not leftovers(run)
    return places


class Command:
    """What a user types to start a run, and to continue it."""

    def __init__(self, example: AnyExample, form: str, run: Path, *, checkpoint_every: int) -> None:
        cadences = {
            "log_every": 1,
            "checkpoint_every": checkpoint_every,
            "keep_last": KEEP_LAST,
        }
        settings = {"last_step": example.last_step, **cadences}
        if form == "script":
            assert isinstance(example, Example)
            self._words = [example.file("script"), run, json.dumps(settings)]
            self._call = script_process
        else:
            file = run.with_suffix(".yaml")
            file.write_text(json.dumps(config(example, **settings)))
            self._words = ["train", "--config", file, "--run-dir", run, "--or-resume"]
            self._call = None

    def start(self, folder: Path) -> Process:
        return start(self._words, cwd=folder, call=self._call)


def wait_for_moment(child: Process, run: Path, chance: random.Random) -> None:
    """Wait for a random time within the start, or until a random step is saved and then for some milliseconds."""
    if chance.random() < 0.1:
        child.running(after=chance.uniform(0, START_UP))
        return
    step = max(checkpoints(run), default=0) + chance.randint(1, MOST_AHEAD)
    until(lambda: max(checkpoints(run), default=0) >= step or not child.running())
    child.running(after=chance.uniform(0, 0.005))


def place_of_kill(run: Path, last: int) -> str:
    newest = max(checkpoints(run), default=0)
    if newest == 0:
        return BEFORE
    if newest == last:
        return AFTER
    tenth = 10 * newest // last
    return f"at {10 * tenth:2} to {10 * tenth + 10} % of the steps"
