"""The training step: no allocation after the first, the same gradient for any shards, one counter update."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepctl
from stepctl.optimizers.base import Optimizer, UpdateInfo
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array
from stepctl.state.counters import Counters
from stepctl.training import build as assemblies
from stepctl.training.assembly import Assembly
from stepctl.training.trainer import Trainer
from tests.support.runs import make_config, most_allocated, resume, train


def write(tmp_path: Path, **arrays: Array) -> str:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return str(path)


def assemble(path: str, *, batch_size: int, shards: int = 1, **sections: Any) -> Assembly:
    data = {"name": "arrays", "path": path, "batch_size": batch_size, "shards": shards}
    return assemblies.assemble(make_config(**{"evaluate": {}, "data": data, **sections}))


BATCH, WIDTH, CLASSES = 2048, 256, 128
MODELS: dict[str, dict[str, Any]] = {
    "relu": {},
    "dropout, gelu, layer norm": {"activation": "gelu", "layer_norm": True, "dropout": 0.1},
    "batch norm": {"batch_norm": True},
}


@pytest.fixture(scope="module")
def many_samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    random = np.random.default_rng(0)
    x, y = (
        random.normal(size=(BATCH + 100, CLASSES)).astype("f4"),
        random.integers(0, CLASSES, BATCH + 100),
    )
    return write(tmp_path_factory.mktemp("many"), x=x, y=y)


@pytest.mark.training
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_after_the_first_a_step_allocates_no_array_larger_than_the_labels(
    name: str, shards: int, many_samples: str
) -> None:
    model = {"name": "mlp", "hidden": [WIDTH], **MODELS[name]}
    optimizer = {"name": "adamw", "learning_rate": 0.01, "clip_norm": 0.1}
    assembly = assemble(
        many_samples, batch_size=BATCH, shards=shards, model=model, optimizer=optimizer
    )
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    trainer.step()
    labels = BATCH * 8
    # all live together: what is as large as the labels (indices and values of the label's logit), NumPy's own
    # buffer for a ufunc that casts, and Python objects
    bound = 2 * labels + np.getbufsize() * 4 + 16 * 1024
    # whatever has a value for each weight, or a byte for each row and feature of a shard, would break it alone
    assert bound < min(CLASSES * WIDTH * 4, BATCH // shards * min(WIDTH, CLASSES * 4))
    # steps 2 to 9; the first of every 32 steps also looks up its successors' rows
    assert most_allocated(trainer, steps=8) < bound


def gradient(path: str, shards: int, task: str) -> tuple[Array, Metrics]:
    """Return what one SGD step at rate 1 subtracts from the parameters, and the step's metrics."""
    assembly = assemble(
        path,
        batch_size=48,
        shards=shards,
        dtype="float64",
        model={"name": "mlp", "hidden": [16, 8], "layer_norm": True},
        optimizer={"name": "sgd", "learning_rate": 1.0},
        task={"name": task},
    )
    before = assembly.state.params.flat.copy()
    metrics = Trainer(assembly.task, assembly.training, assembly.state, stop=[]).step()
    return before - assembly.state.params.flat, metrics


@pytest.mark.training
@pytest.mark.parametrize("task", ["classification", "binary_classification", "regression"])
def test_any_number_of_shards_gives_nearly_the_same_gradient_and_metrics(
    task: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(3)
    path = write(tmp_path, x=random.normal(size=(90, 5)), y=np.arange(90) % 2)
    whole, metrics = gradient(path, 1, task)
    assert np.abs(whole).max() > 1e-3
    for shards in (2, 4):
        parts, part_metrics = gradient(path, shards, task)
        np.testing.assert_allclose(
            parts, whole, rtol=1e-9, atol=1e-14
        )  # float64 sums in another order
        assert part_metrics == pytest.approx(metrics, rel=1e-12)


@pytest.mark.training
def test_a_linear_model_converges_to_the_least_squares_answer(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, noise = random.normal(size=(64, 3)), random.normal(size=(64, 2))
    y = x @ random.normal(size=(3, 2)) + 0.7 + noise
    config = make_config(
        dtype="float64",
        data={"name": "arrays", "path": write(tmp_path, x=x, y=y), "batch_size": 64, "shards": 2},
        model={"name": "linear"},
        task={"name": "regression"},
        optimizer={"name": "sgd", "learning_rate": 0.5},
        stop={"last_step": 200},
        evaluate={},
    )
    params = train(config, tmp_path / "run").params
    answer, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(64)]), y, rcond=None)
    found = np.vstack([params["dense0/weight"], params["dense0/bias"]])
    np.testing.assert_allclose(found, answer, rtol=1e-9)


START = {"global_step": 3, "samples_seen": 30, "model": 3}


@pytest.mark.training
def test_only_the_trainer_advances_counters() -> None:
    package = Path(stepctl.__path__[0])
    users = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "advance"
    ]
    assert set(users) == {"training/trainer.py"}


def test_counters_have_no_setter() -> None:
    counters: Any = Counters(START)
    public = {name for name in dir(Counters) if not name.startswith("_")} - set(dir(Mapping))
    assert public == {"global_step", "samples_seen", "advance", "previous"}
    with pytest.raises(TypeError):
        counters["model"] = 0
    with pytest.raises(TypeError):
        del counters["model"]
    for name in ("global_step", "samples_seen"):
        with pytest.raises(AttributeError):
            setattr(counters, name, 0)
    assert dict(counters) == START


def test_counters_keep_values_of_their_own() -> None:
    values = dict(START)
    counters = Counters(values)
    values["model"] = 99
    assert counters["model"] == 3


@pytest.mark.parametrize("name", START)
@pytest.mark.parametrize("value", [-1, 2**63])
def test_a_counter_outside_its_range_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"counter '{name}' is {value}: outside 0\.\.2\^63-1"):
        Counters({**START, name: value})


@pytest.mark.parametrize("name", ["global_step", "samples_seen"])
def test_a_missing_counter_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"counter '{name}' is missing"):
        Counters({other: value for other, value in START.items() if other != name})


def test_every_counter_rises_once_after_each_complete_update(tmp_path: Path) -> None:
    path = write(tmp_path, x=np.ones((10, 3)), y=np.arange(10) % 2)
    assembly = assemble(path, batch_size=4, initial_step=5)
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    counters = assembly.state.counters
    assert dict(counters) == {"global_step": 5, "samples_seen": 0, "model": 0}
    for updates in range(1, 4):
        trainer.step()
        assert dict(counters) == {
            "global_step": 5 + updates,
            "samples_seen": 4 * updates,
            "model": updates,
        }


def test_an_update_that_fails_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, x=np.ones((10, 3)), y=np.arange(10) % 2)
    assembly = assemble(path, batch_size=4)

    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(assembly.task.learners["model"].optimizer), "update", fail)
    with pytest.raises(MemoryError):
        Trainer(assembly.task, assembly.training, assembly.state, stop=[]).step()
    assert set(assembly.state.counters.values()) == {0}


def test_counters_only_grow_and_all_at_once() -> None:
    counters = Counters({"global_step": 1, "samples_seen": 2})
    with pytest.raises(ValueError, match="cannot increase"):
        counters.advance({"samples_seen": 1, "global_step": -1})
    with pytest.raises(KeyError):
        counters.advance({"samples_seen": 1, "unknown": 1})
    assert dict(counters) == {"global_step": 1, "samples_seen": 2}


@pytest.mark.training
def test_an_optimizer_counts_its_own_updates_on_through_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    update = Optimizer.update

    def spy(
        self: Optimizer, params: Any, slots: Any, grads: Any, info: UpdateInfo, **options: Any
    ) -> None:
        if "dense0/weight" in params:
            numbers.append(info.number)
        update(self, params, slots, grads, info, **options)

    monkeypatch.setattr(Optimizer, "update", spy)
    train(make_config(initial_step=5, stop={"last_step": 8}), tmp_path / "run")
    resume(tmp_path / "run", last_step=10)
    assert numbers == [1, 2, 3, 4, 5]
