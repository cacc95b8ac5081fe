"""Several processes on one run: one trains, the others name it and exit."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.paused_runs import Gated, at_the_gate, make_gated
from tests.support.processes import Process, hold, until
from tests.support.run_checks import Trial, assert_nothing_lost, ledger

Figure = Callable[[str, int], None]
DONE, USAGE, IN_USE, STOPPED = 0, 2, 4, 75
SOON = 60.0  # seconds for all but one to leave


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    return make_gated(tmp_path_factory.mktemp("races") / "gated", random.Random(1))


def train(trial: Trial, run: Path) -> list[object]:
    return trial.begin(run)


def or_resume(trial: Trial, run: Path) -> list[object]:
    return trial.begin(run, "--or-resume")


def resume(trial: Trial, run: Path) -> list[object]:
    return ["resume", run]


# Who meets whom, and whether a killed run is there already.
Command = Callable[[Trial, Path], list[object]]
Meeting = tuple[list[Command], bool]
MEETINGS: dict[str, Meeting] = {
    "train and train": ([train, train], False),
    "one line for both, on nothing": ([or_resume, or_resume, or_resume], False),
    "one line for both, on a killed run": ([or_resume, or_resume], True),
    "resume and resume": ([resume, resume], True),
    "five at once": ([resume, or_resume, resume, or_resume, resume], True),
}


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("meeting", MEETINGS)
def test_of_several_processes_exactly_one_trains(
    meeting: str, seed: int, tmp_path: Path, figure: Figure
) -> None:
    compete(MEETINGS[meeting], 8, seed, tmp_path, figure)


@pytest.mark.parametrize("meeting", ["train and train", "resume and resume"])
def test_of_two_processes_exactly_one_trains(meeting: str, tmp_path: Path, figure: Figure) -> None:
    compete(MEETINGS[meeting], 2, 0, tmp_path, figure)


def compete(meeting: Meeting, races: int, seed: int, folder: Path, figure: Figure) -> None:
    chance = random.Random(seed)
    gated = make_gated(folder / "gated", chance)
    commands, killed = meeting
    for number in range(races):
        run = gated.copy_of_killed(number) if killed else gated.trial.new_run(number)
        race(gated, run, commands, chance)
    figure("races", races)


def race(gated: Gated, run: Path, commands: Sequence[Command], chance: random.Random) -> None:
    """Let them go at once, or nearly; all but one must leave while that one stands at the gate."""
    starts = len(ledger(run, "start"))
    with contextlib.ExitStack() as stack:
        racers = [
            stack.enter_context(
                hold(command(gated.trial, run), cwd=gated.trial.folder, env=gated.environment(run))
            )
            for command in commands
        ]
        spread = chance.choice((0, 0, 0.01, 0.2))
        for racer in racers:
            racer.release()
            racer.running(after=spread * chance.random())
        until(
            lambda: (
                sum(racer.running() for racer in racers) <= 1
                or len(ledger(run, "start")) > starts + 1
            ),
            SOON,
        )
        running = [racer for racer in racers if racer.running()]
        assert len(running) == 1, [racer.said() for racer in racers]
        (winner,) = running
        for racer, command in zip(racers, commands, strict=True):
            if racer is not winner:
                assert_left(racer, {winner.pid}, may_find_a_run=command is train)
        until(lambda: at_the_gate(run) or not winner.running())
        gated.open(run)
        assert winner.wait() == DONE, winner.said()
    assert [line["pid"] for line in ledger(run, "start")[starts:]] == [winner.pid]
    gated.trial.assert_finished(run)


def assert_left(loser: Process, holders: set[int], may_find_a_run: bool) -> None:
    """Assert that a process left because another holds the run, and said which; or because a run is there."""
    said = loser.said().splitlines()[-1]
    if loser.wait() == USAGE and may_find_a_run:
        assert "already contains a run; continue with: stepctl resume" in said
        return
    assert loser.wait() == IN_USE, loser.said()
    match = re.search(r": in use by process (\d+) on (\S+); wait for it, or stop it$", said)
    assert match, said
    assert match[2] == socket.gethostname()
    assert int(match[1]) in holders, f"{said}; it is held by one of {holders}"


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("ended", [False, True], ids=["that trains", "that has ended"])
def test_one_line_for_both_meets_a_run_that_began_while_it_was_building(
    at: int, ended: bool, gated: Gated, tmp_path: Path
) -> None:
    run = gated.trial.new_run(tmp_path.name)
    with gated.building(or_resume(gated.trial, run), run, at) as late:
        assert late.running(), late.said()
        with gated.start(train(gated.trial, run), run) as first:
            until(lambda: at_the_gate(run) or not first.running())
            if ended:
                gated.open(run)
                assert first.wait() == DONE, first.said()
            gated.let_build(run)
            assert late.wait() == (DONE if ended else IN_USE), late.said()
            gated.open(run)
            assert first.wait() == DONE, first.said()
    assert len(ledger(run, "start")) == 1
    gated.trial.assert_finished(run)


# --- when the one who holds it ends just then


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("seed", range(1, 3))
def test_at_the_end_of_a_holder_at_most_one_takes_over(
    number: signal.Signals, seed: int, tmp_path: Path, figure: Figure
) -> None:
    chance = random.Random(seed)
    gated = make_gated(tmp_path / "gated", chance)
    for race_number in range(10):
        take_over(gated, gated.copy_of_killed(race_number), number, chance)
    figure("races", 10)


def take_over(gated: Gated, run: Path, number: signal.Signals, chance: random.Random) -> None:
    """End the holder of a run at the moment at which three others come; the run is finished exactly all the same."""
    trial = gated.trial
    with gated.start(resume(trial, run), run) as holder, contextlib.ExitStack() as stack:
        until(lambda: len(ledger(run, "start")) > 1)
        starts = len(ledger(run, "start"))
        others = [stack.enter_context(hold(resume(trial, run), cwd=trial.folder)) for _ in range(3)]
        for other in others:
            other.release()
        others[0].running(after=chance.uniform(0, 0.1))
        holder.kill(number)
        gated.open(run)
        codes = [other.wait() for other in others]
        assert holder.wait() == (-9 if number == signal.SIGKILL else STOPPED), holder.said()
    assert set(codes) <= {DONE, IN_USE}, [other.said() for other in others]
    new = [line["pid"] for line in ledger(run, "start")[starts:]]
    assert len(new) <= 1
    for other in others:
        if other.wait() == IN_USE:
            assert_left(other, {holder.pid, *new}, may_find_a_run=False)
    assert_nothing_lost(run, trial.keep_last)
    trial.finish(run)
