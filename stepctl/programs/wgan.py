"""The Wasserstein GAN: a critic and a generator, each with its optimizer and its counter."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal, final

import numpy as np

from stepctl.config.registry import Positive, PositiveInt
from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.errors import ConfigError
from stepctl.models.base import ModelShapes
from stepctl.programs.base import Metrics, Mode, Task, refuse_non_finite, sum_metrics
from stepctl.programs.shards import ShardFunction, ShardSum
from stepctl.programs.undo import Undo
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.rng import rng
from stepctl.state.train_state import TrainState
from stepctl.state.workspace import Workspace

_CRITIC = "critic"
_GENERATOR = "generator"
_EPSILON = 1e-12  # added to a squared norm before its root, whose derivative at 0 is infinite


@final
class WGAN(Task):
    """A Wasserstein GAN: critic D distinguishes samples x from generated g(z), and g maximises D(g(z)).

    Critic loss: mean D(g(z)) - mean D(x), with all weights of D clipped to +-`weight_clip`
    (Arjovsky et al. 2017, "Wasserstein GAN", algorithm 1), or with the penalty `gradient_penalty` *
    mean (|grad D| - 1)^2 at random points between x and g(z) (Gulrajani et al. 2017, "Improved
    training of Wasserstein GANs", algorithm 1). Generator loss: -mean D(g(z)). z: (rows, `latent`),
    standard normal.

    There are `n_critic` critic updates, each on a batch of its own, per generator update. With
    `clock: generator` one global step is all of these. With `clock: critic` it is one critic
    update, and every n_critic-th step also makes the generator's. The metric `wasserstein` is mean
    D(x) - mean D(g(z)), the critic's estimate of the distance.

    Args:
        n_critic: Number of critic updates for each generator update.
        latent: Number of normally distributed inputs of the generator.
        weight_clip: Largest absolute value of a weight of the critic. Give either this or
            gradient_penalty.
        gradient_penalty: Weight of the gradient penalty in the loss of the critic.
        clock: Unit of a global step: one update of the generator with the critic updates before it,
            or one update of the critic.
    """

    targets: Targets = "classes"  # not used
    needs_targets = False
    models: ClassVar[tuple[str, ...]] = (_CRITIC, _GENERATOR)
    metrics: ClassVar[dict[str, Mode]] = {"wasserstein": "min"}
    training_metrics = ("critic_loss", "wasserstein", "generator_loss")
    divisible = True
    sliced = True
    learns_labels = False

    def __init__(
        self,
        *,
        n_critic: PositiveInt = 5,
        latent: PositiveInt = 64,
        weight_clip: Positive | None = None,
        gradient_penalty: Positive | None = None,
        clock: Literal["generator", "critic"] = "generator",
        seed: int,
        dtype: str,
        shards: int,
    ) -> None:
        if (weight_clip is None) == (gradient_penalty is None):
            raise ConfigError(
                "wgan takes weight_clip (such as 0.01) or gradient_penalty (such as 10): give one"
            )
        self.n_critic = n_critic
        self.latent = latent
        self.clock = clock
        self.batches_per_step = n_critic if clock == _GENERATOR else 1
        self._weight_clip = weight_clip
        self._penalty = gradient_penalty
        self._seed = seed
        self._shards = shards
        # one workspace for each kind of pass, so that every pass finds arrays of its shapes
        self._training = {name: Workspace(dtype) for name in self.models}
        self._evaluation = Workspace(dtype)
        self._shard_sums: dict[str, ShardSum] = {}
        self._unused_gradients: dict[str, Arena] = {}
        self._undo = Undo()

    def ends(
        self, n_classes: int | None, sample_shape: Shape, target_shape: Shape
    ) -> dict[str, ModelShapes]:
        sample_size = int(np.prod(sample_shape))
        return {
            _CRITIC: ModelShapes(sample_shape, 1, input_gradient=True),
            _GENERATOR: ModelShapes((self.latent,), sample_size),
        }

    def counts(self, steps: int) -> dict[str, int]:
        critic = steps * self.batches_per_step
        return {_CRITIC: critic, _GENERATOR: critic // self.n_critic}

    def trial(self, state: TrainState, batch: Batch) -> None:
        rows = len(batch.x) // self.batches_per_step
        self._sum(_CRITIC, state).trial(rows, self._critic_shards(state, batch.x[:rows], 0))
        self._sum(_GENERATOR, state).trial(rows, self._generator_shards(state, rows, 0))
        for learner in self.learners.values():
            learner.trial(state)

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        step = state.counters.global_step + 1
        counts = dict(state.counters)
        rows = len(batch.x) // self.batches_per_step
        critic = self.learners[_CRITIC]
        generator = self.learners[_GENERATOR]
        with self._undo.on_error(critic.arenas(state)):
            for first in range(0, len(batch.x), rows):
                x = batch.x[first : first + rows]
                compute = self._critic_shards(state, x, counts[_CRITIC])
                gradient, _, metrics = self._sum(_CRITIC, state)(rows, compute)
                refuse_non_finite(step, metrics["critic_loss"], gradient, "critic/")
                metrics |= critic.update(state, gradient, counts, clip=self._weight_clip)
                counts[_CRITIC] += 1
            if counts[_CRITIC] % self.n_critic == 0:
                compute = self._generator_shards(state, rows, counts[_GENERATOR])
                gradient, _, generator_metrics = self._sum(_GENERATOR, state)(rows, compute)
                loss = generator_metrics["generator_loss"]
                refuse_non_finite(step, loss, gradient, "generator/")
                metrics |= generator_metrics
                metrics |= generator.update(state, gradient, counts)
        return metrics

    def evaluate(
        self, state: TrainState, batches: Iterable[Batch], *, average: bool = False
    ) -> Metrics:
        critic = self.learners[_CRITIC]
        params = critic.params(state, average=average)
        workspace = self._evaluation
        parts: list[Metrics] = []
        n = 0
        for number, batch in enumerate(batches):
            noise = rng(self._seed, "evaluate/latent", number)
            workspace.start()
            fake = self._generated(state, batch.x, noise, workspace, average=average)
            real_scores, _ = critic.forward(params, batch.x, workspace)
            fake_scores, _ = critic.forward(params, fake, workspace)
            parts.append({"wasserstein": float(real_scores.sum()) - float(fake_scores.sum())})
            n += len(batch.x)
        return {name: value / n for name, value in sum_metrics(parts).items()}

    def generate(
        self, state: TrainState, n: int, *, average: bool = False, seed: int | None = None
    ) -> Array:
        workspace = self._evaluation
        workspace.start()
        like = np.empty((n, *self.learners[_CRITIC].shapes.input_shape), workspace.dtype)
        noise = rng(self._seed if seed is None else seed, "generate/latent")
        return self._generated(state, like, noise, workspace, average=average).copy()

    def _generated(
        self,
        state: TrainState,
        like: Array,
        noise: np.random.Generator,
        workspace: Workspace,
        *,
        average: bool = False,
    ) -> Array:
        """Return generated samples in the shape of `like`: (rows, *sample_shape)."""
        z = self._latent(len(like), noise, workspace)
        learner = self.learners[_GENERATOR]
        outputs, _ = learner.forward(learner.params(state, average=average), z, workspace)
        return outputs.reshape(like.shape)

    def _latent(self, rows: int, noise: np.random.Generator, workspace: Workspace) -> Array:
        z = workspace.empty((rows, self.latent))
        noise.standard_normal(out=z, dtype=z.dtype.type)
        return z

    # --- gradients

    def _critic_shards(self, state: TrainState, x: Array, number: int) -> ShardFunction:
        """Return the function that computes one shard of the critic's `number`-th gradient.

        x: (rows of this rank, *sample_shape).
        """
        critic = self.learners[_CRITIC]
        workspace = self._training[_CRITIC]
        n = len(x) * self.comm.size
        params = critic.params(state)

        def compute(shard: int, at: slice, gradient: Arena, _: Arena) -> Metrics:
            real = x[at]
            rows = len(real)
            workspace.start(partial(self._rng, _CRITIC, number, shard))
            noise = self._rng(_CRITIC, number, shard, "latent")
            fake = self._generated(state, real, noise, workspace)
            both = workspace.empty((2 * rows, *real.shape[1:]))
            both[:rows] = real
            both[rows:] = fake
            scores, backward = critic.forward(params, both, workspace)
            distance = (float(scores[:rows].sum()) - float(scores[rows:].sum())) / n
            dscores = workspace.empty(scores.shape)
            dscores[:rows] = -1 / n
            dscores[rows:] = 1 / n
            backward(dscores, gradient)
            penalty = 0.0
            if self._penalty:
                penalty = self._add_penalty(params, real, fake, gradient, n, number, shard)
            return {"critic_loss": penalty - distance, "wasserstein": distance}

        return compute

    def _add_penalty(
        self,
        params: Arena,
        real: Array,
        fake: Array,
        gradient: Arena,
        n: int,
        number: int,
        shard: int,
    ) -> float:
        """Add the penalty's gradient; return penalty / n * sum_i (|grad D(x_i)| - 1)^2."""
        assert self._penalty is not None
        critic = self.learners[_CRITIC]
        workspace = self._training[_CRITIC]
        rows = len(real)
        # both passes at the points between must draw the same dropout masks: they share one scope
        scope = workspace.scoped("penalty")
        noise = self._rng(_CRITIC, number, shard, "between")
        share = noise.random((rows, 1), dtype=real.dtype.type)
        between = workspace.empty((rows, real.size // rows))
        along = workspace.empty((rows, real.size // rows))
        np.subtract(real.reshape(rows, -1), fake.reshape(rows, -1), out=between)
        np.multiply(between, share, out=between)
        np.add(between, fake.reshape(rows, -1), out=between)
        scores, backward = critic.forward(params, between.reshape(real.shape), scope)
        ones = np.ones_like(scores)
        extra = self._unused_gradient(_CRITIC, params)
        slope = self._required(backward(ones, extra), _CRITIC).reshape(rows, -1)
        np.multiply(slope, slope, out=along)
        norms = np.sqrt(along.sum(axis=1, keepdims=True) + _EPSILON)
        # the gradient of sum_i u_i . grad D(x_i) with respect to the parameters, with u constant: backward
        # through the derivative along u = 2 penalty / n * (|grad D| - 1) * grad D / |grad D|
        np.multiply(slope, (2 * self._penalty / n) * (norms - 1) / norms, out=along)
        outputs, tangents, tangent_backward = critic.tangent(
            params, between.reshape(real.shape), along.reshape(real.shape), scope
        )
        tangent_backward(np.zeros_like(outputs), np.ones_like(tangents), extra)
        np.add(gradient.flat, extra.flat, out=gradient.flat)
        return self._penalty * float(np.square(norms - 1).sum()) / n

    def _generator_shards(self, state: TrainState, rows: int, number: int) -> ShardFunction:
        """Return the function that computes one shard of the generator's `number`-th gradient."""
        critic = self.learners[_CRITIC]
        generator = self.learners[_GENERATOR]
        workspace = self._training[_GENERATOR]
        critic_params = critic.params(state)
        params = generator.params(state)
        n = rows * self.comm.size

        def compute(shard: int, at: slice, gradient: Arena, _: Arena) -> Metrics:
            workspace.start(partial(self._rng, _GENERATOR, number, shard))
            noise = self._rng(_GENERATOR, number, shard, "latent")
            z = self._latent(at.stop - at.start, noise, workspace)
            outputs, generator_backward = generator.forward(params, z, workspace)
            samples = outputs.reshape(len(z), *critic.shapes.input_shape)
            scores, critic_backward = critic.forward(critic_params, samples, workspace)
            dscores = workspace.empty(scores.shape)
            dscores.fill(-1 / n)
            unused = self._unused_gradient(_CRITIC, critic_params)
            dsamples = self._required(critic_backward(dscores, unused), _CRITIC)
            generator_backward(dsamples.reshape(outputs.shape), gradient)
            return {"generator_loss": -float(scores.sum()) / n}

        return compute

    def _sum(self, name: str, state: TrainState) -> ShardSum:
        if name not in self._shard_sums:
            params = self.learners[name].params(state)
            self._shard_sums[name] = ShardSum(params, state.buffers, self._shards, self.comm, name)
        return self._shard_sums[name]

    def _unused_gradient(self, name: str, params: Arena) -> Arena:
        """Return an arena for a gradient that backward writes and no update uses."""
        if name not in self._unused_gradients:
            self._unused_gradients[name] = params.like()
        return self._unused_gradients[name]

    def _rng(self, model: str, number: int, shard: int, name: str) -> np.random.Generator:
        return rng(self._seed, f"{model}/{name}", number, shard)

    @staticmethod
    def _required(dx: Array | None, model: str) -> Array:
        """Return the gradient with respect to the inputs; ConfigError if backward returned none."""
        if dx is None:
            raise ConfigError(
                f"{model}: backward returns no gradient with respect to the inputs; the generator learns from it"
            )
        return dx
