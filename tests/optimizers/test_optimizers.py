"""Optimizers follow their published formulas, for every split into blocks, threads and output arenas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepctl import optimizers
from stepctl.config import registry
from stepctl.optimizers import base
from stepctl.optimizers.adagrad import Adagrad
from stepctl.optimizers.adam import Adam, AdamW
from stepctl.optimizers.base import BLOCK, Optimizer, UpdateInfo, global_norm
from stepctl.optimizers.rmsprop import RMSProp
from stepctl.optimizers.schedules import Constant, Cosine
from stepctl.optimizers.sgd import SGD
from stepctl.state.arena import Arena, Array, same_bits, update_target
from stepctl.system import blas
from stepctl.training.build import assemble
from stepctl.training.trainer import Trainer
from tests.support.runs import make_config

Arrays = dict[str, Array]
# (parameters, gradient, memory, rate, number of the update) -> new parameters; `memory` starts empty.
Textbook = Callable[[Array, Array, Arrays, float, int], Array]

RATE = Cosine(peak=0.03, decay_steps=150, warmup_steps=30)
# Two blocks, the last one not full, and gaps after two of the arrays.
SHAPES = {"dense0/weight": (BLOCK // 2 + 3, 2), "dense0/bias": (5,), "dense1/weight": (64, 3)}


THREADED = BLOCK  # elements that are worth a second thread, in these tests


@pytest.fixture(autouse=True)
def one_blas_thread() -> None:
    blas.set_threads(1)


def sgd(p: Array, g: Array, memory: Arrays, rate: float, t: int) -> Array:
    return p - rate * g


def momentum(p: Array, g: Array, memory: Arrays, rate: float, t: int) -> Array:
    memory["v"] = 0.9 * memory.get("v", 0) + g
    return p - rate * memory["v"]


def nesterov(p: Array, g: Array, memory: Arrays, rate: float, t: int) -> Array:
    memory["v"] = 0.9 * memory.get("v", 0) + g
    return p - rate * (g + 0.9 * memory["v"])


def adagrad(epsilon: float) -> Textbook:
    def update(p: Array, g: Array, memory: Arrays, rate: float, t: int) -> Array:
        memory["sum"] = memory.get("sum", 0) + g**2
        return p - rate * g / (memory["sum"] ** 0.5 + epsilon)

    return update


def rmsprop(decay_rate: float, epsilon: float) -> Textbook:
    def update(p: Array, g: Array, memory: Arrays, rate: float, t: int) -> Array:
        memory["mean"] = decay_rate * memory.get("mean", 0) + (1 - decay_rate) * g**2
        return p - rate * g / (memory["mean"] ** 0.5 + epsilon)

    return update


def adam(beta1: float, beta2: float, epsilon: float, decoupled: float = 0) -> Textbook:
    def update(p: Array, g: Array, memory: Arrays, rate: float, t: int) -> Array:
        memory["m"] = beta1 * memory.get("m", 0) + (1 - beta1) * g
        memory["v"] = beta2 * memory.get("v", 0) + (1 - beta2) * g**2
        m, v = memory["m"] / (1 - beta1**t), memory["v"] / (1 - beta2**t)
        return p - rate * (m / (v**0.5 + epsilon) + decoupled * p)

    return update


CASES: dict[str, tuple[Optimizer, Textbook]] = {
    "sgd": (SGD(learning_rate=RATE), sgd),
    "sgd, decayed": (SGD(learning_rate=RATE, weight_decay=0.1), sgd),
    "sgd, clipped": (SGD(learning_rate=RATE, clip_norm=1.0), sgd),
    "momentum": (SGD(learning_rate=RATE, momentum=0.9), momentum),
    "momentum, clipped and decayed": (
        SGD(learning_rate=RATE, momentum=0.9, clip_norm=1.0, weight_decay=0.1),
        momentum,
    ),
    "nesterov": (SGD(learning_rate=RATE, momentum=0.9, nesterov=True), nesterov),
    "nesterov, decayed": (
        SGD(learning_rate=RATE, momentum=0.9, nesterov=True, weight_decay=0.1),
        nesterov,
    ),
    "adagrad": (Adagrad(learning_rate=RATE), adagrad(1e-10)),
    "adagrad, large epsilon": (Adagrad(learning_rate=RATE, epsilon=0.1), adagrad(0.1)),
    "rmsprop": (RMSProp(learning_rate=RATE), rmsprop(0.9, 1e-8)),
    "rmsprop, clipped and decayed": (
        RMSProp(learning_rate=RATE, decay_rate=0.99, epsilon=0.1, clip_norm=1.0, weight_decay=0.1),
        rmsprop(0.99, 0.1),
    ),
    "adam": (Adam(learning_rate=RATE), adam(0.9, 0.999, 1e-8)),
    "adam, other constants": (
        Adam(learning_rate=RATE, beta1=0.5, beta2=0.8, epsilon=0.1),
        adam(0.5, 0.8, 0.1),
    ),
    "adam, decayed": (Adam(learning_rate=RATE, weight_decay=0.1), adam(0.9, 0.999, 1e-8)),
    "adamw": (AdamW(learning_rate=RATE), adam(0.9, 0.999, 1e-8, decoupled=0.01)),
    "adamw, clipped": (
        AdamW(learning_rate=RATE, epsilon=0.1, weight_decay=0.3, clip_norm=1.0),
        adam(0.9, 0.999, 0.1, decoupled=0.3),
    ),
}


def start(
    optimizer: Optimizer, shapes: dict[str, Any] = SHAPES, dtype: str = "float64"
) -> tuple[Arena, dict[str, Arena]]:
    params, random = Arena(shapes, dtype), np.random.default_rng(0)
    for view in params.values():
        view[...] = random.normal(size=view.shape)
    slots = {
        slot: arena.to_read_only(copy=False)
        for slot, arena in optimizer.initial_slots(params).items()
    }
    return params.to_read_only(copy=False), slots


def gradients(params: Arena, n: int) -> Iterator[Arena]:
    """Yield n gradients: in turn of a norm far below and far above the clip norm of 1."""
    random = np.random.default_rng(1)
    for t in range(n):
        grads = params.like()
        for view in grads.values():
            view[...] = random.normal(size=view.shape) * (
                10.0 if t % 2 else 0.1 / math.sqrt(params.n_elements)
            )
        yield grads


def textbook_gradient(optimizer: Optimizer, params: Arrays, grads: Arrays) -> Arrays:
    """Return the gradients clipped to the norm over all of them, then with their weight decay."""
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    if optimizer.clip_norm is not None and norm > optimizer.clip_norm:
        grads = {name: g * (optimizer.clip_norm / norm) for name, g in grads.items()}
    if isinstance(optimizer, AdamW):
        return grads
    return {name: g + optimizer.weight_decay * params[name] for name, g in grads.items()}


def test_the_table_holds_every_optimizer() -> None:
    known = {registry.resolve("optimizer", name) for name in optimizers.NAMES}
    assert {type(optimizer) for optimizer, _ in CASES.values()} == known


@pytest.mark.training
@pytest.mark.parametrize("case", CASES)
def test_forty_steps_are_the_textbooks(case: str) -> None:
    optimizer, textbook = CASES[case]
    params, slots = start(optimizer)
    expected: Arrays = {name: view.copy() for name, view in params.items()}
    memories: dict[str, Arrays] = {name: {} for name in params}
    for step, grads in enumerate(gradients(params, 40)):
        expected_grads = textbook_gradient(
            optimizer, expected, {name: g.copy() for name, g in grads.items()}
        )
        for name, g in expected_grads.items():
            expected[name] = textbook(expected[name], g, memories[name], RATE(step), step + 1)
        optimizer.update(params, slots, grads, UpdateInfo(optimizer.learning_rate(step), step + 1))
    for name, view in params.items():
        # 40 steps of a few roundings of 1e-16 each; any other formula is off by far more than 1e-10
        np.testing.assert_allclose(view, expected[name], rtol=1e-10, atol=1e-13)
        for slot, value in zip(optimizer.slots, memories[name].values(), strict=True):
            np.testing.assert_allclose(slots[slot][name], value, rtol=1e-10, atol=1e-13)


def quadratic(p: Array) -> Array:
    """Return the gradient of sum(c p^2) / 2 with curvatures 1..6."""
    return np.arange(1, 7) * p


@pytest.mark.parametrize("name", ["polyak", "sutskever"])
def test_momentum_at_a_constant_rate_follows_its_paper(name: str) -> None:
    """Polyak's heavy ball, and Sutskever's velocity, whose look-ahead points are our parameters."""
    rate, mu = 0.05, 0.9
    optimizer = SGD(learning_rate=Constant(value=rate), momentum=mu, nesterov=name == "sutskever")
    params, slots = start(optimizer, {"p": (6,)})
    theta, before, velocity = params["p"].copy(), params["p"].copy(), np.zeros(6)
    for step in range(50):
        if name == "polyak":
            theta, before = theta - rate * quadratic(theta) + mu * (theta - before), theta
        else:
            velocity = mu * velocity - rate * quadratic(theta + mu * velocity)
            theta = theta + velocity
        grads = params.like()
        grads["p"][:] = quadratic(params["p"])
        optimizer.update(params, slots, grads, UpdateInfo(rate, step + 1))
        np.testing.assert_allclose(params["p"], theta + mu * velocity, rtol=1e-10, atol=1e-13)


@pytest.mark.training
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_out_of_place_has_the_same_bits_and_leaves_the_old_ones_alone(
    case: str, dtype: str
) -> None:
    optimizer = CASES[case][0]
    params, slots = start(optimizer, dtype=dtype)
    old, old_slots = start(optimizer, dtype=dtype)
    arenas = (old, *old_slots.values())
    for step, grads in enumerate(gradients(params, 6)):
        same, before = params.like(), [arena.flat.copy() for arena in arenas]
        same.copy_from(grads)
        out_of_place = step not in (2, 5)
        handed = [arena.snapshot() for arena in arenas] if out_of_place else []
        for arena in arenas if out_of_place else ():
            update_target(arena).fill(np.nan)  # what the spare memory held before must not matter
        info = UpdateInfo(RATE(step), step + 1)
        optimizer.update(params, slots, grads, info)
        optimizer.update(old, old_slots, same, info)
        assert all(same_bits(arena.flat, was) for arena, was in zip(handed, before, strict=False))
        assert not any(arena.in_snapshot for arena in arenas)
        assert same_bits(params.flat, old.flat)
        assert all(same_bits(slots[name].flat, old_slots[name].flat) for name in optimizer.slots)


@pytest.mark.training
@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_no_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "THREADED", THREADED)
    optimizer, found = CASES[case][0], []
    shapes = {"weight": (THREADED + 3 * BLOCK, 1), "bias": (77,)}
    for threads in (1, 2, 3):
        params, slots = start(optimizer, shapes, "float32")
        assert len(params.flat) > THREADED
        assert len(params.flat) % BLOCK
        first = params.flat.copy()
        for step, grads in enumerate(gradients(params, 2)):
            optimizer.update(
                params, slots, grads, UpdateInfo(RATE(step), step + 1), threads=threads
            )
        assert (params["weight"] != first[: params["weight"].size, None]).mean() > 0.9
        found.append([params.flat.tobytes(), *(slot.flat.tobytes() for slot in slots.values())])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("case", CASES)
def test_the_gaps_of_the_arenas_stay_zero(case: str) -> None:
    optimizer = CASES[case][0]
    params, slots = start(optimizer, dtype="float32")
    taken = params.like()
    for view in taken.values():
        view.fill(1)
    gaps = taken.flat == 0
    assert gaps.any()
    for step, grads in enumerate(gradients(params, 5)):
        optimizer.update(params, slots, grads, UpdateInfo(RATE(step), step + 1))
    for arena in (params, *slots.values()):
        assert arena.flat[gaps].tobytes() == bytes(arena.flat[gaps].nbytes)
        assert arena.flat[~gaps].all()


def test_the_norm_covers_all_arrays() -> None:
    arena = Arena({"a": (2,), "b": (BLOCK, 2)}, "float64")
    arena["a"][:], arena["b"][-1] = (3, 4), (0, 12)
    assert global_norm(arena) == 13


@pytest.mark.training
@pytest.mark.parametrize("initial_step", [0, 5])
def test_the_first_update_uses_the_rate_of_the_initial_step(initial_step: int) -> None:
    rate = {"name": "piecewise_constant", "boundaries": [initial_step + 1], "values": [0.0, 0.1]}
    config = make_config(
        optimizer={"name": "sgd", "learning_rate": rate}, initial_step=initial_step
    )
    assembly = assemble(config)
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    flats, rates = [assembly.state.params.flat.copy()], []
    for _ in range(2):
        rates.append(trainer.step()["learning_rate"])
        flats.append(assembly.state.params.flat.copy())
    assert rates == [0.0, 0.1]
    assert same_bits(flats[0], flats[1])
    assert not same_bits(flats[1], flats[2])


def test_the_norm_of_a_huge_gradient_is_finite_and_clips() -> None:
    grads = Arena({"w": (3,)}, "float32")
    grads["w"] = [3e30, 0, 4e30]
    assert global_norm(grads) == pytest.approx(5e30, rel=1e-6)
    grads["w"] = [np.inf, 0, 1]
    assert global_norm(grads) == np.inf
