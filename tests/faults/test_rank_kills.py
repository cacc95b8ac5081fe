"""Jobs of ranks, killed or signalled at any moment: no rank outlives its job, and the resumed run ends exactly."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from typing import Any

import pytest
from moments import some_moment, when_there_are
from processes import Process, start_cold, until
from trials import Trial, acknowledged, assert_nothing_lost, checkpoints, ledger, make_trial, random_config

from jobs import LONGEST, launcher, needs_mpi

Figure = Callable[[str, int], None]
pytestmark = needs_mpi
SHARDS = 8
STOPPED = 75
SOON = 10.0  # seconds in which the ranks of a job whose launcher was killed end; it takes one


# --- killed


def test_killed_a_few_times_a_run_on_ranks_loses_nothing(tmp_path: Path, figure: Figure) -> None:
    attack(0, 5, tmp_path, figure)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_random_moments_a_run_on_ranks_loses_nothing(seed: int, tmp_path: Path, figure: Figure) -> None:
    attack(seed, 10, tmp_path, figure)


def attack(seed: int, kills: int, folder: Path, figure: Figure) -> None:
    """Kill one rank, or the launcher, of jobs of ever other numbers of ranks; so many kills in all."""
    chance = random.Random(seed)
    done = runs = 0
    while done < kills:
        trial = make_trial(folder / f"config-{runs}", shared_config(chance))
        for _ in range(3):
            if done < kills:
                done += broken_run(trial, trial.new_run(runs), min(3, kills - done), chance)
                runs += 1
    figure("kills of a rank or its launcher", done)
    figure("runs on ranks killed and finished", runs)


def shared_config(chance: random.Random, **sections: Any) -> dict[str, Any]:
    data = {"name": "digits", "batch_size": chance.choice((16, 48)), "shards": SHARDS, "validation_fraction": 0.9}
    return random_config(chance, data=data, **sections)


def broken_run(trial: Trial, run: Path, kills: int, chance: random.Random) -> int:
    """Start a run, kill its job up to so many times, and finish it on one process; return the kills that it met."""
    killed = 0
    while killed < kills:
        size = chance.choice((2, 2, 4))
        with ranks(size, trial.go_on(run, either=chance.random() < 0.5), trial.folder) as job:
            members = job_members(job, size)
            victim = chance.choice((job.pid, *members))
            some_moment(chance)(job, run)
            kill(victim)
            code = job.wait(LONGEST)
            until(lambda gone=members: not any(map(alive, gone)), deadline=SOON)
        assert_nothing_lost(run, trial.keep_last)
        if code == 0:
            break
        assert code in (-9, 9, 137), job.said()
        killed += 1
    trial.finish(run)
    return killed


def test_a_job_whose_launcher_is_killed_lets_the_run_go(tmp_path: Path) -> None:
    """The lock is free as soon as the ranks are gone: a resume right after it finds nobody there."""
    trial = make_trial(tmp_path, shared_config(random.Random(1), stop={"last_step": 60}, checkpoint=EVERY_STEP))
    run = trial.new_run("killed")
    with ranks(2, trial.begin(run), trial.folder) as job:
        members = job_members(job, 2)
        when_there_are(5, "ledger.jsonl", 0)(job, run)
        job.kill()
        until(lambda: not any(map(alive, members)), deadline=SOON)
    trial.finish(run)


# --- signalled

EVERY_STEP = {"every": 1, "keep_last": None}
TO = {"rank 0": [0], "rank 1": [1], "all ranks": [0, 1], "the launcher": [-1]}
LONG = {"stop": {"last_step": 200}, "log": {"every": 1}, "checkpoint": {"every": 1000, "keep_last": None}}
QUICK = [("rank 1", SIGTERM), ("all ranks", SIGINT), ("the launcher", SIGUSR1)]


@pytest.mark.parametrize(("to", "number"), QUICK)
def test_a_signal_ends_in_one_checkpoint_and_75(to: str, number: signal.Signals, tmp_path: Path) -> None:
    stopped(to, number, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGUSR1])
@pytest.mark.parametrize("to", TO)
def test_so_does_any_signal_to_anybody(to: str, number: signal.Signals, tmp_path: Path, figure: Figure) -> None:
    stopped(to, number, tmp_path)
    figure("jobs stopped by a signal", 1)


def stopped(to: str, number: signal.Signals, folder: Path) -> None:
    trial = make_trial(folder, shared_config(random.Random(2), initial_step=0, **LONG))
    run = trial.new_run("stopped")
    with ranks(2, trial.begin(run, "-q"), trial.folder) as job:
        receivers = (*job_members(job, 2), job.pid)
        when_there_are(10, "metrics.jsonl", 0)(job, run)
        for place in TO[to]:
            os.kill(receivers[place], number)
        assert job.wait(LONGEST) == STOPPED, job.said()
    [(first, _), (step, _)] = acknowledged(run)
    assert (first, [*checkpoints(run)]) == (0, [0, step])
    assert f"stopped at global step {step} (signal {number.name}); go on with: stepctl resume {run}" in job.said()
    assert [row["reason"] for row in ledger(run, "end")] == [f"signal {number.name}"]
    trial.finish(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_save_is_answered_and_training_goes_on(rank: int, tmp_path: Path) -> None:
    trial = make_trial(tmp_path, shared_config(random.Random(3), initial_step=0, **LONG))
    run = trial.new_run("saved")
    with ranks(2, trial.begin(run), trial.folder) as job:
        members = job_members(job, 2)
        when_there_are(10, "metrics.jsonl", 0)(job, run)
        os.kill(members[rank], SIGUSR2)
        assert job.wait(LONGEST) == 0, job.said()
    assert len(checkpoints(run)) == 3  # the first, the last, and this one
    trial.assert_finished(run)


# --- jobs


def ranks(size: int, arguments: list[object], folder: Path) -> Process:
    """Start `mpiexec -n <size> stepctl *arguments`."""
    return start_cold(arguments, cwd=folder, before=launcher(size))


def job_members(job: Process, size: int) -> list[int]:
    """Return the processes of a job by rank, once they are all there."""
    found: dict[int, int] = {}

    def all_there() -> bool:
        for child in grandchildren(job.pid):
            words = dict(word.split("=", 1) for word in read(f"/proc/{child}/environ").split("\0") if "=" in word)
            if "PMI_RANK" in words:
                found[int(words["PMI_RANK"])] = child
        return len(found) == size

    until(all_there)
    return [found[rank] for rank in range(size)]


def grandchildren(pid: int) -> list[int]:
    return [grandchild for child in children(pid) for grandchild in children(child)]


def children(pid: int) -> list[int]:
    return list(map(int, read(f"/proc/{pid}/task/{pid}/children").split()))


def read(path: str) -> str:
    """Return what a file says; nothing if it is gone."""
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def kill(pid: int) -> None:
    """Kill a process, if it is there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
