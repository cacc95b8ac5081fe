"""Batch normalisation: textbook values, exact resume of its buffers, and the same bits on all ranks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import Config
from stepctl.errors import ConfigError, Exit
from stepctl.models.layers.batch_norm import BatchNorm
from stepctl.optimizers.base import Optimizer
from stepctl.state.arena import Arena, Array, same_bits, update_target, update_views
from stepctl.state.workspace import Workspace
from stepctl.training.assembly import Assembly
from stepctl.training.build import prepare
from stepctl.training.trainer import Trainer
from tests.support.mpi_jobs import job
from tests.support.runs import BASE, content, make_config, resume, rows, train
from tests.support.stops import some_stops

LAST = 20
MLP = {"name": "mlp", "hidden": [12, 8], "batch_norm": True, "dropout": 0.1}
LAYER = BatchNorm(name="norm", n_features=3, momentum=0.2, epsilon=0.01)


def config(shards: int = 1, **sections: Any) -> Config:
    data = {**BASE["data"], "shards": shards}
    return make_config(
        **{"data": data, "model": MLP, "stop": {"last_step": LAST}, "evaluate": {"every": 5}}
        | sections
    )


def layer_arenas() -> tuple[Arena, Arena]:
    """Return parameters and buffers of LAYER, of any values."""
    random = np.random.default_rng(1)
    params, buffers = (
        Arena(LAYER.parameter_shapes(), "float64"),
        Arena(LAYER.buffer_shapes(), "float64"),
    )
    for array in (*params.values(), *buffers.values()):
        array[:] = random.uniform(0.5, 2, array.shape)
    return params, buffers


def column_statistics(x: Array, ddof: int) -> tuple[list[float], list[float]]:
    """Return mean and variance of each column, one number after another."""
    means, variances = [], []
    for column in x.T.tolist():
        means.append(math.fsum(column) / len(column))
        variances.append(
            math.fsum((value - means[-1]) ** 2 for value in column) / (len(column) - ddof)
        )
    return means, variances


def expected(x: Array, params: Arena, means: Any, variances: Any) -> list[list[float]]:
    scale, shift = params["norm/scale"], params["norm/shift"]
    return [
        [
            float(scale[j] * (row[j] - means[j]) / math.sqrt(variances[j] + 0.01) + shift[j])
            for j in range(3)
        ]
        for row in x
    ]


# --- the layer


def test_training_normalises_by_the_rows_and_their_biased_variance() -> None:
    (params, buffers), x = layer_arenas(), np.random.default_rng(0).normal(3, 2, (7, 3))
    workspace, before = Workspace("float64"), buffers.flat.copy()
    workspace.start(buffers=buffers, new_buffers=buffers.like())
    y, _ = LAYER.forward(params, x, workspace)
    np.testing.assert_allclose(y, expected(x, params, *column_statistics(x, ddof=0)), rtol=1e-12)
    assert np.array_equal(buffers.flat, before)


def test_the_new_buffers_take_in_the_momentum_of_mean_and_unbiased_variance() -> None:
    (params, buffers), x = layer_arenas(), np.random.default_rng(0).normal(3, 2, (7, 3))
    workspace, new = Workspace("float64"), buffers.like()
    workspace.start(buffers=buffers, new_buffers=new)
    LAYER.forward(params, x, workspace)
    for name, found in zip(
        ("norm/mean", "norm/variance"), column_statistics(x, ddof=1), strict=True
    ):
        np.testing.assert_allclose(
            new[name], 0.8 * buffers[name] + 0.2 * np.array(found), rtol=1e-12
        )


def test_inference_normalises_by_the_buffers_alone() -> None:
    (params, buffers), x = layer_arenas(), np.random.default_rng(0).normal(3, 2, (7, 3))
    workspace = Workspace("float64")
    for part in (x, x[:3], x[4:5]):
        workspace.start(buffers=buffers)
        y, _ = LAYER.forward(params, part, workspace)
        np.testing.assert_allclose(
            y, expected(part, params, buffers["norm/mean"], buffers["norm/variance"]), rtol=1e-12
        )


def test_the_gradient_in_inference_agrees_with_central_differences() -> None:
    (params, buffers), random = layer_arenas(), np.random.default_rng(0)
    x, dy, h = random.normal(size=(5, 3)), random.normal(size=(5, 3)), 1e-6
    workspace, grads = Workspace("float64"), params.like()

    def loss() -> float:
        workspace.start(buffers=buffers)
        return float(np.vdot(dy, LAYER.forward(params, x, workspace)[0]))

    workspace.start(buffers=buffers)
    dx = LAYER.forward(params, x, workspace)[1](dy.copy(), grads)
    assert dx is not None
    dx = dx.copy()
    for array, gradient in ((x, dx), *((params[name], grads[name]) for name in params)):
        for at in np.ndindex(array.shape):
            middle = array[at]
            array[at] = middle + h
            above = loss()
            array[at] = middle - h
            below = loss()
            array[at] = middle
            assert gradient[at] == pytest.approx((above - below) / (2 * h), rel=1e-7, abs=1e-8)


def test_it_starts_as_the_identity_of_inference() -> None:
    params, buffers = layer_arenas()
    LAYER.initialize(params, np.random.default_rng)  # type: ignore[arg-type]
    LAYER.initialize_buffers(buffers)
    assert buffers["norm/mean"].tolist() == [0, 0, 0]
    assert buffers["norm/variance"].tolist() == params["norm/scale"].tolist() == [1, 1, 1]
    assert not params["norm/shift"].any()


# --- training


@pytest.mark.training
@pytest.mark.parametrize("shards", [1, 4])
def test_the_running_statistics_equal_a_plain_loop_over_steps_and_shards(
    shards: int,
) -> None:
    assembly = prepare(
        config(shards, dtype="float64", model={**MLP, "hidden": [5], "dropout": 0.0})
    )
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    mean, variance = np.zeros(5), np.ones(5)
    for step in range(6):
        z = assembly.training.batch(48 * step).x @ assembly.state.params["dense0/weight"]
        found = np.array([column_statistics(part, ddof=1) for part in np.split(z, shards)])
        mean, variance = (
            0.9 * mean + 0.1 * found[:, 0].mean(axis=0),
            0.9 * variance + 0.1 * found[:, 1].mean(axis=0),
        )
        trainer.step()
        np.testing.assert_allclose(assembly.state.buffers["batch_norm0/mean"], mean, rtol=1e-10)
        np.testing.assert_allclose(
            assembly.state.buffers["batch_norm0/variance"], variance, rtol=1e-10
        )


def trained(steps: int = 5, **sections: Any) -> Assembly:
    assembly = prepare(config(**sections))
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    for _ in range(steps):
        trainer.step()
    return assembly


@pytest.mark.training
def test_an_evaluation_uses_the_buffers_unchanged() -> None:
    assembly = trained(ema={"decay": 0.5})
    task, state, batch = assembly.task, assembly.state, assembly.training.batch(0)
    before = state.buffers.flat.copy()
    for average in (False, True):
        whole = task.evaluate(state, [batch], average=average)
        single = [type(batch)(batch.x[i : i + 1], batch.y[i : i + 1]) for i in range(len(batch.x))]
        assert task.evaluate(state, single, average=average) == pytest.approx(whole, rel=1e-5)
        assert np.array_equal(state.buffers.flat, before)
        update_views(state.buffers)["batch_norm0/mean"].fill(1)
        assert task.evaluate(state, [batch], average=average)["loss"] != pytest.approx(
            whole["loss"], rel=1e-2
        )
        update_target(state.buffers)[:] = before


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return by shards a run that was never stopped, with a checkpoint of each step."""
    paths = {shards: tmp_path_factory.mktemp("unbroken") / "run" for shards in (1, 4)}
    for shards, path in paths.items():
        train(config(shards, checkpoint={"every": 1, "keep_last": None}), path)
    return paths


@pytest.mark.training
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("stop", some_stops(LAST, every=8))
def test_stopped_at_any_step(
    stop: int, shards: int, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    train(config(shards, stop={"last_step": stop}), tmp_path / "run")
    state = resume(tmp_path / "run", last_step=LAST)
    assert state.same_bits(resume(unbroken[shards]))
    assert rows(tmp_path / "run") == rows(unbroken[shards])
    assert state.buffers.n_elements == 2 * (12 + 8)


@pytest.mark.training
def test_it_learns(tmp_path: Path) -> None:
    data = {**BASE["data"], "validation_fraction": 0.2}
    train(
        config(data=data, model={**MLP, "hidden": [32]}, stop={"last_step": 60}), tmp_path / "run"
    )
    assert [row["accuracy"] for row in rows(tmp_path / "run") if row["kind"] == "eval"][-1] > 0.85


# --- checkpoints, and what reads them


def call(*arguments: object, code: int = Exit.DONE) -> str:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.mark.training
def test_each_checkpoint_holds_the_buffers_of_its_step(unbroken: dict[int, Path]) -> None:
    """Saving goes on while the next step changes them: what a replay computes says what they should be."""
    path = unbroken[4]
    with h5py.File(path / "checkpoints" / "step-00000020.h5") as file:
        assert set(file["buffers"]) == {"batch_norm0", "batch_norm1"}
        found = {name: file[f"buffers/{name}"][()] for name in resume(path).buffers}
    assert all(same_bits(found[name], array) for name, array in resume(path).buffers.items())
    said = call("verify", path, "--replay", f"0:{LAST}")
    assert said.count("bit-identical") == LAST


@pytest.mark.training
def test_inspect_verify_and_diff_take_them(unbroken: dict[int, Path], tmp_path: Path) -> None:
    path = unbroken[1]
    arrays = json.loads(call("inspect", path, "--path", "buffers/*", "--json"))["arrays"]
    assert [array["path"] for array in arrays] == [
        f"buffers/batch_norm{i}/{name}" for i in (0, 1) for name in ("mean", "variance")
    ]
    assert call("verify", path).endswith("run: good\n")
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    assert call("diff", path, copy).endswith("identical\n")
    compared = json.loads(call("diff", path, unbroken[4], "--json", code=Exit.NEGATIVE))["arrays"]
    assert {array["path"]: array["equal"] for array in compared}[
        "buffers/batch_norm0/mean"
    ] is False


def test_a_dry_run_lists_them(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.dumps(config().plain()))
    said = call(
        "train", "--config", tmp_path / "c.yaml", "--run-dir", tmp_path / "run", "--dry-run"
    )
    assert "  batch_norm1/variance     (8,)  buffer\n" in said


# --- a step that fails, and what is refused


@pytest.mark.training
def test_a_batch_that_would_spoil_the_buffers_alone_is_skipped_and_leaves_them(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 3)).astype("f4")
    x[20] = 1e25  # its square is infinite: what is normalised by it is 0, and so are the gradients
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(40) % 2)
    data = {"name": "arrays", "path": str(tmp_path / "data.npz"), "batch_size": 4}
    assembly = prepare(config(data=data, model={**MLP, "hidden": [4], "dropout": 0.0}, evaluate={}))
    state, said = assembly.state, list[str]()
    trainer = Trainer(assembly.task, assembly.training, state, stop=[], skip=said.append)
    skipped = 0
    for _ in range(12):
        before = state.buffers.flat.copy()
        made = trainer.step()
        skipped += made is None
        assert np.array_equal(state.buffers.flat, before) == (made is None)
    assert skipped >= 1
    assert said[0].endswith("first bad array: the new value of buffers/batch_norm0/variance")
    assert state.first_non_finite() is None


@pytest.mark.training
def test_an_update_that_fails_leaves_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = trained(1)
    before = assembly.state.buffers.flat.copy()

    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Optimizer, "update", fail)
    with pytest.raises(MemoryError):
        assembly.task.step(assembly.state, assembly.training.batch(48))
    assert np.array_equal(assembly.state.buffers.flat, before)


CRITIC = {"name": "mlp", "hidden": [4]}
SGD = {"name": "sgd", "learning_rate": 0.1}
HAS = r"the model has buffers \(batch_norm0/mean, \.\.\.\)"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one row in a shard": (
        {"data": {**BASE["data"], "batch_size": 4, "shards": 4}},
        "^model: batch_norm0 needs at least 2 samples per shard, got 1; increase data.batch_size or decrease ",
    ),
    "two norms": (
        {"model": {**MLP, "layer_norm": True}},
        "^model: mlp: layer_norm and batch_norm are both true",
    ),
    "several models": (
        {
            "task": {"name": "wgan", "weight_clip": 0.1},
            "model": {"critic": CRITIC, "generator": {**CRITIC, "batch_norm": True}},
            "optimizer": {"critic": SGD, "generator": SGD},
        },
        f"^model: {HAS}, which the task wgan does not update; remove batch_norm",
    ),
    "asynchronous ranks": (
        {"distributed": {"mode": "async"}},
        f"^distributed.mode: {HAS}, which async ranks would not share; use sync",
    ),
    "a user's buffer that is not written": (
        {"model": {"name": "tests.support.user_model:ForgetsTheMean"}},
        "^model: forward left the new values of the buffers mean unwritten; in training it must write all of them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    sections, line = REFUSED[case]
    with pytest.raises(ConfigError, match=line) as caught:
        prepare(config(**sections))
    assert "\n" not in str(caught.value)


@pytest.mark.training
def test_one_row_is_enough_for_an_evaluation() -> None:
    assembly = trained(1, data={**BASE["data"], "batch_size": 3})
    batch = assembly.training.batch(0)
    assert math.isfinite(
        assembly.task.evaluate(assembly.state, [type(batch)(batch.x[:1], batch.y[:1])])["loss"]
    )


# --- several processes, and a user's own


@pytest.mark.training
@pytest.mark.parametrize("shards", [1, 4])
def test_a_user_s_model_has_buffers_too(shards: int, tmp_path: Path) -> None:
    sections = {"model": {"name": "tests.support.user_model:Centred"}, "dtype": "float64"}
    train(config(shards, **sections, stop={"last_step": 7}), tmp_path / "run")
    state = resume(tmp_path / "run", last_step=LAST)
    assert state.same_bits(train(config(shards, **sections), tmp_path / "unbroken"))
    assembly, mean = prepare(config(shards, **sections)), np.zeros(64)
    for step in range(LAST):
        mean = 0.5 * mean + 0.5 * assembly.training.batch(48 * step).x.mean(axis=0)
    np.testing.assert_allclose(state.buffers["mean"], mean, rtol=1e-12, atol=1e-12)
    assert state.buffers["steps"] == LAST


@pytest.mark.mpi
def test_two_ranks_give_the_bits_of_one_process(unbroken: dict[int, Path], tmp_path: Path) -> None:
    written = config(4, checkpoint={"every": 1, "keep_last": None}).plain()
    (tmp_path / "config.yaml").write_text(yaml.dumps(written))
    done = job(2, "train", "-q", "--config", "config.yaml", "--run-dir", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for path in (unbroken[4] / "checkpoints").iterdir():
        assert content(tmp_path / "run" / "checkpoints" / path.name) == content(path), path.name
    assert rows(tmp_path / "run") == rows(unbroken[4])
