"""No two purposes of a run share a random stream, whatever the layers are called."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from stepctl.models.base import Backward, Model, TangentBackward
from stepctl.models.mlp import mlp
from stepctl.state import rng
from stepctl.state.arena import Arena, Array
from stepctl.state.workspace import Workspace
from stepctl.training.assembly import Assembly
from stepctl.training.build import prepare
from stepctl.training.trainer import Trainer
from tests.support.runs import make_config

Key = tuple[Any, ...]

RMSPROP = {"name": "rmsprop", "learning_rate": 1e-3}
DROPOUT = {"name": "mlp", "hidden": [8, 8], "dropout": 0.5}
OWN = {"name": f"{__name__}:DrawsAsTheTaskDoes"}


class DrawsAsTheTaskDoes(Model):
    """An mlp that also draws from streams with the names of other streams."""

    def __init__(
        self, *, input_shape: tuple[int, ...], n_outputs: int, input_gradient: bool = False
    ) -> None:
        self._inner = mlp(
            hidden=[4], input_shape=input_shape, n_outputs=n_outputs, input_gradient=input_gradient
        )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._inner.parameter_shapes()

    def initialize(self, params: Arena, rng: Any) -> None:
        self._inner.initialize(params, rng)

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        self._draw(workspace)
        return self._inner.forward(params, x, workspace)

    def tangent(
        self, params: Arena, x: Array, v: Array, workspace: Workspace
    ) -> tuple[Array, Array, TangentBackward]:
        self._draw(workspace)
        return self._inner.tangent(params, x, v, workspace)

    @staticmethod
    def _draw(workspace: Workspace) -> None:
        if workspace.rng is not None:
            for name in ("latent", "between", "dropout0", "dense0/weight"):
                workspace.rng(name).random()


def wgan(models: dict[str, Any], **task: Any) -> dict[str, Any]:
    return {
        "task": {"name": "wgan", "n_critic": 2, "latent": 4, **task},
        "model": models,
        "optimizer": {"critic": RMSPROP, "generator": RMSPROP},
    }


TASKS: dict[str, dict[str, Any]] = {
    "classification": {"model": DROPOUT},
    "regression": {"model": DROPOUT, "task": {"name": "regression"}},
    "classification, own model": {"model": OWN},
    "wgan, dropout in both": wgan({"critic": DROPOUT, "generator": DROPOUT}, weight_clip=0.1),
    "wgan by the critic's clock": wgan(
        {"critic": DROPOUT, "generator": DROPOUT}, weight_clip=0.1, clock="critic"
    ),
    "wgan, own models": wgan({"critic": OWN, "generator": OWN}, weight_clip=0.1),
    "wgan, penalty": wgan(
        {"critic": {"name": "mlp", "hidden": [8]}, "generator": DROPOUT}, gradient_penalty=10
    ),
}


def assembled(sections: dict[str, Any]) -> Assembly:
    data = {"name": "digits", "batch_size": 8, "validation_fraction": 0.95, "shards": 2}
    return prepare(make_config(**{"data": data, "log": {}, "evaluate": {}, **sections}))


class Draws:
    """The keys that generators were made for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[Key] = []
        seed_sequence = rng.seed_sequence

        def recorded(seed: int, stream: str, *index: int) -> np.random.SeedSequence:
            self.keys.append((seed, stream, *index))
            return seed_sequence(seed, stream, *index)

        monkeypatch.setattr(rng, "seed_sequence", recorded)

    def repeated(self) -> dict[Key, int]:
        return {key: count for key, count in Counter(self.keys).items() if count > 1}


@pytest.mark.training
@pytest.mark.parametrize("name", TASKS)
def test_no_two_draws_of_a_run_share_a_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assembled(TASKS[name])
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    draws = Draws(monkeypatch)
    assembly.task.initial_state(0)
    for _ in range(4):
        trainer.step()
    if assembly.validation is not None:
        assembly.task.evaluate(assembly.state, assembly.validation)
    assembly.task.generate(assembly.state, 3)
    assert draws.keys
    assert draws.repeated() == {}


def test_only_the_two_passes_over_the_points_of_a_penalty_draw_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are the same function and its derivative."""
    assembly = assembled(wgan({"critic": OWN, "generator": OWN}, gradient_penalty=10))
    trainer = Trainer(assembly.task, assembly.training, assembly.state, stop=[])
    draws = Draws(monkeypatch)
    trainer.step()
    own_streams, critic_updates, shards = 4, 2, 2
    repeated = draws.repeated()
    assert len(repeated) == own_streams * critic_updates * shards
    assert set(repeated.values()) == {2}
    assert all("penalty" in key[1] for key in repeated)


def test_layers_of_the_same_name_in_critic_and_generator_drop_other_elements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks: dict[str, list[Array]] = {"critic": [], "generator": []}
    assembly = assembled(TASKS["wgan, dropout in both"])
    for name, learner in assembly.task.learners.items():
        monkeypatch.setattr(learner, "model", RecordsFirstMask(learner.model, masks[name]))
    Trainer(assembly.task, assembly.training, assembly.state, stop=[]).step()
    ours, theirs = (
        np.concatenate([mask.ravel() for mask in masks[name][:2]])
        for name in ("critic", "generator")
    )
    n = min(len(ours), len(theirs))
    assert n >= 32
    assert 0.1 < np.mean(ours[:n] == theirs[:n]) < 0.9


class RecordsFirstMask(Model):
    """Another model, of which it is recorded what the stream of its first dropout layer would drop."""

    def __init__(self, inner: Model, masks: list[Array]) -> None:
        self._inner, self._masks = inner, masks

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._inner.parameter_shapes()

    def initialize(self, params: Arena, rng: Any) -> None:
        self._inner.initialize(params, rng)

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        if workspace.rng is not None:
            self._masks.append(workspace.rng("dropout0").random((len(x), 8)) >= 0.5)
        return self._inner.forward(params, x, workspace)
