"""Signals at random moments: the exit code is true, and the run resumes exactly."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, Signals

import pytest

from tests.support.attack_moments import some_moment, when_there_are
from tests.support.processes import Process, rows_at_once, start, start_cold
from tests.support.run_checks import (
    Trial,
    acknowledged,
    assert_nothing_lost,
    checkpoints,
    content,
    ledger,
    make_trial,
    random_config,
)

Figure = Callable[[str, int], None]
STOPS = {SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGXCPU}
ALL = (SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU)
STOPPED, INTERRUPTED = 75, 130
COLD = 0.1  # the share of processes that are not forked off a warm server: they take longer to end, too


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 21))
def test_signalled_at_random_moments_a_run_keeps_its_word(
    seed: int, tmp_path: Path, figure: Figure
) -> None:
    attack(seed, 25, tmp_path, figure)


def test_signalled_a_few_times_a_run_keeps_its_word(tmp_path: Path, figure: Figure) -> None:
    attack(0, 5, tmp_path, figure)


def attack(seed: int, signals: int, folder: Path, figure: Figure) -> None:
    """Signal processes of runs of ever other configs, so many in all, and each run up to three times."""
    chance = random.Random(seed)
    done = runs = 0
    while done < signals:
        trial = make_trial(folder / f"config-{runs}", long_config(chance))
        for _ in range(4):
            if done < signals:
                done += signalled_run(
                    trial, trial.new_run(runs), min(3, signals - done), chance, figure
                )
                runs += 1
    figure("signalled processes", done)


def long_config(chance: random.Random) -> dict[str, object]:
    """Return a config whose training outlasts its start-up, that logs each step and seldom saves of its own accord."""
    first = chance.choice((0, 0, 7))
    return random_config(
        chance,
        initial_step=first,
        stop={"last_step": first + chance.randint(60, 120)},
        log={"every": 1},
        checkpoint={"every": chance.choice((7, 1000)), "keep_last": chance.choice((1, 3, None))},
    )


def signalled_run(
    trial: Trial, run: Path, attacks: int, chance: random.Random, figure: Figure
) -> int:
    """Start a run, signal it up to so many times, and finish it; return how many processes were signalled."""
    done, code = 0, STOPPED
    while done < attacks and code != 0:
        before, cold = Before.of(run), chance.random() < COLD
        words = trial.go_on(run, either=chance.random() < 0.5)
        begin = (
            start_cold(words, cwd=trial.folder)
            if cold
            else start(words, cwd=trial.folder, call=rows_at_once)
        )
        with begin as child:
            # a new interpreter cannot answer any signal: its first moments are not ours
            moment = (
                when_there_are(chance.randint(1, 9), "ledger.jsonl", 0)
                if cold
                else some_moment(chance)
            )
            moment(child, run)
            shots = shoot(child, run, trial, before, chance, told=not cold)
            code = child.wait()
            done += bool(shots)
            judge(code, child.said(), shots, before, run, trial)
        assert_nothing_lost(run, trial.keep_last)
        figure("signals", len(shots))
        figure(f"signalled processes that ended with {code}", bool(shots))
    if code != 0:  # else it is judged already
        trial.finish(run)
    return done


# --- one attack


@dataclass(frozen=True)
class Before:
    """What a run held before a process was started on it."""

    starts: int
    acknowledged: list[tuple[int, str]]

    @staticmethod
    def of(run: Path) -> Before:
        return Before(len(ledger(run, "start")), list(acknowledged(run)))

    def began(self, run: Path) -> bool:
        """Tell whether a segment has started since."""
        return len(ledger(run, "start")) > self.starts


@dataclass(frozen=True)
class Shot:
    """A signal that met a process: whether its training had begun, and the newest rows just before and after it."""

    number: Signals
    training: bool
    row_before: int
    row_after: int


def shoot(
    child: Process, run: Path, trial: Trial, before: Before, chance: random.Random, *, told: bool
) -> list[Shot]:
    """Send a signal, or two shortly after one another, or one again and again until the process has ended.

    Return those that it was there for. Where it holds rows back, so that they are not `told`, any step may be meant.
    """
    first = chance.choice(ALL)
    second = chance.choice((first, *ALL))
    plans: tuple[Iterable[Signals], ...] = ([first], [first, second], itertools.repeat(first))
    pause, shots = chance.choice((0, 0.002, 0.02)), []
    for number in chance.choices(plans, weights=(3, 2, 1))[0]:
        training, row_before = (
            before.began(run),
            newest_row(run, trial) if told else trial.config["initial_step"],
        )
        if not child.kill(number):
            break
        shots.append(
            Shot(number, training, row_before, newest_row(run, trial) if told else trial.last_step)
        )
        if not child.running(after=pause * chance.random()):
            break
    return shots


def newest_row(run: Path, trial: Trial) -> int:
    """Return the step of the newest training row: the step in flight is the next, or the one after."""
    lines = content(run / "metrics.jsonl").splitlines(keepends=True)
    found = (json.loads(line) for line in reversed(lines) if line.endswith(b"\n"))
    return next((row["step"] for row in found), trial.config["initial_step"])


# --- what must hold after it


def judge(code: int, said: str, shots: list[Shot], before: Before, run: Path, trial: Trial) -> None:
    """Assert that the exit code tells the truth about what the signals did."""
    if code == 0:
        trial.assert_finished(run)
        assert all(
            shot.row_after >= trial.last_step - 1 for shot in shots if shot.number in STOPS
        ), shots
    elif code == STOPPED:
        judge_stop(said, shots, run)
    else:
        assert -code in {shot.number for shot in shots} or code == INTERRUPTED, (
            f"{code}, {shots}: {said[-300:]}"
        )
        # a fresh run begins with its first checkpoint
        began = before.began(run) and before.acknowledged
        assert not began, f"exit code {code} after training began: {shots}, {said[-300:]}"
        assert list(acknowledged(run)) == before.acknowledged
    if "stopped at once" not in said:
        judge_publications(
            [shot for shot in shots if shot.number == SIGUSR2 and shot.training], run, trial
        )


def judge_stop(said: str, shots: list[Shot], run: Path) -> None:
    """75 promises a durable checkpoint of the step that it names, made after the step in flight."""
    assert list(acknowledged(run)), f"nothing is saved: {said[-300:]}"
    newest, _ = list(acknowledged(run))[-1]
    newest_file = max(checkpoints(run))
    if [shot.number for shot in shots].count(SIGINT) > 1 and "stopped at once" in said:
        assert said.endswith(f"continue from the newest checkpoint with: stepctl resume {run}\n"), (
            said
        )
        # the second SIGINT may come after the rename of a file and before its line in the ledger
        assert newest <= newest_file
        return
    assert newest == newest_file
    match = re.search(
        r"stopped at global step (\d+) \(signal (\w+)\); continue with: stepctl resume (.*)\n$",
        said,
    )
    assert match, said
    assert (int(match[1]), match[3]) == (newest, str(run))
    stops = [shot for shot in shots if shot.number in STOPS]
    assert Signals[match[2]] in {shot.number for shot in stops}
    assert ledger(run, "end")[-1]["reason"] == f"signal {match[2]}"
    assert not stops[0].training or newest <= stops[0].row_after + 2, (
        f"not at once: step {newest}, {shots}"
    )


def judge_publications(shots: list[Shot], run: Path, trial: Trial) -> None:
    """Each SIGUSR2 in training is answered by a checkpoint, soon."""
    for shot in shots:
        soon = range(shot.row_before, shot.row_after + 3)
        assert trial.last_step in soon or any(step in soon for step, _ in acknowledged(run)), shot
