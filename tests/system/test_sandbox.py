"""Calls in the sandbox return a result or one clear error, whatever happens to the child."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.checkpoint import names
from stepctl.errors import CheckpointError, StepctlError
from stepctl.system import sandbox
from stepctl.system.sandbox import Sandbox
from tests.support.runs import make_config, resume, train

pytestmark = pytest.mark.process


# --- what a hostile file might do, done by a function


def echo(path: str, *arguments: Any) -> list[Any]:
    print("noise")
    return [path, *arguments, os.environ.get("HDF5_PLUGIN_PRELOAD")]


def crash(path: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(path: str) -> None:
    os._exit(3)


def hang(path: str) -> None:
    while True:
        time.sleep(1)


def swell(path: str) -> int:
    return int(np.ones(1 << 30, np.uint8).sum())


def refuse(path: str) -> None:
    raise CheckpointError("odd", "an odd file")


def fail(path: str) -> None:
    raise StepctlError("a plain failure")


def surprise(path: str) -> None:
    raise KeyError("what?")


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    )
    with Sandbox() as box:
        yield box


def code_of(box: Sandbox, function: Callable[[str], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        box.call(function, "some/file.h5")
    assert "\n" not in str(caught.value)
    return caught.value.code


def test_a_call_is_answered_without_plugins(box: Sandbox) -> None:
    assert box.call(echo, "a", 1, ["x"]) == ["a", 1, ["x"], "::"]
    assert box.call(echo, "b") == ["b", "::"]


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (crash, "crash"),
        (leave, "crash"),
        (swell, "memory"),
        (refuse, "odd"),
        (surprise, "unexpected"),
    ],
)
def test_any_failure_of_the_child_costs_one_call(
    function: Callable[[str], object], code: str, box: Sandbox
) -> None:
    assert code_of(box, function) == code
    assert box.call(echo, "after") == ["after", "::"]


def test_a_call_that_hangs_times_out(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    assert box.call(echo, "a") == ["a", "::"]
    child = box._child
    assert child is not None
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    assert code_of(box, hang) == "timeout"
    assert child.poll() is not None, "it has ended"
    monkeypatch.undo()


def test_a_failed_operation_is_reported_with_its_error(box: Sandbox) -> None:
    with pytest.raises(StepctlError, match=r"^a plain failure$"):
        box.call(fail, "a")


def test_the_child_ends_with_the_sandbox() -> None:
    with Sandbox() as box:
        box.call(names.step_of, "step-00000003.h5")
        child = box._child
    assert child is not None
    assert child.poll() is not None


# --- a resume beside a file that it did not write


def test_a_file_that_the_ledger_does_not_know_is_first_opened_in_a_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(stop={"last_step": 4}), tmp_path / "run")
    train(make_config(stop={"last_step": 9}), tmp_path / "other")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000009.h5").write_bytes(
        (tmp_path / "other" / "checkpoints" / "step-00000009.h5").read_bytes()
    )
    asked: list[str] = []

    def call(self: Sandbox, function: Callable[[str], object], path: str) -> None:
        asked.append(Path(path).name)
        raise CheckpointError(
            "crash", f"{Path(path).name}: reading it crashed the reader process (SIGSEGV)"
        )

    monkeypatch.setattr(Sandbox, "call", call)
    said: list[str] = []
    state = resume(tmp_path / "run", last_step=6, say=said.append)
    assert state.counters.global_step == 6
    assert asked == ["step-00000009.h5"], "its own are opened as they are"
    assert said == [
        "step-00000009.h5: reading it crashed the reader process (SIGSEGV); using step-00000004.h5"
    ]
