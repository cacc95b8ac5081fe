"""WGAN training: two models, two optimizers, three counters, exact resume and right gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.errors import CheckpointError, ConfigError, NonFiniteError, TornUpdate
from stepctl.programs.shards import ShardFunction
from stepctl.programs.undo import Undo
from stepctl.programs.wgan import WGAN
from stepctl.reports.plan import plan_resume
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import create_run
from stepctl.runs.records import read_records
from stepctl.state.arena import Arena, update_target
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.training.assembly import Assembly
from stepctl.training.build import assemble, prepare
from stepctl.training.trainer import Trainer
from tests.support.messages import without_paths
from tests.support.runs import make_config, most_allocated, resume, rows, train
from tests.support.stops import some_of

LAST = 30
RMSPROP, ADAM = (
    {"name": "rmsprop", "learning_rate": 1e-3},
    {"name": "adam", "learning_rate": 1e-3, "beta1": 0.5},
)
VARIANTS: dict[str, dict[str, Any]] = {
    "weight clipping": {
        "task": {"name": "wgan", "n_critic": 2, "latent": 4, "weight_clip": 0.1},
        "optimizer": {"critic": RMSPROP, "generator": RMSPROP},
    },
    "gradient penalty": {
        "task": {"name": "wgan", "n_critic": 3, "latent": 4, "gradient_penalty": 10},
        "optimizer": {
            "critic": {
                **ADAM,
                "learning_rate": {"name": "cosine", "peak": 1e-3, "counter": "critic"},
                "weight_decay": {"default": 0.1, "*/bias": 0.0},
            },
            "generator": {
                **ADAM,
                "learning_rate_multipliers": {"dense1/*": 3.0},
                "frozen": ["dense0/bias"],
            },
        },
        "data": {"name": "digits", "batch_size": 16, "validation_fraction": 0.9, "shards": 4},
        "ema": {"decay": 0.9, "warmup": True},
        "evaluate": {"every": 4, "ema": True},
        "log": {"every": 3, "means": True, "norms": True},
    },
}


def wgan(variant: str = "weight clipping", **sections: Any) -> Any:
    """Return a small config of this variant."""
    common: dict[str, Any] = {
        "data": {"name": "digits", "batch_size": 16, "validation_fraction": 0.9},
        "model": {
            "critic": {"name": "mlp", "hidden": [12], "activation": "leaky_relu"},
            "generator": {"name": "mlp", "hidden": [8], "output": "sigmoid"},
        },
        "stop": {"last_step": LAST},
        "log": {"every": 3},
        "evaluate": {"every": 7},
    }
    return make_config(**{**common, **VARIANTS[variant], **sections})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainState, Any]]:
    paths = {variant: tmp_path_factory.mktemp("unbroken") / "run" for variant in VARIANTS}
    return {variant: (train(wgan(variant), path), rows(path)) for variant, path in paths.items()}


# with --faults: each phase of each grid (of 3, 4 and 7 steps), and the ends
@pytest.mark.training
@pytest.mark.parametrize("stop", some_of([*range(1, 8), LAST - 1], every=3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_at_any_step(variant: str, stop: int, unbroken: Any, tmp_path: Path) -> None:
    train(wgan(variant, stop={"last_step": stop}, **_horizon(variant)), tmp_path / "run")
    state = resume(tmp_path / "run", last_step=LAST)
    expected, expected_rows = unbroken[variant]
    assert state.same_bits(expected)
    assert rows(tmp_path / "run") == expected_rows


def _horizon(variant: str) -> dict[str, Any]:
    """The decay of the unbroken run, which ends where its counter stands at its target."""
    if variant == "weight clipping":
        return {}
    optimizers = VARIANTS[variant]["optimizer"]
    rate = {**optimizers["critic"]["learning_rate"], "decay_steps": 3 * LAST}
    return {"optimizer": {**optimizers, "critic": {**optimizers["critic"], "learning_rate": rate}}}


@pytest.mark.training
def test_a_step_is_a_cycle_and_each_optimizer_counts_its_own(unbroken: Any) -> None:
    counters = dict(unbroken["gradient penalty"][0].counters)
    assert counters == {
        "global_step": 30,
        "samples_seen": 30 * 3 * 16,
        "critic": 90,
        "generator": 30,
    }


@pytest.mark.training
@pytest.mark.parametrize("n_critic", [1, 5])
def test_with_the_critic_as_the_clock_the_same_updates_are_made(
    n_critic: int, tmp_path: Path
) -> None:
    task = {"name": "wgan", "n_critic": n_critic, "latent": 4, "weight_clip": 0.1}
    cycles = train(wgan(task=task, stop={"last_step": 4}), tmp_path / "cycles")
    steps = train(
        wgan(task={**task, "clock": "critic"}, stop={"last_step": 4 * n_critic}), tmp_path / "steps"
    )
    assert steps.counters.global_step == steps.counters["critic"] == 4 * n_critic
    for folder, arena in cycles.arenas.items():
        assert arena.same_bits(steps.arenas[folder]), folder


@pytest.mark.training
def test_with_the_critic_as_the_clock_a_run_may_stop_between_two_generator_updates(
    tmp_path: Path,
) -> None:
    task = {"name": "wgan", "n_critic": 5, "latent": 4, "weight_clip": 0.1, "clock": "critic"}
    expected = train(wgan(task=task, stop={"last_step": 23}), tmp_path / "unbroken")
    train(wgan(task=task, stop={"last_step": 12}), tmp_path / "run")
    assert resume(tmp_path / "run", last_step=23).same_bits(expected)
    assert (expected.counters["critic"], expected.counters["generator"]) == (23, 4)
    made = [row["step"] for row in rows(tmp_path / "run") if "generator_loss" in row]
    assert made == [15], "the generator's loss stands in the rows of its updates alone"


@pytest.mark.training
def test_a_schedule_may_follow_another_counter(tmp_path: Path) -> None:
    rate = {
        "name": "piecewise_constant",
        "boundaries": [4],
        "values": [1e-3, 1e-4],
        "counter": "critic",
    }
    optimizer = {"critic": {"name": "rmsprop", "learning_rate": rate}, "generator": RMSPROP}
    train(wgan(optimizer=optimizer, stop={"last_step": 4}, log={"every": 1}), tmp_path / "run")
    # two critic updates a step: the second of step 2 is number 4, at count 3
    assert [row["critic_learning_rate"] for row in rows(tmp_path / "run") if row["kind"] == "train"] == [
        1e-3, 1e-3, 1e-4, 1e-4,
    ]  # fmt: skip


@pytest.mark.training
@pytest.mark.parametrize("key", ["log", "evaluate", "checkpoint"])
def test_a_cadence_may_follow_another_counter(key: str, tmp_path: Path) -> None:
    config = wgan(**{key: {"every": 5, "counter": "critic"}}, stop={"last_step": 10})
    train(config, tmp_path / "run")
    passed = [step for step in range(1, 11) if 2 * step // 5 > 2 * (step - 1) // 5]
    assert passed == [3, 5, 8, 10]
    found = {
        "log": [
            row["step"]
            for row in rows(tmp_path / "run")
            if row["kind"] == "train" and row["step"] > 1
        ],
        "evaluate": [row["step"] for row in rows(tmp_path / "run") if row["kind"] == "eval"],
        "checkpoint": [
            int(path.stem[5:]) for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
        ][-3:],
    }
    assert found[key] == (passed[1:] if key == "checkpoint" else passed)


@pytest.mark.training
def test_a_relation_that_changes_on_request_holds_from_there_on(tmp_path: Path) -> None:
    train(wgan(stop={"last_step": 3}), tmp_path / "run")
    changed = {"assignments": ("task.n_critic=3",), "allow_change": ("task.n_critic",)}
    assert resume(tmp_path / "run", last_step=5, **changed).counters["critic"] == 3 * 2 + 2 * 3
    assert resume(tmp_path / "run", last_step=6).counters["critic"] == 3 * 2 + 3 * 3
    planned, _ = plan_resume(
        read_records(RunDirectory(tmp_path / "run")), ResumeOptions(), pytest.fail
    )
    assert planned["steps"] == [6, 6]


def test_counters_that_do_not_belong_together_are_refused(snapshot: SnapshotAssertion) -> None:
    task = prepare(wgan()).task
    task.check_counters(
        Counters({"global_step": 7, "samples_seen": 9, "critic": 10, "generator": 5}), 2
    )
    for wrong in ({"critic": 9}, {"generator": 6}):
        counters = {"global_step": 7, "samples_seen": 9, "critic": 10, "generator": 5} | wrong
        with pytest.raises(CheckpointError) as caught:
            task.check_counters(Counters(counters), 2)
        assert str(caught.value) == snapshot


@pytest.mark.training
def test_the_critic_s_weights_are_kept_small(unbroken: Any) -> None:
    critic = unbroken["weight clipping"][0].arenas["params/critic"]
    assert np.abs(critic.flat).max() == np.float32(0.1)


@pytest.mark.training
def test_frozen_weights_of_the_critic_are_not_clipped(tmp_path: Path) -> None:
    optimizer = {"critic": RMSPROP | {"frozen": ["dense0/weight"]}, "generator": RMSPROP}
    config = wgan(optimizer=optimizer)
    first = assemble(config).state.arenas["params/critic"]["dense0/weight"]
    assert np.abs(first).max() > 0.1
    critic = train(config, tmp_path / "run").arenas["params/critic"]
    assert critic["dense0/weight"].tobytes() == first.tobytes()
    assert np.abs(critic["dense1/weight"]).max() == np.float32(0.1)


def test_a_pattern_is_refused_under_the_key_of_its_optimizer() -> None:
    optimizer = {"critic": RMSPROP, "generator": RMSPROP | {"frozen": ["encoder/*"]}}
    with pytest.raises(ConfigError) as caught:
        prepare(wgan(optimizer=optimizer))
    paths = "dense0/weight, dense0/bias, dense1/weight, dense1/bias"
    assert str(caught.value) == (
        f"optimizer.generator.frozen: 'encoder/*' matches no parameter; there are: {paths}"
    )


# --- a step that fails leaves nothing half done


def test_a_step_that_fails_after_the_critic_s_updates_puts_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assembly = prepare(wgan("gradient penalty"))
    before = {folder: arena.flat.copy() for folder, arena in assembly.state.arenas.items()}
    monkeypatch.setattr(WGAN, "_generator_shards", bad_shards)
    for handed_over in (False, True):
        if handed_over:
            assembly.state.snapshot()
        with pytest.raises(NonFiniteError, match="generator/"):
            assembly.task.step(assembly.state, assembly.training.batch(0))
        assert all(
            np.array_equal(before[folder], arena.flat)
            for folder, arena in assembly.state.arenas.items()
        )


def bad_shards(self: WGAN, *arguments: Any) -> ShardFunction:
    def part(shard: int, at: slice, gradient: Arena, _: Arena) -> dict[str, float]:
        gradient.flat.fill(np.nan)
        return {"generator_loss": 1.0}

    return part


# --- gradients


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("task", [{"weight_clip": 1}, {"gradient_penalty": 10}], ids=str)
def test_gradients_equal_the_numeric_gradients_of_the_losses(
    task: dict[str, float], activation: str
) -> None:
    config = wgan(
        dtype="float64",
        task={"name": "wgan", "latent": 4, **task},
        model={
            "critic": {"name": "mlp", "hidden": [6, 5], "activation": activation},
            "generator": {"name": "mlp", "hidden": [5], "activation": "tanh"},
        },
    )
    assembly = prepare(config)
    x = assembly.training.batch(0).x[:8].copy()
    made: Any = assembly.task
    critic_sum, generator_sum = (
        made._sum(name, assembly.state) for name in ("critic", "generator")
    )
    assert_gradient(
        assembly, "critic", lambda: critic_sum(8, made._critic_shards(assembly.state, x, 3))
    )
    assert_gradient(
        assembly,
        "generator",
        lambda: generator_sum(8, made._generator_shards(assembly.state, 8, 3)),
    )


def assert_gradient(assembly: Assembly, name: str, compute: Any) -> None:
    """Compare some elements of a gradient with the slope of the loss."""
    gradient = compute()[0].flat.copy()
    flat = update_target(assembly.state.arenas[f"params/{name}"])
    for i in np.random.default_rng(0).choice(np.flatnonzero(gradient), 12, replace=False):
        losses, kept = [], flat[i]
        for step in (1e-6, -1e-6):
            flat[i] = kept + step
            losses.append(compute()[2][f"{name}_loss"])
        flat[i] = kept
        assert gradient[i] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4, abs=1e-7)


# --- memory


@pytest.mark.training
@pytest.mark.parametrize("held", [{"weight_clip": 0.1}, {"gradient_penalty": 10}], ids=str)
def test_after_the_first_a_step_allocates_no_array_larger_than_the_labels(
    held: dict[str, float],
) -> None:
    rows = 1000
    task = {"name": "wgan", "n_critic": 2, "latent": 64, **held}
    data = {"name": "digits", "batch_size": rows, "validation_fraction": 0.1}
    model = {
        "critic": {"name": "mlp", "hidden": [64], "activation": "leaky_relu"},
        "generator": {"name": "mlp", "hidden": [64], "output": "sigmoid"},
    }
    assembly = prepare(wgan(task=task, data=data, model=model, ema={"decay": 0.9}))
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    trainer.step()
    # scores and norms, a number for each row, and NumPy's own buffers; a number for each row and feature breaks it
    bound = 2 * rows * 2 * 8 + np.getbufsize() * 4 + 16 * 1024
    assert bound < rows * 64 * 4
    assert most_allocated(trainer, steps=4) < bound


# --- bad input


@pytest.mark.training
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"name": "wgan"}}, "give one"),
        ({"task": {"name": "wgan", "weight_clip": 1, "gradient_penalty": 1}}, "give one"),
        (
            {"model": {"name": "linear"}},
            "model: has one component, and the task wgan needs {critic: ..., generator",
        ),
        (
            {"optimizer": {"critic": ADAM, "genrator": ADAM}},
            "optimizer: has critic, genrator, and the task wgan needs",
        ),
        (
            {"log": {"every": 3, "counter": "critics"}},
            "log.counter: unknown counter 'critics' .did you mean",
        ),
        (
            {"evaluate": {"every": 3, "metric": "accuracy"}},
            "evaluate.metric: no evaluation measures 'accuracy'",
        ),
        ({"evaluate": {"every": 3, "ema": True}}, "evaluate.ema: there is no moving average"),
        ({"samples": {"every": 3, "shape": [3, 3]}}, r"samples.shape: \[3, 3\] should be"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_step_1(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(ConfigError, match=message),
        create_run(wgan(**sections), RunDirectory(tmp_path / "run")),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_critic_without_a_tangent_takes_no_penalty(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    model = {
        "critic": {"name": "mlp", "hidden": [6], "layer_norm": True},
        "generator": {"name": "mlp", "hidden": [5]},
    }
    with pytest.raises(ConfigError) as caught:
        prepare(wgan("gradient penalty", model=model))
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


def test_a_step_that_tore_is_not_undone() -> None:
    """Another process that has the arena too may be done with the step, and be saving it."""
    for error, left in ((ValueError("no"), 1.0), (TornUpdate("no"), 2.0)):
        arena = Arena({"x": ()}, "float32")
        arena["x"] = 1.0
        with pytest.raises(type(error)):
            change_and_fail(arena, error)
        assert float(arena["x"]) == left


def change_and_fail(arena: Arena, error: Exception) -> None:
    with Undo().on_error({"params": arena}):
        arena["x"] = 2.0
        raise error


def test_samples_are_of_one_noise(tmp_path: Path) -> None:
    assembly: Assembly = prepare(wgan())
    first, again = (assembly.task.generate(assembly.state, 9) for _ in range(2))
    assert first is not None
    assert again is not None
    assert first.shape == (9, 64)
    assert np.array_equal(first, again)
    assert len({sample.tobytes() for sample in first}) == 9


@pytest.mark.training
def test_rows_on_the_grid_of_another_counter_are_not_missed_between(tmp_path: Path) -> None:
    task = {"name": "wgan", "n_critic": 5, "latent": 4, "weight_clip": 0.1, "clock": "critic"}
    cadence = {"every": 2, "counter": "generator"}
    train(wgan(task=task, log=cadence, evaluate=cadence), tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if row["kind"] == "eval"] == [10, 20, 30]
    assert verify(str(tmp_path / "run"))[1] == []
