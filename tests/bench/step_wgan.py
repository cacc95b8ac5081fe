"""Steps of a WGAN for step_tools.py: N_CRITIC critic updates with clipped weights, one generator update, RMSprop."""

from __future__ import annotations

import itertools
import math
from typing import Any

from step_tools import CLIP, LATENT, N_CRITIC, ROWS, Case, Step

RATE = 5e-5


def torch_wgan(case: Case, rows: Any, *, compiled: bool) -> Step:
    import torch
    from torch import nn

    def mlp(n_in: int, n_out: int, activation: type[nn.Module]) -> Any:
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise([n_in, *case.widths[1:], n_out]):
            layers += [nn.Linear(width_in, width_out), activation()]
        return nn.Sequential(*layers[:-1])

    x = torch.from_numpy(rows)
    critic = mlp(case.widths[0], 1, nn.LeakyReLU)
    generator = mlp(LATENT, case.widths[0], nn.ReLU)
    critic_rule = torch.optim.RMSprop(critic.parameters(), lr=RATE)
    generator_rule = torch.optim.RMSprop(generator.parameters(), lr=RATE)
    forward_critic, forward_generator = critic, generator
    if compiled:
        forward_critic, forward_generator = torch.compile(critic), torch.compile(generator)

    def batches() -> Any:
        while True:
            yield from torch.randperm(ROWS).split(case.batch_size)

    batch = batches()

    def step() -> float:
        for _ in range(N_CRITIC):
            critic_rule.zero_grad()
            with torch.no_grad():
                fake = forward_generator(torch.randn(case.batch_size, LATENT))
            real = forward_critic(x.index_select(0, next(batch))).mean()
            loss = forward_critic(fake).mean() - real
            loss.backward()
            critic_rule.step()
            with torch.no_grad():
                torch._foreach_clamp_min_(list(critic.parameters()), -CLIP)
                torch._foreach_clamp_max_(list(critic.parameters()), CLIP)
        generator_rule.zero_grad()
        fake = forward_generator(torch.randn(case.batch_size, LATENT))
        (-forward_critic(fake).mean()).backward()
        generator_rule.step()
        return float(loss.item())

    return step


def apply(params: Any, x: Any, activation: Any) -> Any:
    for weight, bias in params[:-1]:
        x = activation(x @ weight + bias)
    return x @ params[-1][0] + params[-1][1]


def rmsprop(params: Any, squares: Any, grads: Any) -> tuple[Any, Any]:
    import jax

    squares = jax.tree.map(lambda s, g: 0.9 * s + 0.1 * g * g, squares, grads)
    params = jax.tree.map(
        lambda p, s, g: p - RATE * g / (jax.numpy.sqrt(s) + 1e-8), params, squares, grads
    )
    return params, squares


def jax_wgan(case: Case, rows: Any) -> Step:
    import jax
    import jax.numpy as jnp
    import numpy as np

    x = jnp.asarray(rows)
    rng = np.random.default_rng(0)

    def parameters(n_in: int, n_out: int) -> Any:
        return [
            (jnp.asarray(rng.normal(0, math.sqrt(2 / a), (a, b)), case.dtype), jnp.zeros(b))
            for a, b in itertools.pairwise([n_in, *case.widths[1:], n_out])
        ]

    def critic_of(params: Any, x: Any) -> Any:
        return jnp.mean(apply(params, x, jax.nn.leaky_relu))

    def generate(params: Any, key: Any) -> Any:
        return apply(params, jax.random.normal(key, (case.batch_size, LATENT)), jax.nn.relu)

    def update(state: Any, order: Any, x: Any) -> Any:
        critic, generator, key, t = state
        keys = jax.random.split(key, N_CRITIC + 2)
        for i in range(N_CRITIC):
            first = (t * N_CRITIC + i) * case.batch_size % ROWS
            at = jax.lax.dynamic_slice(order, (first,), (case.batch_size,))
            fake, real = generate(generator[0], keys[i]), x[at]
            loss, grads = jax.value_and_grad(
                lambda params, fake=fake, real=real: (
                    critic_of(params, fake) - critic_of(params, real)
                )
            )(critic[0])
            params, squares = rmsprop(*critic, grads)
            critic = (jax.tree.map(lambda p: jnp.clip(p, -CLIP, CLIP), params), squares)
        grads = jax.grad(lambda params: -critic_of(critic[0], generate(params, keys[-2])))(
            generator[0]
        )
        return (critic, rmsprop(*generator, grads), keys[-1], t + 1), loss

    jitted = jax.jit(update, donate_argnums=0)
    models = [parameters(case.widths[0], 1), parameters(LATENT, case.widths[0])]
    state = (
        *[(params, jax.tree.map(jnp.zeros_like, params)) for params in models],
        jax.random.key(0),
        jnp.asarray(0),
    )
    n_samples, order = 0, None

    def step() -> float:
        nonlocal state, order, n_samples
        if n_samples % ROWS < N_CRITIC * case.batch_size:
            order = jnp.asarray(rng.permutation(ROWS))
        n_samples += N_CRITIC * case.batch_size
        state, loss = jitted(state, order, x)
        return float(loss)

    return step
