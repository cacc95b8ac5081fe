"""Scripts and programs that share memory with their state, or look at it in other ways, resume exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import parse_config
from stepctl.errors import ConfigError, StepctlError
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run

pytestmark = [pytest.mark.training, pytest.mark.usefixtures("in_tmp_path")]

Script = Callable[[str, int], None]
LAST = 8


def k_means(path: str, last_step: int) -> None:
    """The initial centres are a view of the data."""
    x = np.random.default_rng(3).standard_normal((40, 2))
    state = {"centres": x[:4]}
    with stepctl.loop(path, state, last_step=last_step, checkpoint_every=3) as run:
        for _ in run:
            distances = ((x[:, None] - state["centres"]) ** 2).sum(axis=2)
            nearest = distances.argmin(axis=1)
            state["centres"] = np.stack([x[nearest == k].mean(axis=0) for k in range(4)])
            run.log(inertia=distances.min(axis=1).sum())


def changing_order(path: str, last_step: int) -> None:
    """A key moves to the end of the state."""
    state = {"a": 1.0, "b": 1e-16, "c": -1.0}
    with stepctl.loop(path, state, last_step=last_step, checkpoint_every=3) as run:
        for step in run:
            key = "abc"[step % 3]
            state[key] = state.pop(key) + sum(state.values())


def spawning(path: str, last_step: int) -> None:
    """A generator has a name of its own, and spawns others."""
    rng = np.random.default_rng(0)
    state = {"rng": rng, "total": 0.0}
    with stepctl.loop(path, state, last_step=last_step, checkpoint_every=3) as run:
        for _ in run:
            (child,) = rng.spawn(1)
            state["total"] += rng.random() + child.random()


SCRIPTS: list[Script] = [k_means, changing_order, spawning]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("stop", [1, 4, LAST - 1])
def test_a_script_that_was_stopped_ends_with_the_same_bits(script: Script, stop: int) -> None:
    script("whole", LAST)
    script("broken", stop)
    script("broken", LAST)
    done = CliRunner().invoke(cli, ["diff", "whole", "broken"])
    assert done.exit_code == 0, done.stdout


def test_the_data_behind_a_view_are_not_overwritten() -> None:
    def run(last_step: int) -> tuple[Any, Any]:
        data = np.arange(12.0).reshape(6, 2)
        state = {"x": data[:3], "whole": np.zeros(2)}
        whole = state["whole"]
        with stepctl.loop("run", state, last_step=last_step) as loop:
            for _ in loop:
                state["x"] = state["x"] + 1
                state["whole"] += 1
        return data, (state["whole"] is whole, state["x"].tolist())

    run(2)
    data, (is_filled_in_place, x) = run(3)
    assert data.tolist() == np.arange(12.0).reshape(6, 2).tolist()
    assert is_filled_in_place
    assert x == [[3, 4], [5, 6], [7, 8]]


def test_an_unseeded_generator_continues_under_its_own_name() -> None:
    def run(last_step: int) -> list[float]:
        rng = np.random.default_rng()
        drawn = []
        with stepctl.loop("run", {"rng": rng}, last_step=last_step) as loop:
            for _ in loop:
                drawn.append(rng.random())
        return [*drawn, rng.random()]

    *_, expected = run(3)  # the first draw after step 3
    assert run(4)[0] == expected


def test_a_bool_array_of_other_bytes_is_refused() -> None:
    state = {"mask": np.array([0, 2], np.uint8).view(bool)}
    with (
        pytest.raises(ConfigError, match="neither 0 nor 1"),
        stepctl.loop("run", state, last_step=1),
    ):
        pass
    assert not Path("run").exists()


def test_the_bit_generator_of_a_stream_cannot_be_kept_in_the_state() -> None:
    def run() -> None:
        state: dict[str, Any] = {"rng": None}
        with stepctl.loop("run", state, last_step=1) as loop:
            for _ in loop:
                state["rng"] = np.random.Generator(loop.rng("a").bit_generator)

    with pytest.raises(ConfigError, match="StreamBitGenerator cannot be saved"):
        run()


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_step_that_changes_the_top_level_keys_is_refused(change: str) -> None:
    def run() -> None:
        state = {"x": 0, "y": 0}
        with stepctl.loop("run", state, last_step=2, checkpoint_every=1) as loop:
            for _ in loop:
                if change == "add":
                    state["new"] = 1
                else:
                    del state["y"]

    with pytest.raises(ConfigError, match="was added or removed by a step; keep the keys"):
        run()
    assert verify("run")[1] == []


def test_save_takes_effect_when_the_step_is_complete() -> None:
    state = {"a": 0, "b": 0}
    with stepctl.loop("run", state, last_step=4, checkpoint_every=None, keep_last=None) as run:
        for step in run:
            state["a"] += 1
            if step == 1:
                run.save()
            state["b"] += 1
    values = stepctl.load_checkpoint("run/checkpoints/step-00000002.h5").values
    assert values == {"a": 2, "b": 2}


@pytest.mark.parametrize("reason", ["\0 done", "\x1b[2J", "grün" * 100])
def test_any_reason_stops_the_run_for_good(reason: str) -> None:
    for expected in ([0, 1], []):
        steps = []
        with stepctl.loop("run", {"n": 0}, last_step=5) as run:
            for step in run:
                steps.append(step)
                if step == 1:
                    run.stop(reason)
        assert steps == expected


class Largest(stepctl.Hook):
    """A hook with an array of its own."""

    name = "largest"

    def __init__(self) -> None:
        self.value = np.full(2, -np.inf)

    def state(self) -> dict[str, Any]:
        return {"value": self.value}

    def after_step(self, state: Any, metrics: Any) -> None:
        self.value[...] = np.maximum(self.value, metrics["x"])


def with_hook(path: str, last_step: int) -> None:
    with stepctl.loop(
        path, {"n": 0}, last_step=last_step, checkpoint_every=3, keep_last=None, hooks=[Largest()]
    ) as run:
        for _ in run:
            run.log(x=run.rng("a").random())


def test_a_fork_keeps_the_arrays_of_the_script_s_hooks() -> None:
    with_hook("run", 9)
    done = CliRunner().invoke(cli, ["fork", "run", "--at", "6", "--run-dir", "child"])
    assert done.exit_code == 0, done.stderr
    with_hook("child", 9)
    assert CliRunner().invoke(cli, ["diff", "run", "child"]).exit_code == 0


# --- series


def walk(path: str, last_step: int, act: Callable[[int], None] = lambda step: None) -> None:
    with stepctl.loop(path, {"n": 0}, last_step=last_step, checkpoint_every=5) as run:
        for step in run:
            run.append("s", run.rng("a").standard_normal(3))
            act(step)


@pytest.mark.parametrize("tail", [bytes(64), b"\xff" * 64, bytes(31)])
def test_garbage_after_the_last_row_of_a_series_is_cut(tail: bytes) -> None:
    """A file may be longer than what was written to it, after a power cut."""
    walk("run", 5)
    with Path("run/series/s.bin").open("ab") as file:
        file.write(tail)
    walk("run", 10)
    steps, _ = stepctl.load_series("run", "s", steps=True)
    assert steps.tolist() == list(range(1, 11))
    assert verify("run")[1] == []


@pytest.mark.parametrize("name", ["s.bin", "s.json"])
def test_a_series_that_is_removed_during_the_run_stops_it(name: str) -> None:
    def remove(step: int) -> None:
        if step == 7:
            Path("run/series", name).unlink()

    with pytest.raises(StepctlError, match=r"s\.bin: was removed or replaced during training"):
        walk("run", 10, remove)


def test_rows_that_one_of_two_runs_lacks_are_a_difference() -> None:
    walk("a", 10)
    walk("b", 10)
    path = Path("b/series/s.bin")
    path.write_bytes(path.read_bytes()[3 * 32 :])
    done = CliRunner().invoke(cli, ["diff", "a", "b"])
    assert done.exit_code == 1
    assert "series/s: 10 rows and 7 rows" in done.stdout


@pytest.mark.parametrize(
    ("row", "message"),
    [(np.ma.array([1.0], mask=[True]), "MaskedArray"), ([[1], [1, 2]], "is no array")],
)
def test_rows_that_would_change_are_refused(row: Any, message: str) -> None:
    def run() -> None:
        with stepctl.loop("run", {"n": 0}, last_step=1) as loop:
            for _ in loop:
                loop.append("s", row)

    with pytest.raises(ConfigError, match=message):
        run()


# --- programs


PROGRAM = """
import numpy as np
import stepctl


class Shared(stepctl.Program):
    x0 = np.zeros(3)
    history = []

    def initial_state(self, rng):
        return {"x": self.x0, "history": self.history, "first": np.arange(6.0)[:2]}

    def step(self, state, step, rng):
        state["x"] += rng("a").standard_normal(3)
        state["history"].append(step)
        return {"norm": state["x"] @ state["x"]}


class OnSelf(Shared):
    def __init__(self):
        self.total = 0.0

    def step(self, state, step, rng):
        self.total += 1
        state["x"] += self.total


class Keeps(Shared):
    def step(self, state, step, rng):
        state["x"] += rng("a").random(3)
"""


def train(name: str, path: str, capture: list[str] | None = None, **keys: Any) -> None:
    document = {
        "program": {"name": f"shared:{name}"},
        "stop": {"last_step": 6},
        "checkpoint": {"every": 2, "keep_last": None},
        **keys,
    }
    said: list[str] = [] if capture is None else capture
    with create_run(parse_config(yaml.Document(document)), RunDirectory(path), said.append) as run:
        run.train()


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shared", raising=False)


@pytest.mark.usefixtures("shared")
def test_the_check_of_determinism_changes_no_state_that_a_class_shares() -> None:
    said: list[str] = []
    train("Shared", "checked", said)
    assert said == []
    train("Shared", "unchecked", check_determinism=False)
    done = CliRunner().invoke(cli, ["diff", "checked", "unchecked"])
    assert done.exit_code == 0, done.stdout


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(("name", "n_warnings"), [("OnSelf", 1), ("Keeps", 0)])
def test_state_outside_of_the_state_is_found(name: str, n_warnings: int) -> None:
    said: list[str] = []
    train(name, "run", said)
    assert sum("with different results" in line for line in said) == n_warnings


@pytest.mark.usefixtures("shared")
def test_a_replay_after_a_changed_stop_condition_is_the_same() -> None:
    train("Shared", "run", stop={"last_step": 6, "when": {"metric": "norm", "above": 0.5}})
    resume = ["resume", "run", "--set", "stop.when=null", "--last-step", "12", "-q"]
    assert CliRunner().invoke(cli, resume).exit_code == 0
    good, _ = verify("run")
    steps = [file["step"] for file in good]
    stopped = max(step for step in steps if (step < 12 and step % 2) or step < 6)
    replay = ["verify", "run", "--replay", f"{stopped}:12"]
    done = CliRunner().invoke(cli, replay)
    assert done.exit_code == 0, done.stdout
