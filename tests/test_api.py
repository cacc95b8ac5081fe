"""Runs from Python: stepped by hand, with hooks, they have the bits of the command line's runs."""

from __future__ import annotations

import contextlib
import copy
import enum
import fractions
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion
from threadpoolctl import threadpool_info

import stepctl
from stepctl.config import yaml
from stepctl.errors import ConfigError, RunExistsError, RunInUseError, StepctlError
from stepctl.optimizers.base import Optimizer
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState
from tests.support.messages import without_paths
from tests.support.runs import BASE, make_config, rows, train
from tests.support.runs import resume as resume_segment
from tests.support.stops import some_of

LAST = 20
CONFIG = {**BASE, "stop": {"last_step": LAST}}


class Count(stepctl.Hook):
    """A hook of a user's own, with state."""

    name = "count"

    def __init__(self) -> None:
        self.seen = np.zeros(2, np.int64)

    def state(self) -> dict[str, Array]:
        return {"seen": self.seen}

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.seen += state.counters.global_step, 1


def silent(message: str) -> None:
    return


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    return train(make_config(stop={"last_step": LAST}), path), rows(path)


@pytest.mark.training
@pytest.mark.parametrize("steps", [0, 3])
def test_a_closed_run_makes_no_step(steps: int, tmp_path: Path) -> None:
    """Nobody holds it any more: it may be another's."""
    for path, fails in ((tmp_path / "left", False), (tmp_path / "failed", True)):
        run = stepctl.create(CONFIG, path, say=silent)
        with contextlib.suppress(ZeroDivisionError), run:
            run.step(steps)
            assert not fails or 1 / 0
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for use in (run.step, run.train, run.save):
            with pytest.raises(StepctlError, match="is closed, and no longer held"):
                use()
        assert run.close() is None
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.training
@pytest.mark.parametrize("first", [0, 1, 7, 19, 20])
def test_stepped_by_hand_a_run_is_the_trained_one(
    first: int, unbroken: Any, tmp_path: Path
) -> None:
    with stepctl.create(CONFIG, tmp_path / "run", say=silent) as run:
        made = run.step(first)
        assert (made is None) == (first == 0)
        assert run.global_step == first
        assert run.train().done
        assert run.step() is None
        assert run.state.same_bits(unbroken[0])
    assert rows(tmp_path / "run") == unbroken[1]


@pytest.mark.training
@pytest.mark.parametrize("stop", range(0, LAST + 1, 4))
def test_closed_after_any_step_and_resumed(stop: int, unbroken: Any, tmp_path: Path) -> None:
    with stepctl.create(CONFIG, tmp_path / "run", say=silent) as run:
        for _ in range(stop):
            run.step()
    with stepctl.resume(tmp_path / "run", say=silent) as run:
        assert (run.global_step, run.target) == (stop, LAST)
        run.train()
        assert run.state.same_bits(unbroken[0])
    assert rows(tmp_path / "run") == unbroken[1]


@pytest.mark.training
def test_a_user_s_hook_is_saved_with_the_run(tmp_path: Path) -> None:
    with stepctl.create(CONFIG, tmp_path / "run", hooks=[Count()], say=silent) as run:
        run.step(6)
    hook = Count()
    with stepctl.resume(tmp_path / "run", hooks=[hook], say=silent) as run:
        assert hook.seen.tolist() == [21, 6]
        run.train()
    assert stepctl.load_checkpoint(tmp_path / "run").arrays["hooks/count/seen"].tolist() == [
        210,
        20,
    ]


@pytest.mark.training
def test_a_checkpoint_is_read(unbroken: Any, tmp_path: Path) -> None:
    with stepctl.create(CONFIG, tmp_path / "run", say=silent) as run:
        run.step(3)
        run.save()
        run.step(2)
    assert stepctl.global_step(tmp_path / "run") == 5
    file = tmp_path / "run" / "checkpoints" / "step-00000003.h5"
    assert stepctl.global_step(file) == 3
    read = stepctl.load_checkpoint(file)
    assert (read.global_step, read.counters["samples_seen"], read.run) == (3, 3 * 48, "run")
    state = train(make_config(stop={"last_step": 3}), tmp_path / "three")
    for path, array in state.arrays().items():
        assert read.arrays[path].tobytes() == array.tobytes(), path
    assert read.config["optimizer"]["name"] == "adam"


def fail_at_step_7(path: Path) -> None:
    with stepctl.create(CONFIG, path, say=silent) as run:
        run.step(7)
        _ = 1 / 0


@pytest.mark.training
def test_an_error_between_two_steps_saves_the_state(unbroken: Any, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_at_step_7(tmp_path / "run")
    assert stepctl.global_step(tmp_path / "run") == 7
    ends = [
        json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    ]
    assert ends[-1]["reason"].startswith("ZeroDivisionError")
    assert resume_segment(tmp_path / "run").same_bits(unbroken[0])


class Break(stepctl.Hook):
    """Breaks step 7 off with what it is given."""

    name = "break"
    essential = True

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == 7:
            raise self.error


def half_an_update(self: Optimizer, *arguments: Any, **options: Any) -> None:
    update(self, *arguments, **options)
    raise KeyboardInterrupt


update = Optimizer.update


@pytest.mark.training
@pytest.mark.parametrize("where", ["update", "hook", "hook's error"])
def test_a_step_that_was_broken_off_is_neither_saved_nor_trained_on(
    where: str, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook, where nothing ends with it: a step may be half made, or half told to the hooks."""
    hooks = (
        []
        if where == "update"
        else [Break(KeyboardInterrupt if where == "hook" else ZeroDivisionError)]
    )
    run = stepctl.create(CONFIG, tmp_path / "run", hooks=hooks, say=silent)
    run.step(5)
    run.save()
    run.step()
    with monkeypatch.context() as patched:
        if where == "update":
            patched.setattr(Optimizer, "update", half_an_update)
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            run.step()
    for goes_on in (run.step, run.train, run.save):
        with pytest.raises(StepctlError, match="failed halfway"):
            goes_on()
    assert run.close() is None
    assert stepctl.global_step(tmp_path / "run") == 5
    with stepctl.resume(tmp_path / "run", say=silent) as run:
        run.train()
        assert run.state.same_bits(unbroken[0])
    assert rows(tmp_path / "run") == unbroken[1]


@pytest.mark.training
@pytest.mark.parametrize("from_step", [None, 5])
def test_a_run_that_was_only_looked_at_stays_as_it_was(
    from_step: int | None, unbroken: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with stepctl.create(CONFIG, path, say=silent) as run:
        run.step(5)
        run.save()
        run.train()
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with stepctl.resume(path, from_step=from_step, say=silent) as run:
        assert run.evaluate()["loss"] > 0
        run.save()
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == files
    assert rows(path) == unbroken[1]


@pytest.mark.training
def test_a_run_is_held_until_it_is_closed(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    run = stepctl.create(CONFIG, tmp_path / "run", say=silent)
    run.step()
    with pytest.raises(RunInUseError) as caught:
        stepctl.resume(tmp_path / "run", say=silent)
    known = {"HERE": tmp_path, "PID": os.getpid(), "HOST": os.uname().nodename}
    assert without_paths(str(caught.value), **known) == snapshot
    outcome = run.close()
    assert outcome is not None
    assert (outcome.step, outcome.reason.text) == (1, "closed")
    assert run.close() is None
    stepctl.resume(tmp_path / "run", say=silent).close()
    with pytest.raises(RunExistsError):
        stepctl.create(CONFIG, tmp_path / "run", say=silent)


def test_each_of_two_runs_has_its_own_number_of_threads(tmp_path: Path) -> None:
    """BLAS has one for the whole process, and it decides last bits."""

    def threads() -> set[int]:
        return {
            library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
        }

    open_run = functools.partial(stepctl.create, say=silent)
    with (
        open_run(CONFIG, tmp_path / "one") as one,
        open_run({**CONFIG, "numerics": {"threads": 2}}, tmp_path / "two") as two,
    ):
        for run, expected in ((one, {1}), (two, {2}), (one, {1})):
            run.step()
            assert threads() == expected
        two.evaluate()
        assert threads() == {2}


@pytest.mark.training
def test_overrides_are_checked_as_a_config_is(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        stepctl.create(CONFIG, tmp_path / "run", overrides={"data.batchsize": 3}, say=silent)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    with stepctl.create(
        CONFIG, tmp_path / "run", overrides={"data.batch_size": 24}, say=silent
    ) as run:
        assert run.config.data.batch_size == 24
        run.step()
    with pytest.raises(ConfigError, match="--allow-change data"):
        stepctl.resume(tmp_path / "run", overrides={"data.batch_size": 48}, say=silent)


class Kind(enum.StrEnum):
    """An enumeration of a user's own."""

    ADAM = "adam"


VALUES: dict[str, tuple[str, Any, Any]] = {
    "int64": ("data.batch_size", np.int64(24), 24),
    "uint8": ("data.batch_size", np.uint8(24), 24),
    "a 0-d array": ("data.batch_size", np.array(24), 24),
    "float64": ("optimizer.learning_rate.value", np.float64(0.5), 0.5),
    "float32": ("optimizer.learning_rate.value", np.float32(0.25), 0.25),
    "float16": ("optimizer.learning_rate.value", np.float16(0.25), 0.25),
    "longdouble": ("optimizer.learning_rate.value", np.longdouble(0.25), 0.25),
    "a fraction": ("optimizer.learning_rate.value", fractions.Fraction(1, 4), 0.25),
    "bool_": ("log.means", np.bool_(True), True),
    "str_": ("task.name", np.str_("classification"), "classification"),
    "an enumeration": ("optimizer.name", Kind.ADAM, "adam"),
    "an array": ("model.hidden", np.array([3, 4]), [3, 4]),
    "a tuple": ("model.hidden", (np.int32(3), 4), [3, 4]),
    "a null": ("checkpoint.keep_last", None, None),
}


@pytest.mark.training
@pytest.mark.parametrize("case", some_of(VALUES, every=2))
def test_values_of_python_and_numpy_become_plain(case: str, tmp_path: Path) -> None:
    key, value, plain = VALUES[case]
    section, name = key.partition(".")[::2]
    config = {
        **CONFIG,
        "optimizer": {"name": "adam", "learning_rate": {"name": "constant", "value": 0.01}},
    }
    in_config = copy.deepcopy(config)
    folder = in_config.setdefault(section, {})
    for part in name.split(".")[:-1]:
        folder = folder[part]
    folder[name.split(".")[-1]] = value
    for number, (given, overrides) in enumerate(((in_config, {}), (config, {key: value}))):
        path = tmp_path / str(number)
        with stepctl.create(given, path, overrides=overrides, say=silent) as run:
            found = yaml.flatten(run.config.plain())[key]
            assert (found, type(found)) == (plain, type(plain))
        with stepctl.resume(path, overrides={key: value}, say=silent) as run:  # no change
            assert yaml.flatten(run.config.plain())[key] == plain


@pytest.mark.training
def test_paths_of_python_are_paths(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=generator.normal(size=(60, 4)), y=generator.integers(0, 3, 60))
    data = {
        "name": "arrays",
        "path": tmp_path / "a.npz",
        "batch_size": 8,
        "validation_fraction": 0.5,
    }
    with stepctl.create({**CONFIG, "data": data}, tmp_path / "run", say=silent):
        pass
    with stepctl.resume(
        tmp_path / "run", overrides={"data.path": tmp_path / "a.npz"}, say=silent
    ) as run:
        run.step(np.int64(3))
        assert run.global_step == 3


@pytest.mark.parametrize(
    "value",
    [object(), 1j, {3}, b"adam", np.datetime64("2026-01-01"), [print]],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("where", ["config", "overrides"])
def test_values_that_no_config_can_hold_are_one_line(
    value: Any, where: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    config = {**CONFIG, "seed": value} if where == "config" else CONFIG
    overrides = {} if where == "config" else {"seed": value}
    with pytest.raises(ConfigError) as caught:
        stepctl.create(config, tmp_path / "run", overrides=overrides, say=silent)
    assert without_paths(str(caught.value), (r"(?<= at )0x[0-9a-f]+",)) == snapshot
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.training
def test_steps_of_numpy_are_steps(tmp_path: Path) -> None:
    with stepctl.create(CONFIG, tmp_path / "run", say=silent) as run:
        run.step(np.int64(4))
        run.save()
        run.step()
    with stepctl.resume(tmp_path / "run", last_step=np.int64(7), say=silent) as run:
        assert run.target == 7
    with stepctl.resume(tmp_path / "run", num_steps=np.int32(2), say=silent) as run:
        assert run.target == 7
    with stepctl.resume(
        tmp_path / "run", from_step=np.uint16(4), allow_change="data", say=silent
    ) as run:
        assert run.global_step == 4


@pytest.mark.training
@pytest.mark.parametrize("name", ["last_step", "num_steps", "from_step"])
@pytest.mark.parametrize("value", [-1, 1.5, np.float64(2), "3", True, 1 << 62], ids=repr)
def test_invalid_steps_are_one_line(name: str, value: Any, tmp_path: Path) -> None:
    stepctl.create(CONFIG, tmp_path / "run", say=silent).close()
    with pytest.raises(ConfigError, match=f"^{name} is .*; give a whole number "):
        stepctl.resume(tmp_path / "run", **{name: value}, say=silent)


@pytest.mark.training
def test_two_targets_are_one_line(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    stepctl.create(CONFIG, tmp_path / "run", say=silent).close()
    with pytest.raises(ConfigError) as caught:
        stepctl.resume(tmp_path / "run", last_step=3, num_steps=3, say=silent)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


def test_dir_lists_the_public_names_and_each_is_there() -> None:
    names = dir(stepctl)
    assert names == sorted(stepctl.__all__)
    assert {
        "create",
        "resume",
        "load_checkpoint",
        "global_step",
        "Run",
        "Checkpoint",
        "Hook",
        "errors",
    } <= set(names)
    for name in names:
        assert getattr(stepctl, name) is not None


def test_the_repr_in_a_notebook_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = stepctl.create(CONFIG, path, hooks=[Count()], say=silent)
    run.step(3)
    assert repr(run) == f"Run({str(path)!r}, global step 3 of {LAST})"
    state = run.state
    assert repr(state.params).startswith(
        "Arena(float32: dense0/weight (64, 16), dense0/bias (16,), "
    )
    assert repr(state.counters) == "Counters({'global_step': 3, 'samples_seen': 144, 'model': 3})"
    assert repr(state).startswith(
        "TrainState(global_step 3, samples_seen 144, model 3; params, optimizers/model/"
    )
    assert "hooks/count" in repr(state)
    run.close()
    assert repr(run) == f"Run({str(path)!r}, global step 3 of {LAST}, closed)"
    loaded = stepctl.load_checkpoint(path)
    assert repr(loaded).startswith("Checkpoint(run 'run', global step 3, ")
    for thing in (run, state, state.params, state.counters, loaded):
        assert len(repr(thing)) < 300
        assert "\n" not in repr(thing)


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    with stepctl.create(CONFIG, tmp_path / "run", say=silent) as run:
        run.step(2)
        before = run.state.params.flat.copy()
        assert set(run.evaluate()) == {"loss", "accuracy"}
        assert np.array_equal(before, run.state.params.flat)


@pytest.mark.process
def test_importing_it_is_light() -> None:
    code = (
        "import sys, stepctl; dir(stepctl); print({'numpy', 'h5py', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
