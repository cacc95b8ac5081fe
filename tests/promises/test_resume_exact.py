"""A run stopped after any step, any number of times, and resumed ends with the same bits and rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState
from tests.support.flowers import FLOWERS
from tests.support.runs import make_config, resume, rows, train
from tests.support.stops import some_stops

LAST = 40
SGD = {
    "name": "sgd",
    "learning_rate": {"name": "cosine", "peak": 0.1, "decay_steps": 60, "warmup_steps": 25},
}
LOSS = {"task": {"name": "loss"}, "model": {"name": "tests.support.loss_models:Softmax"}}
DIGITS = {"name": "digits", "batch_size": 48, "validation_fraction": 0.9}
TOKENS = "tests.support.token_model"
IDS = {"name": f"{TOKENS}:large_ids", "batch_size": 48, "shards": 4, "validation_fraction": 0.1}
WINDOWS = {
    "name": f"{TOKENS}:windows",
    "batch_size": 48,
    "order": "sequential",
    "validation_fraction": 0.1,
}
BIGRAM = {"task": {"name": "loss"}, "model": {"name": f"{TOKENS}:Bigram"}}
CASES: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "momentum and warm-up in flight": {"optimizer": {**SGD, "momentum": 0.9}},
    "nesterov": {"optimizer": {**SGD, "momentum": 0.9, "nesterov": True}},
    "adagrad": {"optimizer": {"name": "adagrad", "learning_rate": 0.05}},
    "rmsprop": {"optimizer": {"name": "rmsprop", "learning_rate": 0.005}},
    "adamw, clipped": {"optimizer": {"name": "adamw", "learning_rate": 0.01, "clip_norm": 0.5}},
    "adam, decayed": {"optimizer": {"name": "adam", "learning_rate": 0.01, "weight_decay": 0.1}},
    "groups": {
        "optimizer": {
            "name": "adamw",
            "learning_rate": 0.01,
            "clip_norm": 0.5,
            "weight_decay": {"default": 0.1, "*/bias": 0.0},
            "learning_rate_multipliers": {"dense1/*": 3.0},
            "frozen": ["dense0/weight"],
        },
        "data": {**DIGITS, "shards": 4},
        "ema": {"decay": 0.9},
    },
    "shards 4": {"data": {**DIGITS, "shards": 4}},
    "sequential": {"data": {**DIGITS, "order": "sequential"}},
    "sequential, shards 4": {"data": {**DIGITS, "order": "sequential", "shards": 4}},
    "ids": {"data": IDS, "model": {"name": f"{TOKENS}:Embedding"}},
    "windows of a text": {"data": WINDOWS, **BIGRAM},
    "windows of a text, shards 4": {"data": {**WINDOWS, "shards": 4}, **BIGRAM},
    "windows without targets": {
        "data": {**WINDOWS, "name": f"{TOKENS}:windows_alone"},
        **BIGRAM,
    },
    "a table of words, standardized, stratified": {"data": FLOWERS},
    "float64": {"dtype": "float64"},
    "a hook of the config": {"hooks": [{"name": "tests.support.user_hooks:Smoothed"}]},
    "initial step": {"initial_step": 5, "stop": {"last_step": LAST}},
    "batch norm": {"model": {"name": "mlp", "hidden": [16, 8], "batch_norm": True, "dropout": 0.2}},
    "layer norm": {
        "model": {
            "name": "mlp",
            "hidden": [16, 8],
            "layer_norm": True,
            "activation": "gelu",
            "dropout": 0.5,
        }
    },
    "loss by autograd": LOSS,
    "loss by autograd, shards 4, averaged": {
        **LOSS,
        "data": {**DIGITS, "shards": 4},
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "clip_norm": 0.5},
        "ema": {"decay": 0.9},
        "evaluate": {"every": 15, "ema": True},
    },
    "loss by hand": {
        "task": {"name": "loss"},
        "model": {"name": "tests.support.loss_by_hand:ByHand", "noise": 0.1},
        "dtype": "float64",
    },
}
AT_ANY_STEP = [
    "adam",
    "groups",
    "windows of a text, shards 4",
    "a table of words, standardized, stratified",
]


class Remembers(Hook):
    """A hook whose state depends on every step that it saw."""

    name = "remembers"

    def __init__(self) -> None:
        self.losses = np.zeros(3)

    def state(self) -> dict[str, Array]:
        return {"losses": self.losses}

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.losses[:] = self.losses * 0.9 + np.array(
            [metrics["loss"], 1.0, state.counters.global_step]
        )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function: case -> (final state, rows) of the run that was never stopped."""
    known: dict[str, tuple[TrainState, Any]] = {}

    def find(case: str) -> tuple[TrainState, Any]:
        if case not in known:
            path = tmp_path_factory.mktemp("unbroken") / "run"
            state = train(make_config(**CASES[case]), path, (Remembers(),))
            known[case] = state, rows(path)
        return known[case]

    return find


def broken_config(case: str, stop: int) -> Any:
    return make_config(**{**CASES[case], "stop": {"last_step": stop}})


@pytest.mark.training
@pytest.mark.parametrize("stop", some_stops(LAST, every=8))
@pytest.mark.parametrize("case", AT_ANY_STEP)
def test_stopped_at_any_step(case: str, stop: int, unbroken: Any, tmp_path: Path) -> None:
    train(broken_config(case, stop), tmp_path / "run", (Remembers(),))
    state = resume(tmp_path / "run", last_step=LAST, hooks=(Remembers(),))
    expected, expected_rows = unbroken(case)
    assert state.counters["samples_seen"] == 40 * 48  # across many epoch ends: 180 samples each
    assert state.same_bits(expected)
    assert rows(tmp_path / "run") == expected_rows


@pytest.mark.training
@pytest.mark.parametrize("case", CASES)
def test_every_kind_stopped_twice(case: str, unbroken: Any, tmp_path: Path) -> None:
    train(broken_config(case, 13), tmp_path / "run", (Remembers(),))
    resume(tmp_path / "run", last_step=29, hooks=(Remembers(),))
    state = resume(tmp_path / "run", last_step=LAST, hooks=(Remembers(),))
    expected, expected_rows = unbroken(case)
    assert state.same_bits(expected)
    assert rows(tmp_path / "run") == expected_rows


@pytest.mark.training
def test_the_cases_differ(unbroken: Any) -> None:
    """A case that changed nothing would prove nothing."""
    adam, _ = unbroken("adam")
    for case in CASES:
        assert case == "adam" or not unbroken(case)[0].same_bits(adam), case


@pytest.mark.process
@pytest.mark.parametrize("at", [1, 24])
def test_in_a_new_process(at: int, unbroken: Any, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.support.runs import *\nfrom tests.promises.test_resume_exact import *\n"
        "path, stop = Path(sys.argv[1]), int(sys.argv[2])\n"
        "train(broken_config('adam', stop), path, (Remembers(),)) if stop < LAST else "
        "resume(path, last_step=stop, hooks=(Remembers(),))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for stop in (at, LAST):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run"), str(stop)],
            env=environment,
            check=True,
        )
    expected, expected_rows = unbroken("adam")
    assert resume(tmp_path / "run", hooks=(Remembers(),)).same_bits(expected)
    assert rows(tmp_path / "run") == expected_rows


@pytest.mark.training
def test_back_to_an_older_step(unbroken: Any, tmp_path: Path) -> None:
    train(
        make_config(checkpoint={"every": 10, "keep_last": None}), tmp_path / "run", (Remembers(),)
    )
    state = resume(tmp_path / "run", from_step=10, hooks=(Remembers(),))
    expected, expected_rows = unbroken("adam")
    assert state.same_bits(expected)
    assert rows(tmp_path / "run") == expected_rows
    aside = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.aside-1"))
    assert aside == [f"step-000000{step}.h5.aside-1" for step in (20, 30, 40)]


@pytest.mark.training
def test_a_batch_size_changed_on_the_way_skips_and_repeats_no_sample(tmp_path: Path) -> None:
    train(broken_config("adam", 5), tmp_path / "run")
    changed = {"assignments": ("data.batch_size=30",), "allow_change": ("data.batch_size",)}
    state = resume(tmp_path / "run", last_step=9, **changed)
    assert state.counters.samples_seen == 5 * 48 + 4 * 30
