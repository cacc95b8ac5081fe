"""`stepctl.loop`: the loop of a script is saved, and continued with the same bits and rows."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.errors import CheckpointError, ConfigError, RunInUseError, StepctlError
from stepctl.runs.loop import Loop
from tests.support.loops import advance, new_state, rows, saved, walk
from tests.support.messages import normalize, without_paths
from tests.support.program_states import same_values
from tests.support.run_files import events
from tests.support.runs import make_config, train

LINES = r"(?<=\.py:)\d+"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[], str]:
    """Return a function that returns what was written to stderr since the last call, without rows and notes."""

    def read() -> str:
        lines = capsys.readouterr().err.splitlines(keepends=True)
        left_out = ("steps/s", "note: step ")  # a note depends on the time that a save takes
        text = "".join(line for line in lines if not any(words in line for words in left_out))
        return normalize(text, (LINES,), HERE=tmp_path) if text else ""

    return read


class Failed(Exception):
    """The error of a step."""


def leaving_at(last: int, leave: Callable[[], None]) -> Any:
    """A body that calls `leave` in the midst of a step."""

    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        if step == last:
            state["x"] += 1  # half of a step
            leave()
        advance(run, state, step)

    return body


def fail() -> None:
    raise Failed("halfway")


def send(number: int) -> Any:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        if step == 4:
            signal.raise_signal(number)
        advance(run, state, step)

    return body


# --- starting, stopping and continuing


@pytest.mark.training
@pytest.mark.parametrize("stop", range(11))
def test_a_loop_that_ended_at_any_step_continues_with_the_same_bits_and_rows(
    stop: int, tmp_path: Path
) -> None:
    expected = walk(tmp_path / "whole", log_every=3)
    walk(tmp_path / "run", stop, log_every=3)
    assert same_values(walk(tmp_path / "run", log_every=3), expected)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.training
@pytest.mark.parametrize("stop", range(10))
def test_a_loop_that_failed_within_any_step_continues_with_the_same_bits_and_rows(
    stop: int, tmp_path: Path
) -> None:
    expected = walk(tmp_path / "whole")
    with pytest.raises(Failed):
        walk(tmp_path / "run", body=leaving_at(stop, fail), checkpoint_every=3)
    assert saved(tmp_path / "run")[-1] == stop // 3 * 3
    assert same_values(walk(tmp_path / "run", checkpoint_every=3), expected)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_the_body_gets_the_number_of_completed_steps(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        steps.append((step, run.global_step))
        state["accepted"] += 1

    walk(tmp_path / "run", 2, body=body)
    walk(tmp_path / "run", 4, body=body)
    assert steps == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_a_finished_loop_makes_no_step_and_restores_its_state(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    expected = walk(tmp_path / "run", 4)
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    said()
    for last_step in (4, 2):
        assert same_values(walk(tmp_path / "run", last_step, body=unexpected), expected)
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before
    assert said() == snapshot


def unexpected(run: Loop, state: dict[str, Any], step: int) -> None:
    pytest.fail("a step was made")


def test_a_higher_last_step_continues(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    walk(tmp_path / "run", 4)
    walk(tmp_path / "run", 6)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert said() == snapshot


def test_the_cadences_and_the_retention_may_change(tmp_path: Path) -> None:
    walk(tmp_path / "run", 4, checkpoint_every=2, log_every=1, keep_last=None)
    assert saved(tmp_path / "run") == [0, 2, 4]
    walk(tmp_path / "run", 9, checkpoint_every=3, log_every=2, keep_last=2)
    assert saved(tmp_path / "run") == [6, 9]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 6, 8, 9]


def test_without_a_cadence_there_is_a_checkpoint_at_the_start_and_at_the_end(
    tmp_path: Path,
) -> None:
    walk(tmp_path / "run", 500, checkpoint_every=None, keep_last=None, log_every=100)
    assert saved(tmp_path / "run") == [0, 500]


def test_the_seed_is_locked(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    walk(tmp_path / "run", 2, seed=1)
    with pytest.raises(ConfigError) as caught:
        walk(tmp_path / "run", 4, seed=2)
    assert str(caught.value) == snapshot
    walk(tmp_path / "run", 4, seed=1)


def test_run_stop_ends_the_loop_after_its_step_where_nothing_else_is_due(tmp_path: Path) -> None:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        state["accepted"] += 1
        if step == 4:
            run.stop("converged")

    walk(tmp_path / "run", 1000, body=body, checkpoint_every=None, log_every=1000)
    assert saved(tmp_path / "run") == [0, 5]


def test_the_run_stays_finished_after_run_stop(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        advance(run, state, step)
        if step == 4:
            run.stop("converged é")
            state["accepted"] += 100  # still of this step

    expected = walk(tmp_path / "run", body=body)
    assert expected["accepted"] >= 100
    assert saved(tmp_path / "run")[-1] == 5
    assert same_values(walk(tmp_path / "run", body=unexpected), expected)
    assert same_values(walk(tmp_path / "run", 20, body=unexpected), expected)
    assert events(tmp_path / "run", "end")[-1]["done"]
    assert said() == snapshot


@pytest.mark.parametrize("reason", ["", None, 3, "\0", "x" * 1000, "é" * 200])
def test_the_reason_of_a_stop_is_text_of_any_length(reason: Any, tmp_path: Path) -> None:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        state["accepted"] += 1
        run.stop(reason)

    if isinstance(reason, str) and len(reason) > 1:
        walk(tmp_path / "run", body=body)
        walk(tmp_path / "run", body=unexpected)
    else:
        with pytest.raises(ConfigError, match="give the reason as text"):
            walk(tmp_path / "run", body=body)


def test_a_break_leaves_the_step_uncompleted(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    state = new_state()
    with stepctl.loop(tmp_path / "run", state, last_step=10, checkpoint_every=3) as run:
        for step in run:
            advance(run, state, step)
            if step == 4:
                break
    assert saved(tmp_path / "run") == [0, 3]
    assert said() == snapshot
    assert same_values(walk(tmp_path / "run"), walk(tmp_path / "whole"))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_stop_file_ends_the_loop(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    walk(tmp_path / "run", 2)
    (tmp_path / "run" / "STOP").touch()
    walk(tmp_path / "run", 4, body=unexpected)
    (tmp_path / "run" / "STOP").unlink()
    walk(tmp_path / "run", 4)
    assert said() == snapshot


# --- the state


def test_the_state_is_restored_into_the_same_objects(tmp_path: Path) -> None:
    walk(tmp_path / "run", 4)
    state = new_state()
    parts = ["x", "columns", "norms", "seen", "rng", "emulator"]
    before = {key: state[key] for key in parts}
    bit_generator = state["rng"].bit_generator
    chain = state["chain"]
    with stepctl.loop(tmp_path / "run", state, last_step=4) as run:
        assert run.global_step == 4
        assert all(state[key] is before[key] for key in parts)
        assert state["rng"].bit_generator is bit_generator
        assert state["chain"] is not chain  # of another shape
        assert state["chain"].shape == (4, 3)
        assert state["columns"].flags.f_contiguous


def test_an_array_that_was_bound_before_the_loop_follows(tmp_path: Path) -> None:
    def run_to(last_step: int) -> list[float]:
        x = np.zeros(2)
        with stepctl.loop(tmp_path / "run", {"x": x}, last_step=last_step) as run:
            for _ in run:
                x += run.rng("x").random(2)
        return list(x)

    run_to(3)
    continued = run_to(6)
    (tmp_path / "run").rename(tmp_path / "other")
    assert run_to(6) == continued


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_another_top_level_key_is_named(
    change: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    walk(tmp_path / "run", 2)
    state = new_state()
    if change == "missing":
        del state["accepted"]
    else:
        state["more"] = 1
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(StepctlError) as caught:
        walk(tmp_path / "run", 4, state=state)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    walk(tmp_path / "run", 4)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, np.zeros(4)[::2], np.array(["a"]), {"a/b": 1}, {3: 1}, object(), np.longdouble(1)],
    ids=["set", "strides", "text", "slash", "int_key", "object", "longdouble"],
)
def test_a_state_that_cannot_be_saved_leaves_no_directory(
    value: Any, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ConfigError) as caught:
        walk(tmp_path / "run", state={"value": value})
    assert str(caught.value) == snapshot
    assert not (tmp_path / "run").exists()


def test_a_state_that_cannot_be_saved_any_more_is_named(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        state["accepted"] = step
        if step >= 4:
            state["accepted"] = {step}  # type: ignore[assignment]

    with pytest.raises(ConfigError) as caught:
        walk(tmp_path / "run", body=body, checkpoint_every=2)
    assert str(caught.value) == snapshot
    assert said() == snapshot
    assert saved(tmp_path / "run") == [0, 2, 4]


def test_a_stream_in_the_state_is_refused_with_the_reason(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        state["rng"] = run.rng("x")

    with pytest.raises(ConfigError) as caught:
        walk(tmp_path / "run", 1, body=body)
    assert str(caught.value) == snapshot


# --- random streams and metrics


def test_a_generator_kept_from_an_earlier_step_restarts_with_the_step(tmp_path: Path) -> None:
    def run_to(path: Path, last_step: int) -> list[float]:
        state: dict[str, Any] = {"drawn": np.zeros(8)}
        with stepctl.loop(path, state, last_step=last_step) as run:
            kept = None
            for step in run:
                if kept is None:
                    kept = run.rng("x")
                run.rng("y").random()
                state["drawn"][step] = kept.random()
        return list(state["drawn"])

    expected = run_to(tmp_path / "whole", 8)
    for last_step in (1, 4, 8):
        drawn = run_to(tmp_path / "run", last_step)
    assert drawn == expected
    assert len({*drawn}) == 8


def test_rng_is_refused_outside_of_a_step_and_as_a_generator(tmp_path: Path) -> None:
    state = new_state()
    with stepctl.loop(tmp_path / "run", state, last_step=1) as run:
        rng = run.rng
        with pytest.raises(StepctlError, match=r"rng\('x'\) is called outside of steps"):
            rng("x")
        for _ in run:
            rng("x").random()
            with pytest.raises(AttributeError, match=r'rng\("a name"\)\.normal\('):
                rng.normal(3)
            state["accepted"] += 1
        with pytest.raises(StepctlError, match="outside of steps"):
            rng("x")
        assert repr(rng) == "Streams(steps, seed 0; x)"


@pytest.mark.parametrize(
    "log",
    [
        lambda run: run.log(a=1, step=2),
        lambda run: (run.log(a=1), run.log({"a": 2})),
        lambda run: run.log({"a": 1}, a=2),
        lambda run: run.log("a"),
        lambda run: run.log(a="1"),
        lambda run: run.log(a=np.zeros(2)),
        lambda run: run.log({1: 1.0}),
        lambda run: run.log(a=1j),
    ],
    ids=["row_key", "twice", "both", "text", "value", "array", "name", "complex"],
)
def test_wrong_metrics_are_refused_where_they_are_logged(
    log: Callable[[Loop], object], tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ConfigError) as caught:
        walk(tmp_path / "run", body=lambda run, state, step: log(run) and None)
    assert str(caught.value) == snapshot
    assert any(entry.name == "<lambda>" for entry in caught.traceback)


def test_metrics_of_a_step_are_merged(tmp_path: Path) -> None:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        state["accepted"] += 1
        run.log({"a": np.float32(0.5)}, b=1)
        run.log(c=np.float64(0.25), metrics=True)
        run.log({})
        run.log()

    walk(tmp_path / "run", 1, body=body)
    expected = {"step": 1, "kind": "train", "a": 0.5, "b": 1, "c": 0.25, "metrics": 1}
    assert rows(tmp_path / "run") == [expected]
    assert all(type(value) in (int, float, str) for value in expected.values())


def logging_at(steps: Callable[[int], bool]) -> Any:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        state["accepted"] += 1
        if steps(step + 1):
            run.log(a=1.0)

    return body


def test_metrics_that_no_row_has_give_one_early_warning(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    heard = ""

    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        nonlocal heard
        logging_at(lambda number: number % 5 == 2)(run, state, step)
        heard += said()
        if step == 60:
            assert "warning" in heard

    walk(tmp_path / "run", 100, body=body, log_every=5)
    assert heard == snapshot
    assert "warning" not in said()


@pytest.mark.parametrize("last_step", [5, 40])
def test_metrics_that_no_row_had_are_reported_at_the_end(
    last_step: int, tmp_path: Path, said: Callable[[], str]
) -> None:
    walk(tmp_path / "run", last_step, body=logging_at(lambda step: step == 3), log_every=100)
    assert ("warning" in said()) == (last_step > 3)


def test_metrics_that_rows_have_give_no_warning(tmp_path: Path, said: Callable[[], str]) -> None:
    walk(tmp_path / "a", 100, body=logging_at(lambda step: step % 7 == 0), log_every=10)
    walk(tmp_path / "b", 30, body=logging_at(lambda step: False), log_every=10)
    for last_step in range(101, 110):  # segments without a row of the grid
        walk(tmp_path / "a", last_step, body=logging_at(lambda step: True), log_every=10)
    assert "warning" not in said()


# --- saves, errors and signals


def test_run_save_publishes_the_step_or_what_stands_outside_of_one(tmp_path: Path) -> None:
    state = new_state()
    with stepctl.loop(
        tmp_path / "run", state, last_step=5, checkpoint_every=None, keep_last=None
    ) as run:
        run.save()
        assert saved(tmp_path / "run") == [0]
        for step in run:
            if step == 2:
                run.save()
                assert saved(tmp_path / "run") == [0]
            if step == 3:
                assert saved(tmp_path / "run") == [0, 3]
            advance(run, state, step)
        run.save()
    assert saved(tmp_path / "run") == [0, 3, 5]


@pytest.mark.parametrize("step", [0, 4])
def test_an_error_in_a_step_saves_nothing_and_names_the_newest_checkpoint(
    step: int, tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(Failed) as caught:
        walk(tmp_path / "run", body=leaving_at(step, fail), checkpoint_every=2)
    assert caught.value.args == ("halfway",)
    assert saved(tmp_path / "run") == [*range(0, step + 1, 2)]
    assert said() == snapshot
    assert events(tmp_path / "run", "end")[-1]["reason"].startswith("TornUpdate")


@pytest.mark.parametrize("code", [3, None])
def test_sys_exit_in_a_step_ends_the_script_with_its_code(
    code: int | None, tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(SystemExit) as caught:
        walk(tmp_path / "run", body=leaving_at(4, lambda: sys.exit(code)))
    assert caught.value.code == code
    assert saved(tmp_path / "run") == [0]
    assert said() == snapshot


def test_an_error_between_the_steps_saves_the_complete_state(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    class Failing(stepctl.Hook):
        name = "failing"

        def after_step(self, state: Any, metrics: Any) -> None:
            if state.counters.global_step == 5:
                raise Failed("in a hook")

    with pytest.raises(Failed):
        walk(tmp_path / "run", hooks=[Failing()])
    assert saved(tmp_path / "run") == [0, 5]
    assert said() == snapshot
    assert same_values(walk(tmp_path / "run"), walk(tmp_path / "whole"))


def test_an_error_before_or_after_the_loop_is_the_scripts_own(tmp_path: Path) -> None:
    state = new_state()

    def script(n_loops: int) -> None:
        with stepctl.loop(tmp_path / "run", state, last_step=5) as run:
            for _ in range(n_loops):
                for step in run:
                    advance(run, state, step)
            fail()

    with pytest.raises(Failed):
        script(0)
    assert saved(tmp_path / "run") == [0]
    with pytest.raises(Failed):
        script(1)
    assert saved(tmp_path / "run") == [0, 5]
    assert events(tmp_path / "run", "end")[-1]["done"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_a_stop_signal_ends_the_loop_after_the_step_and_a_checkpoint(
    number: signal.Signals, tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    handlers = [signal.getsignal(number), signal.getsignal(signal.SIGINT)]
    with pytest.raises(SystemExit) as caught:
        walk(tmp_path / "run", body=send(number))
    assert caught.value.code == 75
    assert saved(tmp_path / "run") == [0, 5]
    assert [signal.getsignal(number), signal.getsignal(signal.SIGINT)] == handlers
    assert said() == snapshot
    assert same_values(walk(tmp_path / "run"), walk(tmp_path / "whole"))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_ctrl_c_ends_the_loop_after_the_step_and_a_checkpoint(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path / "run", body=send(signal.SIGINT))
    assert saved(tmp_path / "run") == [0, 5]
    assert said() == snapshot
    assert same_values(walk(tmp_path / "run"), walk(tmp_path / "whole"))


def test_a_second_ctrl_c_stops_within_the_step(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path / "run", body=leaving_at(4, interrupt), checkpoint_every=3)
    assert saved(tmp_path / "run") == [0, 3]
    assert said() == snapshot
    assert same_values(walk(tmp_path / "run"), walk(tmp_path / "whole"))


def test_a_second_ctrl_c_between_the_steps_stops_at_once(
    tmp_path: Path, said: Callable[[], str], snapshot: SnapshotAssertion
) -> None:
    class Interrupting(stepctl.Hook):
        name = "interrupting"

        def after_step(self, state: Any, metrics: Any) -> None:
            if state.counters.global_step == 5:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path / "run", hooks=[Interrupting()], checkpoint_every=None)
    assert saved(tmp_path / "run") == [0]
    assert said() == snapshot
    assert events(tmp_path / "run", "end")[-1]["reason"] == "a second SIGINT"
    assert same_values(walk(tmp_path / "run"), walk(tmp_path / "whole"))


def test_a_signal_in_the_last_step_ends_the_script(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        walk(tmp_path / "run", 5, body=send(signal.SIGTERM))
    assert caught.value.code == 75  # the code after the loop did not run: run the script again
    assert events(tmp_path / "run", "end")[-1]["done"]
    walk(tmp_path / "run", 5, body=unexpected)


def test_a_signal_after_the_loop_is_the_scripts_own(tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        state = new_state()
        with stepctl.loop(tmp_path / "run", state, last_step=2) as run:
            for step in run:
                advance(run, state, step)
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stop_signal_ends_the_loop_after_its_step_where_nothing_else_is_due(
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit):
        walk(
            tmp_path / "run", 1000, body=send(signal.SIGTERM), checkpoint_every=None, log_every=1000
        )
    assert saved(tmp_path / "run") == [0, 5]


def test_sigusr2_saves_and_continues(tmp_path: Path) -> None:
    walk(
        tmp_path / "run",
        body=send(signal.SIGUSR2),
        checkpoint_every=None,
        keep_last=None,
        log_every=1000,
    )
    assert saved(tmp_path / "run") == [0, 5, 10]


# --- misuse


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_every": 0},
        {"log_every": "x"},
        {"log_every": None},
        {"last_step": -1},
        {"last_step": 10.0},
        {"last_step": 1 << 62},
        {"keep_last": 0},
        {"seed": -1},
        {"seed": True},
        {"seed": None},
        {"hooks": stepctl.Hook},
        {"hooks": [1]},
        {"state": [1]},
        {"run_dir": 3},
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(
    arguments: dict[str, Any], tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    given = {"run_dir": tmp_path / "run", "state": new_state(), "last_step": 5} | arguments
    with pytest.raises(ConfigError) as caught, stepctl.loop(**given):
        pass
    assert str(caught.value) == snapshot
    assert not (tmp_path / "run").exists()


def test_numpy_integers_are_whole_numbers(tmp_path: Path) -> None:
    walk(
        tmp_path / "run",
        np.int64(4),  # type: ignore[arg-type]
        seed=np.uint8(1),
        log_every=np.int32(2),
        checkpoint_every=np.int64(3),
        keep_last=np.int8(1),
    )
    assert saved(tmp_path / "run") == [4]


def test_a_loop_needs_its_with_statement(tmp_path: Path) -> None:
    run = stepctl.loop(tmp_path / "run", new_state(), last_step=2)
    for use in (lambda: list(run), lambda: run.global_step, lambda: run.save(), lambda: run.rng):
        with pytest.raises(StepctlError, match=r"with stepctl.loop\(...\) as run"):
            use()
    assert not (tmp_path / "run").exists()
    assert repr(run) == f"Loop({str(tmp_path / 'run')!r})"


def test_methods_of_a_step_are_refused_outside_of_one(tmp_path: Path) -> None:
    with stepctl.loop(tmp_path / "run", new_state(), last_step=2) as run:
        for use in (lambda: run.log(a=1), lambda: run.stop("x")):
            with pytest.raises(StepctlError, match="outside of a step"):
                use()
        assert run.path == tmp_path / "run"
        assert repr(run) == f"Loop({str(run.path)!r}, global step 0 of 2)"


@pytest.mark.parametrize("nested", [True, False])
def test_a_second_for_within_or_after_a_step_is_refused(nested: bool, tmp_path: Path) -> None:
    def script() -> None:
        state = new_state()
        with stepctl.loop(tmp_path / "run", state, last_step=5) as run:
            for step in run:
                advance(run, state, step)
                if nested:
                    list(run)
                break
            list(run)

    with pytest.raises(StepctlError, match="a loop has one `for` statement"):
        script()
    assert saved(tmp_path / "run") == [0]
    assert same_values(walk(tmp_path / "run"), walk(tmp_path / "whole"))


def test_a_second_for_after_the_last_step_makes_none(tmp_path: Path) -> None:
    state = new_state()
    with stepctl.loop(tmp_path / "run", state, last_step=3) as run:
        assert [advance(run, state, step) for step in run] == [None] * 3
        assert list(run) == []


def test_a_loop_is_entered_once(tmp_path: Path) -> None:
    run = stepctl.loop(tmp_path / "run", new_state(), last_step=2)
    with run:
        pass
    with pytest.raises(StepctlError, match="entered once"), run:
        pass
    assert events(tmp_path / "run", "end")[-1]["reason"] == "closed"
    walk(tmp_path / "run", 2)


def test_two_loops_one_after_another_and_one_within_a_step(tmp_path: Path) -> None:
    walk(tmp_path / "first", 3)

    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        inner = walk(tmp_path / f"inner-{step}", 2)
        advance(run, state, step)
        state["x"] += inner["x"]

    expected = walk(tmp_path / "whole", 3, body=body)
    walk(tmp_path / "run", 2, body=body)
    assert same_values(walk(tmp_path / "run", 3, body=body), expected)


def test_a_signal_in_an_inner_loop_ends_both(tmp_path: Path) -> None:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        if step == 1:
            walk(tmp_path / "inner", body=send(signal.SIGTERM))
        advance(run, state, step)

    with pytest.raises(SystemExit) as caught:
        walk(tmp_path / "run", 3, body=body)
    assert caught.value.code == 75
    assert saved(tmp_path / "inner") == [0, 5]
    assert saved(tmp_path / "run") == [0]


def test_another_process_holds_the_run(tmp_path: Path) -> None:
    with stepctl.loop(tmp_path / "run", new_state(), last_step=2), pytest.raises(RunInUseError):
        walk(tmp_path / "run", 2)
    walk(tmp_path / "run", 2)


@pytest.mark.training
def test_a_loop_runs_in_another_thread(tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(walk(tmp_path / "run")))
    thread.start()
    thread.join()
    assert same_values(results[0], walk(tmp_path / "whole"))


class Sum(stepctl.Hook):
    """A hook with a state."""

    name = "sum"

    def __init__(self) -> None:
        self.total = np.zeros(())

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def after_step(self, state: Any, metrics: Any) -> None:
        self.total += metrics["norm"]


def test_the_state_of_hooks_is_restored(tmp_path: Path) -> None:
    whole, run, again = Sum(), Sum(), Sum()
    walk(tmp_path / "whole", hooks=[whole])
    walk(tmp_path / "run", 4, hooks=(run,))
    walk(tmp_path / "run", hooks=(again,))
    assert again.total == whole.total
    assert again.total > run.total
    with pytest.raises(CheckpointError, match="hooks/sum"):
        walk(tmp_path / "run", 12)


# --- other processes


def _square(x: float) -> float:
    return x * x


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_step_may_fork_children(tmp_path: Path) -> None:
    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        with multiprocessing.get_context("fork").Pool(2) as pool:  # ended by SIGTERM
            state["x"] += pool.map(_square, state["x"])
        advance(run, state, step)

    expected = walk(tmp_path / "whole", 3, body=body)
    walk(tmp_path / "run", 2, body=body)
    assert same_values(walk(tmp_path / "run", 3, body=body), expected)


@pytest.mark.process
def test_a_signal_ends_a_child_that_was_forked_just_now(tmp_path: Path) -> None:
    codes = set()

    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        state["accepted"] += 1
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # if the signal is lost
            while True:
                signal.pause()
        os.kill(pid, signal.SIGTERM)  # which may arrive before the child runs
        codes.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    walk(tmp_path / "run", 30, body=body, checkpoint_every=None)
    assert codes == {-signal.SIGTERM}


@pytest.mark.process
@pytest.mark.parametrize("how", ["exit", "fail", "end"])
def test_a_forked_child_leaves_the_run_to_its_parent(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = []

    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        if step == 4:
            pid = os.fork()
            if pid == 0:
                if how == "exit":
                    sys.exit(7)
                if how == "fail":
                    fail()
                return
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            with pytest.raises(RunInUseError):
                walk(tmp_path / "run")
        advance(run, state, step)

    process = os.getpid()
    try:
        expected = walk(tmp_path / "run", body=body)
    except (SystemExit, Failed, StepctlError):
        if os.getpid() != process:
            os._exit(7)
        raise
    finally:
        if os.getpid() != process:
            os._exit(8)
    assert codes == [7]
    assert "failed halfway" not in capfd.readouterr().err
    assert same_values(expected, walk(tmp_path / "whole"))
    assert len(events(tmp_path / "run", "end")) == 1


@pytest.mark.process
def test_a_forked_child_that_leaves_the_block_records_nothing(tmp_path: Path) -> None:
    state = new_state()
    with stepctl.loop(tmp_path / "run", state, last_step=3) as run:
        pid = os.fork()
        if pid == 0:
            try:
                run.__exit__(None, None, None)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        for step in run:
            advance(run, state, step)
    assert [event["reason"] for event in events(tmp_path / "run", "end")] == ["last_step 3"]


SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from tests.support.loops import advance, new_state
import stepctl
state = new_state()
with stepctl.loop("run", state, last_step=30, checkpoint_every=4, log_every=2) as run:
    for step in run:
        if sys.argv[1:] == [str(step)]:
            os.kill(os.getpid(), 9)
        advance(run, state, step)
print("after the loop")
"""


@pytest.mark.process
def test_a_killed_script_continues_when_it_runs_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "walk.py").write_text(SCRIPT.format(root=str(Path(__file__).parents[2])))

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "walk.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    for step in (5, 6, 17, 29):
        done = start(str(step))
        assert (done.returncode, done.stdout) == (-9, "")
    assert start().stdout == "after the loop\n"
    assert start().stdout == "after the loop\n"
    expected = walk(tmp_path / "whole", 30, log_every=2)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    values = stepctl.load_checkpoint(tmp_path / "run").values
    assert values is not None
    values["emulator"] = values["emulator"]["names"]
    assert same_values(values, expected | {"emulator": expected["emulator"].names})


# --- runs of scripts and runs of configs


def test_a_run_of_a_config_is_refused_by_a_loop_and_the_reverse(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    snapshot: SnapshotAssertion,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["python", "walk.py", "--fast"])
    config = make_config(stop={"last_step": 2})
    train(config, tmp_path / "trained")
    walk(tmp_path / "run", 2)
    (tmp_path / "config.yaml").write_text(config.text)
    messages = []
    with pytest.raises(ConfigError) as caught:
        walk(tmp_path / "trained", 2)
    messages.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        stepctl.resume(tmp_path / "run")
    messages.append(str(caught.value))
    capsys.readouterr()
    for words in (
        "resume run",
        "resume run --num-steps 3",
        "train config.yaml --run-dir run",
        "train config.yaml --run-dir run --or-resume",
    ):
        with contextlib.suppress(SystemExit):
            assert cli.main(words.split(), standalone_mode=False) == 2
        messages.append(capsys.readouterr().err)
    assert [without_paths(message, HERE=tmp_path) for message in messages] == snapshot


def test_no_warning_comes_with_a_plain_loop(tmp_path: Path, said: Callable[[], str]) -> None:
    walk(tmp_path / "run", 3)
    walk(tmp_path / "run", 6)
    assert "warning" not in said()


def test_a_full_disk_ends_the_loop_and_loses_nothing(
    tmp_path: Path, said: Callable[[], str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def body(run: Loop, state: dict[str, Any], step: int) -> None:
        if step == 5:  # from here no file can grow
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        advance(run, state, step)

    try:
        with pytest.raises(StepctlError, match="cannot be written: File too large"):
            walk(tmp_path / "run", body=body, checkpoint_every=2, keep_last=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # the checkpoint of step 4 is in flight: its file, or its ledger line too, may be complete
    newest = events(tmp_path / "run", "checkpoint")[-1]["step"]
    assert newest in (2, 4)
    assert f"continue from step-0000000{newest}.h5 by running the script again" in said()
    assert same_values(walk(tmp_path / "run"), walk(tmp_path / "whole"))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
