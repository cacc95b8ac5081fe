"""`stepctl prune` beside other processes and under SIGKILL: it removes what it announced, never the newest."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stepctl.reports.verify import verify
from tests.support.attack_moments import after
from tests.support.file_systems import mount_memory, own_mounts
from tests.support.isolated import apart
from tests.support.paused_runs import Gated, at_the_gate, make_gated
from tests.support.processes import Process, hold, start, until
from tests.support.run_checks import assert_nothing_lost, checkpoints, ledger

Figure = Callable[[str, int], None]
DONE, IN_USE = 0, 4
PAGE = 4096
START_UP = 0.04  # seconds, or so, from the first line of a prune to its last


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """A run with a checkpoint at every other step, of which a prune leaves one; none at the gate's own."""
    every = {"every": 2, "keep_last": None}
    return make_gated(
        tmp_path_factory.mktemp("prunes") / "gated", random.Random(1), checkpoint=every
    )


def prune(run: Path) -> list[object]:
    return ["prune", run, "--keep-last", 1]


def test_a_run_that_is_trained_is_not_pruned(gated: Gated, tmp_path: Path) -> None:
    run = gated.copy_of_killed(tmp_path.name)
    with gated.start(["resume", run], run) as holder:
        until(lambda: (at_the_gate(run) and len(ledger(run, "start")) == 2) or not holder.running())
        before = checkpoints(run)
        with start(prune(run), cwd=gated.trial.folder) as child:
            assert child.wait() == IN_USE, child.said()
            assert f": in use by process {holder.pid} on " in child.said()
        assert set(before) <= set(checkpoints(run))
        gated.open(run)
        assert holder.wait() == DONE, holder.said()
    gated.trial.assert_finished(run)


def test_a_prune_after_a_torn_line_is_recorded(gated: Gated, tmp_path: Path) -> None:
    run = gated.copy_of_killed(tmp_path.name)
    with open(run / "ledger.jsonl", "a") as file:
        file.write('{"event": "checkpoint", "st')
    with start(prune(run), cwd=gated.trial.folder) as child:
        assert child.wait() == DONE, child.said()
    assert len(checkpoints(run)) == 1
    assert_nothing_lost(run, keep_last=1)
    gated.trial.finish(run)


def prune_full_disk(made: Path, folder: Path, torn: str) -> tuple[int, str, list[int], list[str]]:
    """Copy a run to a disk that it fills to the last byte; return what a prune there ended with, said and left."""
    own_mounts()
    mount_memory(folder / "disk", 1 << 20)
    run = folder / "disk" / "run"
    shutil.copytree(made, run)
    with open(run / "ledger.jsonl", "a") as file:
        file.write("\n" * (-(file.tell() + len(torn)) % PAGE) + torn)  # up to the end of its page
    os.truncate(run / "lock", 0)
    with contextlib.suppress(OSError), open(folder / "disk" / "filler", "wb") as filler:
        while True:
            filler.write(bytes(PAGE))
            filler.flush()
    with start(prune(run), cwd=folder) as child:
        code, said = child.wait(), child.said()
    return code, said, list(checkpoints(run)), [problem.message for problem in verify(str(run))[1]]


@pytest.mark.parametrize("torn", ["", '{"event": "checkpoint", "st'])
def test_a_prune_makes_room_on_a_full_disk(torn: str, gated: Gated, tmp_path: Path) -> None:
    run = gated.copy_of_killed(tmp_path.name)
    newest = max(checkpoints(run))
    code, said, left, problems = apart(prune_full_disk, run, tmp_path, torn)
    assert (code, left, problems) == (DONE, [newest], []), said


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_prune_and_a_resume_at_once_lose_nothing(
    seed: int, gated: Gated, tmp_path: Path, figure: Figure
) -> None:
    chance = random.Random(seed)
    for number in range(10):
        run = gated.copy_of_killed(f"{tmp_path.name}-{number}")
        commands = [prune(run), ["resume", run], prune(run)]
        with contextlib.ExitStack() as stack:
            racers = [
                stack.enter_context(hold(command, cwd=gated.trial.folder)) for command in commands
            ]
            order = chance.sample(racers, len(racers))
            for racer in order:
                racer.release()
                racer.running(after=chance.choice((0, 0.05)) * chance.random())
            codes = [racer.wait() for racer in racers]
        assert set(codes) <= {DONE, IN_USE}, [racer.said() for racer in racers]
        assert DONE in codes
        assert_nothing_lost(run, keep_last=1)
        gated.trial.finish(run)
    figure("races", 10)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 3))
def test_a_killed_prune_has_announced_what_it_removed(
    seed: int, gated: Gated, tmp_path: Path, figure: Figure
) -> None:
    chance, killed = random.Random(seed), 0
    for number in range(20):
        run = gated.copy_of_killed(f"{tmp_path.name}-{number}")
        with start(prune(run), cwd=gated.trial.folder) as child:
            some_moment(chance)(child, run)
            child.kill()
            killed += child.wait() == -9
        assert_nothing_lost(run, keep_last=1)
        gated.trial.finish(run)
    figure("kills", killed)


def some_moment(chance: random.Random) -> Callable[[Process, Path], object]:
    if chance.random() < 0.5:
        return after(chance.uniform(0, START_UP))
    n_left = chance.randint(1, 5)
    return lambda child, run: until(
        lambda: len(checkpoints(run)) <= n_left or not child.running(), every=0
    )
