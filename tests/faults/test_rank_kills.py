"""Kills and signals to ranks: no rank outlives its job, and the resumed run has the same bits."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from typing import Any

import pytest

from tests.support.attack_moments import Moment, after, some_moment, when_there_are
from tests.support.mpi_jobs import LONGEST, launcher, needs_mpi
from tests.support.processes import Process, start_cold, until
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
pytestmark = needs_mpi
SHARDS = 8
STOPPED = 75
SOON = 10.0  # seconds in which the ranks of a job whose launcher was killed end; it takes one


# --- killed


def test_killed_a_few_times_a_run_on_ranks_loses_nothing(tmp_path: Path, figure: Figure) -> None:
    attack(0, 5, tmp_path, figure, sizes=(2,))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_at_random_moments_a_run_on_ranks_loses_nothing(
    seed: int, tmp_path: Path, figure: Figure
) -> None:
    attack(seed, 10, tmp_path, figure, sizes=(2, 2, 2, 4))


def attack(seed: int, kills: int, folder: Path, figure: Figure, *, sizes: tuple[int, ...]) -> None:
    """Kill one rank, or the launcher, of jobs of ever other numbers of ranks; so many kills in all."""
    chance = random.Random(seed)
    done = runs = 0
    while done < kills:
        trial = make_trial(folder / f"config-{runs}", shared_config(chance))
        for _ in range(3):
            if done < kills:
                done += broken_run(trial, trial.new_run(runs), min(3, kills - done), chance, sizes)
                runs += 1
    figure("kills of a rank or its launcher", done)
    figure("runs on ranks killed and finished", runs)


def small_config(**sections: Any) -> dict[str, Any]:
    """Return a config whose training lasts until it is stopped, or a second."""
    model = {"name": "mlp", "hidden": [8]}
    return shared_config(random.Random(2), initial_step=0, model=model, **LONG | sections)


def shared_config(chance: random.Random, **sections: Any) -> dict[str, Any]:
    data = {
        "name": "digits",
        "batch_size": chance.choice((16, 48)),
        "shards": SHARDS,
        "validation_fraction": 0.9,
    }
    return random_config(chance, data=data, **sections)


def broken_run(
    trial: Trial, run: Path, kills: int, chance: random.Random, sizes: tuple[int, ...]
) -> int:
    """Start a run, kill its job up to so many times, and finish it on one process; return the kills that it met."""
    killed = 0
    while killed < kills:
        size = chance.choice(sizes)
        with started(size, trial.go_on(run, either=chance.random() < 0.5), trial.folder) as (
            job,
            others,
        ):
            victim = chance.choice((job, *others))
            kill_moment(chance)(job, run)
            met = victim.kill()
            code = job.wait(LONGEST)
            assert_gone(others)
        assert_nothing_lost(run, trial.keep_last)
        if code == 0:
            trial.assert_finished(run)
            break
        assert met, f"{code}: {job.said()}"
        killed += 1
    trial.finish(run)
    return killed


def kill_moment(chance: random.Random) -> Moment:
    """Return a moment of the start-up, or more often one of those that `moments` knows."""
    return after(chance.uniform(0, 1.5)) if chance.random() < 0.2 else some_moment(chance)


def assert_gone(others: list[Process]) -> None:
    """Assert that no rank outlives its job for long."""
    assert not any(other.running(after=SOON) for other in others)


def shared_memory(pid: int) -> list[str]:
    """Return the names of the files in memory that a process maps."""
    names = (
        line.split(maxsplit=5)[-1]
        for line in content(Path(f"/proc/{pid}/maps")).decode().splitlines()
    )
    return [name for name in names if name.startswith("/dev/shm/")]


@pytest.mark.parametrize(
    "who", [pytest.param("the launcher", marks=pytest.mark.faults), "what holds the ranks"]
)
def test_a_job_whose_launcher_is_killed_lets_the_run_go(who: str, tmp_path: Path) -> None:
    """The lock is free as soon as the ranks are gone: a resume right after it finds nobody there."""
    trial = make_trial(
        tmp_path, small_config(stop={"last_step": 100}, checkpoint={"every": 1, "keep_last": 3})
    )
    run = trial.new_run("killed")
    with started(2, trial.begin(run), trial.folder) as (job, others):
        when_there_are(5, "ledger.jsonl", 0)(job, run)
        assert (job if who == "the launcher" else others[-1]).kill()
        assert_gone(others)
    assert_nothing_lost(run, 3)
    # the one takes its ranks with it; without the other they could not be ended any more, and end by themselves
    assert who == "the launcher" or max(checkpoints(run)) < trial.last_step
    trial.finish(run)


def test_the_memory_that_ranks_share_is_gone_with_them_however_they_end(tmp_path: Path) -> None:
    """It has no name by which it could stay."""
    trial = make_trial(tmp_path, small_config())
    run = trial.new_run("killed")
    with started(2, trial.begin(run), trial.folder) as (job, others):
        when_there_are(5, "metrics.jsonl", 0)(job, run)
        shared = [shared_memory(rank.pid) for rank in others[:2]]
        assert others[0].kill()
        assert_gone(others)
    for names in shared:
        assert any(name.startswith("/dev/shm/#") for name in names), "they share nothing"
        assert all(name.endswith("(deleted)") for name in names)


def test_a_rank_blocked_in_mpi_ends_with_its_job(tmp_path: Path) -> None:
    with started(2, [], tmp_path, program=["-m", "tests.support.rank_blocked"]) as (
        job,
        (waits, _, holds),
    ):
        until(lambda: "waits" in job.said())
        assert holds.kill()
        assert_gone([waits])


# --- signalled

TO = {"rank 0": [0], "rank 1": [1], "all ranks": [0, 1], "the launcher": [-1]}
LONG = {
    "stop": {"last_step": 300},
    "log": {"every": 1},
    "checkpoint": {"every": 1000, "keep_last": None},
}


def test_a_signal_ends_in_one_checkpoint_and_75(tmp_path: Path) -> None:
    stopped("rank 1", SIGTERM, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGUSR1])
@pytest.mark.parametrize("to", TO)
def test_any_signal_to_any_process_of_a_job_stops_it(
    to: str, number: signal.Signals, tmp_path: Path, figure: Figure
) -> None:
    stopped(to, number, tmp_path)
    figure("jobs stopped by a signal", 1)


def stopped(to: str, number: signal.Signals, folder: Path) -> None:
    trial = make_trial(folder, small_config())
    run = trial.new_run("stopped")
    with started(2, trial.begin(run, "-q"), trial.folder) as (job, others):
        when_there_are(10, "metrics.jsonl", 0)(job, run)
        for place in TO[to]:
            assert (job if place < 0 else others[place]).kill(number)
        assert job.wait(LONGEST) == STOPPED, job.said()
    [(first, _), (step, _)] = acknowledged(run)
    assert (first, [*checkpoints(run)]) == (0, [0, step])
    assert (
        f"stopped at global step {step} (signal {number.name}); continue with: stepctl resume {run}"
        in job.said()
    )
    assert [row["reason"] for row in ledger(run, "end")] == [f"signal {number.name}"]
    trial.finish(run)


def test_a_request_to_save_is_answered_and_training_continues(tmp_path: Path) -> None:
    trial = make_trial(tmp_path, small_config())
    run = trial.new_run("saved")
    with started(2, trial.begin(run), trial.folder) as (job, others):
        for rank in (0, 1):
            when_there_are(10, "metrics.jsonl", 0)(job, run)
            before = len(ledger(run, "checkpoint"))
            assert others[rank].kill(SIGUSR2)
            until(lambda before=before: len(ledger(run, "checkpoint")) > before)
        assert job.wait(LONGEST) == 0, job.said()
    assert len(checkpoints(run)) == 4  # the first, the last, and these
    trial.assert_finished(run)


# --- jobs


@contextlib.contextmanager
def started(
    size: int, arguments: list[object], folder: Path, **options: Any
) -> Iterator[tuple[Process, list[Process]]]:
    """Start `mpiexec -n <size> stepctl *arguments`; yield the launcher, and its ranks with, at -1, what holds them."""
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(
            start_cold(arguments, cwd=folder, before=launcher(size), **options)
        )
        yield job, [stack.enter_context(member) for member in members(job, size)]


def members(job: Process, size: int) -> list[Process]:
    """Return the processes of a job, by rank, and last the one that started them; once they are all there."""
    found: dict[int, int] = {}

    def all_there() -> bool:
        for child in children(job.pid):
            found[size] = child
            for grandchild in children(child):
                match = re.search(
                    r"(?:^|\0)PMI_RANK=(\d+)\0",
                    content(Path(f"/proc/{grandchild}/environ")).decode(),
                )
                found.update({int(match[1]): grandchild} if match else {})
        return len(found) == size + 1

    until(all_there)
    return [member(found[place], job) for place in range(size + 1)]


def children(pid: int) -> list[int]:
    return list(map(int, content(Path(f"/proc/{pid}/task/{pid}/children")).split()))


def member(pid: int, job: Process) -> Process:
    """Return a process that is not this one's child: its exit code is not told."""
    descriptor = os.pidfd_open(pid)

    def wait(timeout: float) -> int | None:
        return 0 if select.select([descriptor], [], [], timeout)[0] else None

    return Process(pid, descriptor, wait, job.output)
