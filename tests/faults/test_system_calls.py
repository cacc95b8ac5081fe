"""A kill or an error at every system call of a start, a save and an end loses nothing."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from tests.support.call_tracer import Blow, Call
from tests.support.isolated import apart
from tests.support.saving_commands import SCENES, SEGMENT_START, Stage

PARTS = 2
WRITES = {"write", "pwrite64"}
TAKE_ROOM = WRITES | {"open", "mkdir", "rename", "fsync", "fdatasync"}
TRIED_AGAIN = WRITES | {
    "open",
    "read",
    "pread64",
    "fsync",
    "fdatasync",
    "ftruncate",
}  # by Python, after EINTR
HELD = Call(
    "flock", "."
)  # before it, directories are opened by opendir: not tried again, and never interrupted
DIRECTORIES = {".", "checkpoints"}
NEEDED = WRITES | {
    "mkdir",
    "rename",
    "fsync",
    "fdatasync",
}  # a save that goes on after one of these failed is a lie
CHANGING = NEEDED | {"open", "unlink", "ftruncate"}
DISK_ERRORS = (
    "saves on the grid and at the end, with pruning",
    "the first save of a fresh run, and all after it",
    "saves that may fail",
    "rows of series",
    "the first rows of series",
    "a damaged file in the way",
)
KILLED = [
    scene for scene in SCENES if scene != "saves that may fail"
]  # to a kill it is the first one
A_FEW = {  # scene -> one of so many attacks
    "saves on the grid and at the end, with pruning": 60,
    "rows of series": 120,
}
Figure = Callable[[str, int], None]
Attack = Callable[[Stage, slice], tuple[int, list[str]]]


def calls(stage: Stage, since: Call | None = None) -> list[Call]:
    """Return the calls to strike from `since` on; in a variation those that change something: all others leave on disk
    what the one before them left, as the first scenes prove.
    """
    found = stage.calls[stage.calls.index(since) if since else 0 :]
    return [call for call in found if call.name in CHANGING or not stage.scene.variation]


def kills(stage: Stage) -> Iterator[tuple[Call, Blow]]:
    """Yield a kill before every call, and one in the middle of every write."""
    for call in calls(stage):
        yield call, Blow(kill=True)
        if call.name in WRITES:
            yield call, Blow(kill=True, half=True)


def errors(stage: Stage) -> Iterator[tuple[Call, Blow]]:
    """Yield every error that a disk can give, at every call from the first line in the ledger on; EINTR apart."""
    for call in calls(stage, SEGMENT_START):
        for number in (
            (errno.EIO, errno.ENOSPC, errno.EDQUOT) if call.name in TAKE_ROOM else (errno.EIO,)
        ):
            yield call, Blow(error=number)


def harmless(stage: Stage) -> Iterator[tuple[Call, Blow]]:
    """Yield an interrupted call wherever there can be one, and half a write at every write."""
    since = stage.calls.index(HELD) if HELD in stage.calls else 0
    for position, call in enumerate(stage.calls):
        by_opendir = call.name == "open" and call.file in DIRECTORIES and position < since
        if call.name in TRIED_AGAIN and not by_opendir:
            yield call, Blow(error=errno.EINTR)
        if call.name in WRITES:
            yield call, Blow(half=True)


def kill_all(stage: Stage, part: slice) -> tuple[int, list[str]]:
    """Kill at each call; return how many were killed, and what was wrong."""
    wrong, attacks = list[str](), list(kills(stage))[part]
    for call, blow in attacks:
        code = struck(stage, (call, blow))
        assert code == -signal.SIGKILL, f"{call}: exit code {code}"
        wrong += [
            f"killed at {call}: {fault}" for fault in (*stage.faults(), *stage.faults_of_going_on())
        ]
    return len(attacks), wrong


def fail_all(stage: Stage, part: slice) -> tuple[int, list[str]]:
    """Let each call fail in each way; return how many did, and what was wrong."""
    wrong, attacks = list[str](), list(errors(stage))[part]
    for call, blow in attacks:
        code = struck(stage, (call, blow))
        must_fail = call.name in NEEDED or call in _opened_for_fsync(stage.calls)
        found = stage.faults_of_an_error(code, must_fail=must_fail)
        wrong += [f"{errno.errorcode[blow.error]} at {call}: {fault}" for fault in found]
    return len(attacks), wrong


def fill_up_all(stage: Stage, part: slice) -> tuple[int, list[str]]:
    """Let each write write half, and the next one find the disk full; return how many did, and what was wrong."""
    wrong, attacks = (
        list[str](),
        [call for call in stage.calls if call.name in WRITES and call.file != "lock"][part],
    )
    for call in attacks:
        rest = call._replace(nth=call.nth + 1)
        code = struck(stage, (call, Blow(half=True)), (rest, Blow(error=errno.ENOSPC)))
        wrong += [
            f"a full disk in {call}: {fault}"
            for fault in stage.faults_of_an_error(code, must_fail=True)
        ]
    return len(attacks), wrong


def disturb_all(stage: Stage, part: slice) -> tuple[int, list[str]]:
    """Interrupt each call and cut each write short; return how many, and what was wrong: it must not matter."""
    wrong, attacks = list[str](), list(harmless(stage))[part]
    for call, blow in attacks:
        code = struck(stage, (call, blow))
        if code:
            wrong.append(f"{blow} at {call}: exit code {code}, {stage.said}")
        wrong += [
            f"{blow} at {call}: {fault}"
            for fault in stage.unbroken.end_faults(stage.run, stage.excused)
        ]
    return len(attacks), wrong


def struck(stage: Stage, *blows: tuple[Call, Blow]) -> int:
    """Play until every blow has fallen: two threads write, so a rare call need not come each time. Its exit code."""
    for _ in range(3):
        code, trace = stage.play(*blows)
        if trace.struck >= {call for call, _ in blows}:
            return code
    raise AssertionError(f"{blows}: did not come")


def _opened_for_fsync(calls: list[Call]) -> set[Call]:
    by_file = sorted(enumerate(calls), key=lambda item: (item[1].file, item[0]))
    pairs = pairwise(call for _, call in by_file)
    return {call for call, following in pairs if (call.name, following.name) == ("open", "fsync")}


def strike(attack: Attack, scene: str, folder: Path, part: slice) -> tuple[int, list[str]]:
    return attack(Stage(SCENES[scene], folder), part)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("scene", KILLED)
def test_a_kill_at_any_system_call_loses_nothing(
    scene: str, part: int, tmp_path: Path, figure: Figure
) -> None:
    count, wrong = apart(strike, kill_all, scene, tmp_path, slice(part, None, PARTS))
    figure("kills at a system call", count)
    assert wrong == []


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("scene", DISK_ERRORS)
def test_an_error_at_any_system_call_is_reported_and_loses_nothing(
    scene: str, part: int, tmp_path: Path, figure: Figure
) -> None:
    count, wrong = apart(strike, fail_all, scene, tmp_path, slice(part, None, PARTS))
    figure("errors at a system call", count)
    assert wrong == []


@pytest.mark.faults
@pytest.mark.parametrize("scene", SCENES)
def test_a_disk_that_is_full_in_the_middle_of_a_write_loses_nothing(
    scene: str, tmp_path: Path, figure: Figure
) -> None:
    count, wrong = apart(strike, fill_up_all, scene, tmp_path, slice(None))
    figure("writes that filled the disk half-way", count)
    assert wrong == []


@pytest.mark.faults
@pytest.mark.parametrize("scene", [scene for scene in DISK_ERRORS if scene in KILLED])
def test_interrupted_calls_and_short_writes_do_not_matter(
    scene: str, tmp_path: Path, figure: Figure
) -> None:
    count, wrong = apart(strike, disturb_all, scene, tmp_path, slice(None))
    figure("interrupted calls and short writes", count)
    assert wrong == []


@pytest.mark.parametrize("attack", [kill_all, fail_all, fill_up_all, disturb_all])
@pytest.mark.parametrize("scene", A_FEW)
def test_a_few_faults_at_system_calls_lose_nothing(
    scene: str, attack: Attack, tmp_path: Path, figure: Figure
) -> None:
    count, wrong = apart(strike, attack, scene, tmp_path, slice(3, None, A_FEW[scene]))
    figure("faults at system calls, in passing", count)
    assert wrong == []


def calls_of_a_save(folder: Path) -> list[str]:
    """Return the calls that change something, in their order, of a command that saves once."""
    stage = Stage(SCENES["the save of a stop by signal"], folder)
    changing = [call for call in stage.calls if call.name in NEEDED | {"unlink"}]
    first = next(i for i, call in enumerate(changing) if "step-00000005" in call.file)
    return [f"{call.name} {call.file}" for call in changing[first:] if call.file != "metrics.jsonl"]


def test_a_checkpoint_is_durable_before_it_is_acknowledged_and_pruning_follows(
    tmp_path: Path,
) -> None:
    temporary, name = "checkpoints/.step-00000005.h5.tmp-PID", "checkpoints/step-00000005.h5"
    assert [call for call, _ in groupby(apart(calls_of_a_save, tmp_path))] == [
        f"write {temporary}",
        f"fsync {temporary}",
        f"rename {temporary} -> {name}",
        "fsync checkpoints",
        "write ledger.jsonl",
        "fsync ledger.jsonl",
        "unlink checkpoints/step-00000003.h5",
        "write ledger.jsonl",
        "fsync ledger.jsonl",
    ]
