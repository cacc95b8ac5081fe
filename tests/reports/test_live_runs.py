"""Reports on a run that is being trained: pruned, saved and written files are no errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepctl.reports import inspect, verify
from stepctl.rundir.directory import RunDirectory
from stepctl.system.sandbox import Sandbox
from tests.support.runs import make_config, resume, train

KEEP = {"every": 2, "keep_last": 1}


@pytest.fixture
def goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Return what makes a run that goes on for 16 steps before each of the next looks at it, and at each again."""
    path, left = tmp_path / "run", [6]
    train(
        make_config(
            checkpoint=KEEP, log={"every": 3}, evaluate={"every": 5}, stop={"last_step": 10}
        ),
        path,
    )

    def first(function: Callable[..., Any]) -> Callable[..., Any]:
        def look(*arguments: Any, **options: Any) -> Any:
            if left[0] and not busy[0]:
                left[0], busy[0] = left[0] - 1, True
                resume(path, last_step=10 + 16 * (6 - left[0]))
                busy[0] = False
            return function(*arguments, **options)

        return look

    busy = [False]

    def begin() -> Path:
        for owner, name in (
            (RunDirectory, "read_ledger"),
            (RunDirectory, "read_metrics"),
            (Sandbox, "call"),
        ):
            monkeypatch.setattr(owner, name, first(getattr(owner, name)))
        return path

    return begin


@pytest.mark.process
def test_a_run_that_trains_between_any_two_reads_verifies(goes_on: Callable[[], Path]) -> None:
    assert verify.verify(str(goes_on()))[1] == []


@pytest.mark.process
def test_a_file_that_vanishes_without_a_prune_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, call = tmp_path / "run", Sandbox.call
    train(make_config(checkpoint=KEEP, stop={"last_step": 2}), path)

    def remove_first(sandbox: Sandbox, function: Callable[[str], Any], file: str) -> Any:
        os.unlink(file)
        return call(sandbox, function, file)

    monkeypatch.setattr(Sandbox, "call", remove_first)
    assert [problem.code for problem in verify.verify(str(path))[1]] == ["open", "lost"]


@pytest.mark.training
def test_a_checkpoint_verifies_before_the_ledger_acknowledges_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, found = RunDirectory.append_ledger, []

    def look_first(directory: RunDirectory, event: str, **facts: Any) -> None:
        if event == "checkpoint" and facts["step"]:
            found.append(verify.verify(str(directory.path)))
        append(directory, event, **facts)

    monkeypatch.setattr(RunDirectory, "append_ledger", look_first)
    train(make_config(checkpoint=KEEP, stop={"last_step": 4}), tmp_path / "run")
    assert [([good["step"] for good in files], problems) for files, problems in found] == [
        ([0, 2], []),
        ([2, 4], []),
    ]


@pytest.mark.training
def test_the_newest_checkpoint_of_a_running_run_is_never_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, listdir, left = tmp_path / "run", os.listdir, [3]
    train(make_config(checkpoint={**KEEP, "keep_every": 9}, stop={"last_step": 12}), path)

    def list_and_go_on(folder: Any) -> list[str]:
        names = listdir(folder)
        if left[0] and folder == path / "checkpoints":
            monkeypatch.setattr(os, "listdir", listdir)
            left[0] -= 1
            resume(path, last_step=12 + 4 * (3 - left[0]))
            monkeypatch.setattr(os, "listdir", list_and_go_on)
        return names

    monkeypatch.setattr(os, "listdir", list_and_go_on)
    said: list[str] = []
    with inspect.open_path(str(path), said.append) as reader:
        assert (reader.header.global_step, said) == (24, [])
