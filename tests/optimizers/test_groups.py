"""Parameter groups: each parameter is updated by the textbook's formula with the values of its group."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.config import yaml
from stepctl.config.model import parse_config
from stepctl.errors import ConfigError
from stepctl.optimizers import base
from stepctl.optimizers.adam import AdamW
from stepctl.optimizers.base import BLOCK, Optimizer, UpdateInfo
from stepctl.optimizers.groups import Setting, settings_by_path
from stepctl.optimizers.schedules import Constant
from stepctl.optimizers.sgd import SGD
from stepctl.reports.replay import replay
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.records import read_records
from stepctl.state.arena import Arena, same_bits, spans, update_target
from stepctl.training.build import assemble, prepare
from stepctl.training.trainer import Trainer
from tests.optimizers.test_optimizers import CASES, RATE, THREADED, Arrays, adam, gradients, start
from tests.support.counting_optimizer import Counting
from tests.support.runs import forked, make_config, resume, rows, silent, train

# The first array is longer than a block; there are gaps after the biases.
SHAPES = {
    "embedding/weight": (BLOCK // 2 + 3, 2),
    "dense0/weight": (64, 3),
    "dense0/bias": (3,),
    "head/weight": (3, 5),
    "head/bias": (5,),
}
DECAYS = {"default": 0.1, "embedding/*": 0.0, "*/bias": 0.3}
MULTIPLIERS = {"head/*": 10.0, "dense0/bias": 0.25}
FROZEN = ("dense0/weight",)
DECAY_OF = {
    "embedding/weight": 0.0,
    "dense0/weight": 0.1,
    "dense0/bias": 0.3,
    "head/weight": 0.1,
    "head/bias": 0.3,
}
MULTIPLIER_OF = {"dense0/bias": 0.25, "head/weight": 10.0, "head/bias": 10.0}
RUN: dict[str, Any] = {
    "name": "adamw",
    "learning_rate": 0.01,
    "clip_norm": 0.5,
    "weight_decay": {"default": 0.1, "*/bias": 0.0},
    "learning_rate_multipliers": {"dense1/*": 3.0},
    "frozen": ["dense0/weight"],
}


def grouped(optimizer: Optimizer, **changes: Any) -> Optimizer:
    """Return the optimizer with the groups above."""
    groups = {
        "weight_decay": DECAYS,
        "learning_rate_multipliers": MULTIPLIERS,
        "frozen": FROZEN,
    }
    return dataclasses.replace(optimizer, **{**groups, **changes})


@pytest.mark.training
@pytest.mark.parametrize("case", CASES)
def test_each_parameter_follows_the_textbook_with_the_values_of_its_group(case: str) -> None:
    optimizer = grouped(CASES[case][0])
    params, slots = start(optimizer, SHAPES)
    expected: Arrays = {path: view.copy() for path, view in params.items()}
    memories: dict[str, Arrays] = {path: {} for path in params}
    for step, grads in enumerate(gradients(params, 50)):
        trained = {path: g.copy() for path, g in grads.items() if path not in FROZEN}
        norm = math.sqrt(sum(float((g**2).sum()) for g in trained.values()))
        for path, g in trained.items():
            if optimizer.clip_norm is not None and norm > optimizer.clip_norm:
                g *= optimizer.clip_norm / norm
            textbook = CASES[case][1]
            if isinstance(optimizer, AdamW):
                textbook = adam(0.9, 0.999, optimizer.epsilon, decoupled=DECAY_OF[path])
            else:
                g += DECAY_OF[path] * expected[path]
            rate = RATE(step) * MULTIPLIER_OF.get(path, 1)
            expected[path] = textbook(expected[path], g, memories[path], rate, step + 1)
        optimizer.update(params, slots, grads, UpdateInfo(RATE(step), step + 1))
    for path, view in params.items():
        np.testing.assert_allclose(view, expected[path], rtol=1e-10, atol=1e-13)
        for slot, value in zip(optimizer.slots, memories[path].values(), strict=False):
            np.testing.assert_allclose(slots[slot][path], value, rtol=1e-10, atol=1e-13)


def uniform(optimizer: Optimizer, path: str) -> Optimizer:
    """Return the optimizer with the weight decay of one parameter for all."""
    return dataclasses.replace(optimizer, weight_decay=DECAY_OF[path], clip_norm=None)


@pytest.mark.training
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_each_parameter_on_its_own(case: str, dtype: str) -> None:
    """In place and out of place; what the spare memory held before does not matter."""
    optimizer = grouped(CASES[case][0], clip_norm=None)
    params, slots = start(optimizer, SHAPES, dtype)
    first = {path: view.copy() for path, view in params.items()}
    alone = {}
    for path in SHAPES:
        own = Arena({path: SHAPES[path]}, dtype)
        own[path] = first[path]
        own_slots = {slot: own.like() for slot in optimizer.slots}
        alone[path] = (uniform(CASES[case][0], path), own, own_slots)
    for step, grads in enumerate(gradients(params, 6)):
        for path, (own_optimizer, own, own_slots) in alone.items():
            own_grads = own.like()
            own_grads[path] = grads[path]
            info = UpdateInfo(RATE(step) * MULTIPLIER_OF.get(path, 1), step + 1)
            own_optimizer.update(own, own_slots, own_grads, info)
        arenas = (params, *slots.values())
        before = [arena.flat.copy() for arena in arenas]
        handed = [arena.snapshot() for arena in arenas] if step not in (2, 5) else []
        for arena in arenas if handed else ():
            update_target(arena).fill(np.nan)
        optimizer.update(params, slots, grads, UpdateInfo(RATE(step), step + 1))
        assert all(same_bits(arena.flat, was) for arena, was in zip(handed, before, strict=False))
    for path, (_, own, own_slots) in alone.items():
        if path in FROZEN:
            assert same_bits(params[path], first[path])
            assert not any(slot[path].any() for slot in slots.values())
            continue
        assert same_bits(params[path], own[path])
        assert not same_bits(params[path], first[path])
        assert all(same_bits(slots[slot][path], own_slots[slot][path]) for slot in slots)


@pytest.mark.training
@pytest.mark.parametrize("case", ["momentum, clipped and decayed", "adamw, clipped"])
def test_the_number_of_threads_changes_no_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "THREADED", THREADED)
    optimizer = grouped(CASES[case][0])
    shapes = {**SHAPES, "embedding/weight": (THREADED // 2, 2), "head/weight": (BLOCK + 9, 2)}
    found = []
    for threads in (1, 2, 3):
        params, slots = start(optimizer, shapes, "float32")
        for step, grads in enumerate(gradients(params, 2)):
            info = UpdateInfo(RATE(step), step + 1)
            optimizer.update(params, slots, grads, info, threads=threads)
        found.append([params.flat.tobytes(), *(slot.flat.tobytes() for slot in slots.values())])
    assert found[0] == found[1] == found[2]


def test_frozen_parameters_keep_bits_that_no_arithmetic_keeps() -> None:
    optimizer = SGD(learning_rate=Constant(value=0.1), weight_decay=0.1, frozen=("a",))
    params = Arena({"a": (3,), "b": (3,)}, "float32")
    params.flat.view(np.uint32)[:3] = (0x80000000, 0x7FC00001, 0x00000001)
    before = params.flat[:3].view(np.uint32).copy()
    read_only = params.to_read_only(copy=False)
    for _ in range(2):  # in place, then out of place
        grads = params.like()
        grads["a"] = np.inf
        grads["b"] = 1
        optimizer.update(read_only, {}, grads, UpdateInfo(0.1, 1))
        read_only.snapshot()
    assert (read_only["a"].view(np.uint32) == before).all()
    assert (read_only["b"] < -0.19).all()


def test_the_gradient_of_frozen_parameters_does_not_count_in_the_norm() -> None:
    optimizer = SGD(learning_rate=Constant(value=1.0), clip_norm=5.0, frozen=("a",))
    params = Arena({"a": (3,), "b": (2,)}, "float64")
    grads = params.like()
    grads["a"] = 1e6
    grads["b"] = [6, 8]
    optimizer.update(params, {}, grads, UpdateInfo(1.0, 1))
    np.testing.assert_allclose(params["b"], [-3, -4], rtol=1e-15)


def test_a_user_s_optimizer_has_groups_too() -> None:
    optimizer = Counting(
        learning_rate=Constant(value=0.5), learning_rate_multipliers={"a": 2.0}, frozen=("c",)
    )
    params, slots = start(optimizer, {"a": (3,), "b": (3,), "c": (3,)})
    first = {path: view.copy() for path, view in params.items()}
    grads = params.like()
    grads.flat.fill(1)
    optimizer.update(params, slots, grads, UpdateInfo(0.5, 1))
    np.testing.assert_allclose(params["a"], first["a"] - 1)
    np.testing.assert_allclose(params["b"], first["b"] - 0.5)
    assert same_bits(params["c"], first["c"])
    assert [slots["count"][path][0] for path in params] == [1, 1, 0]


def test_neighbours_with_equal_settings_are_one_slice() -> None:
    layout = spans(SHAPES, "float32")
    total = layout["head/bias"].stop
    whole = SGD(learning_rate=RATE, weight_decay={"default": 0.1, "*": 0.1})
    assert [part[:2] for part in whole.group_slices(layout)] == [(0, total)]
    optimizer = SGD(learning_rate=RATE, learning_rate_multipliers={"head/*": 10.0})
    head = layout["head/weight"].start
    assert optimizer.group_slices(layout) == [
        (0, head, Setting(0.0, 1.0, False)),
        (head, total, Setting(0.0, 10.0, False)),
    ]


@pytest.mark.parametrize("pattern", ["head/*", "h*", "*ead/?eight", "head/weight", "head/[vw]*"])
def test_patterns_match_as_in_a_shell(pattern: str) -> None:
    found = settings_by_path(SHAPES, 0.0, {pattern: 2.0}, ())
    assert found["head/weight"].learning_rate_multiplier == 2
    assert found["dense0/weight"].learning_rate_multiplier == 1


# --- whole runs


def test_each_row_has_the_rate_without_multipliers_and_the_norm_of_what_is_trained() -> None:
    config = make_config(optimizer=RUN, log={"every": 1, "norms": True})
    assembly = assemble(config)
    gradient, _ = assembly.task.gradient(assembly.state, assembly.training.batch(0))  # type: ignore[attr-defined]
    trained = [view.astype(float) for path, view in gradient.items() if path != "dense0/weight"]
    norm = math.sqrt(sum(float((g**2).sum()) for g in trained))
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    metrics = trainer.step()
    assert metrics["learning_rate"] == 0.01
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.training
def test_equal_values_for_all_patterns_give_the_bits_of_the_plain_number(tmp_path: Path) -> None:
    plain = {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    by_pattern = {
        **plain,
        "weight_decay": {"default": 0.1, "*/bias": 0.1},
        "learning_rate_multipliers": {"*/bias": 1.0},
    }
    expected = train(make_config(optimizer=plain), tmp_path / "plain")
    found = train(make_config(optimizer=by_pattern), tmp_path / "patterns")
    assert found.same_bits(expected)
    assert rows(tmp_path / "patterns") == rows(tmp_path / "plain")


@pytest.mark.training
def test_groups_replay_fork_and_thaw_exactly(tmp_path: Path) -> None:
    """What was frozen is trained after a change that is allowed, from the slots of the start."""
    path = tmp_path / "run"
    config = make_config(optimizer=RUN, checkpoint={"every": 10, "keep_last": None})
    state = train(config, path)
    first = assemble(config).state.params["dense0/weight"]
    assert same_bits(state.params["dense0/weight"], first)
    replayed = list(replay(read_records(RunDirectory(path)), 0, 40, silent))
    assert [step for step, _ in replayed] == [10, 20, 30, 40]
    assert not any(differences for _, differences in replayed)
    with pytest.raises(ConfigError, match=r"optimizer\.frozen: \['dense0/weight'\] -> \[\]"):
        resume(path, last_step=50, assignments=("optimizer.frozen=[]",))
    forked(path, tmp_path / "fork", 20)
    assert resume(tmp_path / "fork", last_step=40).same_bits(state)
    thawed = {"assignments": ("optimizer.frozen=[]",), "allow_change": ("optimizer.frozen",)}
    after = resume(path, last_step=50, **thawed)
    assert not same_bits(after.params["dense0/weight"], first)


# --- bad input


def changed(assignment: str) -> None:
    """Check a config in which a key is changed."""
    document = yaml.loads(yaml.dumps(make_config().plain()), "c.yaml")
    document.set(assignment)
    parse_config(document)


@pytest.mark.parametrize(
    "assignment",
    [
        "weight_decay=-1",
        "weight_decay=x",
        "weight_decay=[1]",
        "weight_decay=.nan",
        "weight_decay=null",
        "weight_decay={default: -1}",
        "weight_decay={default: x}",
        "weight_decay={default: .nan}",
        "weight_decay={default: 1, '*/bias': [0]}",
        "weight_decay={'*/bias': 0}",
        "weight_decay={default: 1, '': 0}",
        "learning_rate_multipliers=3",
        "learning_rate_multipliers={'*/bias': -1}",
        "learning_rate_multipliers={'*/bias': .inf}",
        "learning_rate_multipliers={'': 1}",
        "frozen='*/bias'",
        "frozen=[3]",
        "frozen=['']",
        "frozen={dense0: true}",
        "froze=['*/bias']",
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(assignment: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(f"optimizer.{assignment}")
    message = str(caught.value)
    assert "\n" not in message
    assert message == snapshot


@pytest.mark.parametrize(
    "groups",
    [
        {"weight_decay": {"default": 0.1, "dense0/biass": 0.0}},
        {"weight_decay": {"default": 0.1, "*/bias": 0.0, "dense0/*": 0.2}},
        {"learning_rate_multipliers": {"head/*": 10.0}},
        {"learning_rate_multipliers": {"*/bias": 2.0, "dense0/*": 3.0}},
        {"frozen": ["encoder/*"]},
        {"frozen": ["*/weight", "*/bias"]},
    ],
    ids=str,
)
def test_patterns_that_do_not_fit_the_model_are_refused(
    groups: dict[str, Any], snapshot: SnapshotAssertion
) -> None:
    config = make_config(optimizer={"name": "sgd", "learning_rate": 0.1, **groups})
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    message = str(caught.value)
    assert message.startswith("optimizer.")
    assert "\n" not in message
    assert message == snapshot


def test_patterns_that_give_a_parameter_the_same_value_may_overlap() -> None:
    multipliers = {"*/bias": 2.0, "dense0/*": 2.0}
    found = settings_by_path(SHAPES, 0.0, multipliers, ("*/bias", "dense0/*"))
    assert found["dense0/bias"] == (0.0, 2.0, True)


def test_the_paths_in_a_message_are_cut_if_there_are_many() -> None:
    paths = [f"block{number}/attention/weight" for number in range(1000)]
    with pytest.raises(ConfigError) as caught:
        settings_by_path(paths, 0.0, None, ("encoder/*",))
    assert len(str(caught.value)) < 800
