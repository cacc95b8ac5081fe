"""The Wasserstein GAN: a critic and a generator, each with its optimizer and its counter."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal, final

import numpy as np

from stepctl.arena import Arena, Array, Shape, Workspace
from stepctl.data.base import Targets
from stepctl.data.batches import Batch
from stepctl.errors import ConfigError
from stepctl.models.base import Ends
from stepctl.registry import Positive, PositiveInt
from stepctl.rng import rng
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics, Mode, Task, refuse_non_finite, summed
from stepctl.tasks.shards import Part, ShardSum
from stepctl.tasks.undo import Undo

_CRITIC, _GENERATOR = "critic", "generator"
_TINY = 1e-12  # added to a squared norm before its root


@final
class WGAN(Task):
    """The critic learns to tell real samples x from made ones g(z); the generator learns to please it.

    Critic: minimise mean D(g(z)) - mean D(x), its weights kept within +-`weight_clip` (Arjovsky et al. 2017,
    algorithm 1), or with `gradient_penalty` times mean (|grad D| - 1)^2 at random points between x and g(z) added
    (Gulrajani et al. 2017, algorithm 1). Generator: minimise -mean D(g(z)). z is normal, of `latent` numbers.

    There are `n_critic` critic updates, each on a batch of its own, to a generator update. With `clock: generator` a
    global step is all of these; with `clock: critic` it is one critic update, and the generator's comes with every
    n_critic-th. `wasserstein` is the critic's estimate of the distance, mean D(x) - mean D(g(z)).
    """

    targets: Targets = "classes"  # which are not looked at
    models: ClassVar[tuple[str, ...]] = (_CRITIC, _GENERATOR)
    metrics: ClassVar[dict[str, Mode]] = {"wasserstein": "min"}
    training_metrics = ("critic_loss", "wasserstein", "generator_loss")
    divisible = sliced = True
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
            raise ConfigError("wgan takes weight_clip (such as 0.01) or gradient_penalty (such as 10): give one")
        self.n_critic, self.latent, self.clock = n_critic, latent, clock
        self.batches_per_step = n_critic if clock == _GENERATOR else 1
        self._weight_clip, self._penalty, self._seed, self._shards = weight_clip, gradient_penalty, seed, shards
        self._training = {name: Workspace(dtype) for name in self.models}  # a pass finds the buffers of its like
        self._evaluation = Workspace(dtype)
        self._sums: dict[str, ShardSum] = {}
        self._unused: dict[str, Arena] = {}
        self._undo = Undo()

    def ends(self, n_classes: int | None, sample_shape: Shape, target_shape: Shape) -> dict[str, Ends]:
        made = int(np.prod(sample_shape))
        return {_CRITIC: Ends(sample_shape, 1, input_gradient=True), _GENERATOR: Ends((self.latent,), made)}

    def counts(self, steps: int) -> dict[str, int]:
        critic = steps * self.batches_per_step
        return {_CRITIC: critic, _GENERATOR: critic // self.n_critic}

    def trial(self, state: TrainState, batch: Batch) -> None:
        rows = len(batch.x) // self.batches_per_step
        self._sum(_CRITIC, state).trial(rows, self._critic_part(state, batch.x[:rows], 0))
        self._sum(_GENERATOR, state).trial(rows, self._generator_part(state, rows, 0))
        for learner in self.learners.values():
            learner.trial(state)

    def step(self, state: TrainState, batch: Batch) -> Metrics:
        counts, step = dict(state.counters), state.counters.global_step + 1
        rows = len(batch.x) // self.batches_per_step
        critic, generator = self.learners[_CRITIC], self.learners[_GENERATOR]
        with self._undo.on_error(critic.arenas(state)):
            for first in range(0, len(batch.x), rows):
                part = self._critic_part(state, batch.x[first : first + rows], counts[_CRITIC])
                gradient, _, metrics = self._sum(_CRITIC, state)(rows, part)
                refuse_non_finite(step, metrics["critic_loss"], gradient, "critic/")
                metrics |= critic.update(state, gradient, counts, clip=self._weight_clip)
                counts[_CRITIC] += 1
            if counts[_CRITIC] % self.n_critic == 0:
                part = self._generator_part(state, rows, counts[_GENERATOR])
                gradient, _, made = self._sum(_GENERATOR, state)(rows, part)
                refuse_non_finite(step, made["generator_loss"], gradient, "generator/")
                metrics |= made | generator.update(state, gradient, counts)
        return metrics

    def evaluate(self, state: TrainState, batches: Iterable[Batch], *, average: bool = False) -> Metrics:
        params = self.learners[_CRITIC].params(state, average=average)
        parts, n = [], 0
        for number, batch in enumerate(batches):
            noise = rng(self._seed, "evaluate/latent", number)
            self._evaluation.start()
            fake = self._generated(state, batch.x, noise, self._evaluation, average=average)
            real_scores = self.learners[_CRITIC].forward(params, batch.x, self._evaluation)[0]
            fake_scores = self.learners[_CRITIC].forward(params, fake, self._evaluation)[0]
            parts.append({"wasserstein": float(real_scores.sum()) - float(fake_scores.sum())})
            n += len(batch.x)
        return {name: value / n for name, value in summed(parts).items()}

    def generate(self, state: TrainState, n: int, *, average: bool = False) -> Array:
        self._evaluation.start()
        like = np.empty((n, *self.learners[_CRITIC].ends.input_shape), self._evaluation.dtype)
        noise = rng(self._seed, "generate/latent")
        return self._generated(state, like, noise, self._evaluation, average=average).copy()

    def _generated(
        self, state: TrainState, like: Array, noise: np.random.Generator, workspace: Workspace, *, average: bool = False
    ) -> Array:
        z = self._latent(len(like), noise, workspace)
        learner = self.learners[_GENERATOR]
        return learner.forward(learner.params(state, average=average), z, workspace)[0].reshape(like.shape)

    def _latent(self, rows: int, noise: np.random.Generator, workspace: Workspace) -> Array:
        z = workspace.empty((rows, self.latent))
        noise.standard_normal(out=z, dtype=z.dtype.type)
        return z

    # --- gradients

    def _critic_part(self, state: TrainState, x: Array, number: int) -> Part:
        critic, workspace, n = self.learners[_CRITIC], self._training[_CRITIC], len(x) * self.comm.size
        params = critic.params(state)

        def part(shard: int, at: slice, gradient: Arena, _: Arena) -> Metrics:
            real = x[at]
            workspace.start(partial(self._rng, _CRITIC, number, shard))
            fake = self._generated(state, real, self._rng(_CRITIC, number, shard, "latent"), workspace)
            both = workspace.empty((2 * len(real), *real.shape[1:]))
            both[: len(real)], both[len(real) :] = real, fake
            scores, backward = critic.forward(params, both, workspace)
            distance = (float(scores[: len(real)].sum()) - float(scores[len(real) :].sum())) / n
            dscores = workspace.empty(scores.shape)
            dscores[: len(real)], dscores[len(real) :] = -1 / n, 1 / n
            backward(dscores, gradient)
            penalty = self._add_penalty(params, real, fake, gradient, n, number, shard) if self._penalty else 0.0
            return {"critic_loss": penalty - distance, "wasserstein": distance}

        return part

    def _add_penalty(
        self, params: Arena, real: Array, fake: Array, gradient: Arena, n: int, number: int, shard: int
    ) -> float:
        """Add the penalty's gradient; return this part's share of it: penalty / n sum_i (|grad D(x_i)| - 1)^2."""
        assert self._penalty is not None
        critic, workspace, rows = self.learners[_CRITIC], self._training[_CRITIC], len(real)
        # the forward and the tangent pass at the points between are one function: they draw the same masks
        penalty_workspace = workspace.scoped("penalty")
        share = self._rng(_CRITIC, number, shard, "between").random((rows, 1), dtype=real.dtype.type)
        between, along = (workspace.empty((rows, real.size // rows)) for _ in range(2))
        np.subtract(real.reshape(rows, -1), fake.reshape(rows, -1), out=between)
        np.multiply(between, share, out=between)
        np.add(between, fake.reshape(rows, -1), out=between)
        scores, backward = critic.forward(params, between.reshape(real.shape), penalty_workspace)
        ones, extra = np.ones_like(scores), self._scratch(_CRITIC, params)
        slope = self._inputs(backward(ones, extra), _CRITIC).reshape(rows, -1)
        np.multiply(slope, slope, out=along)
        norms = np.sqrt(along.sum(axis=1, keepdims=True) + _TINY)
        # d/dparams of sum_i u_i . grad D(x_i) with u held: backward through the derivative along u
        np.multiply(slope, (2 * self._penalty / n) * (norms - 1) / norms, out=along)
        outputs, tangents, back = critic.tangent(
            params, between.reshape(real.shape), along.reshape(real.shape), penalty_workspace
        )
        back(np.zeros_like(outputs), np.ones_like(tangents), extra)
        np.add(gradient.flat, extra.flat, out=gradient.flat)
        return self._penalty * float(np.square(norms - 1).sum()) / n

    def _generator_part(self, state: TrainState, rows: int, number: int) -> Part:
        critic, generator, workspace = self.learners[_CRITIC], self.learners[_GENERATOR], self._training[_GENERATOR]
        critic_params, params, n = critic.params(state), generator.params(state), rows * self.comm.size

        def part(shard: int, at: slice, gradient: Arena, _: Arena) -> Metrics:
            workspace.start(partial(self._rng, _GENERATOR, number, shard))
            z = self._latent(at.stop - at.start, self._rng(_GENERATOR, number, shard, "latent"), workspace)
            made, back_through_generator = generator.forward(params, z, workspace)
            samples = made.reshape(len(z), *critic.ends.input_shape)
            scores, back_through_critic = critic.forward(critic_params, samples, workspace)
            dscores = workspace.empty(scores.shape)
            dscores.fill(-1 / n)
            dmade = self._inputs(back_through_critic(dscores, self._scratch(_CRITIC, critic_params)), _CRITIC)
            back_through_generator(dmade.reshape(made.shape), gradient)
            return {"generator_loss": -float(scores.sum()) / n}

        return part

    def _sum(self, name: str, state: TrainState) -> ShardSum:
        if name not in self._sums:
            params = self.learners[name].params(state)
            self._sums[name] = ShardSum(params, state.buffers, self._shards, self.comm, name)
        return self._sums[name]

    def _scratch(self, name: str, params: Arena) -> Arena:
        if name not in self._unused:
            self._unused[name] = params.like()
        return self._unused[name]

    def _rng(self, whose: str, number: int, shard: int, name: str) -> np.random.Generator:
        return rng(self._seed, f"{whose}/{name}", number, shard)

    @staticmethod
    def _inputs(gradient: Array | None, whose: str) -> Array:
        if gradient is None:
            raise ConfigError(f"{whose}: backward returns no gradient of the inputs; the generator learns from it")
        return gradient
