"""A variational autoencoder of handwritten digits (Kingma and Welling 2014)."""

import autograd.numpy as np
from autograd import grad
from autograd.misc.optimizers import adam

HIDDEN = 24
LATENT = 4
BATCH_SIZE = 32
STEPS = 40

digits = np.load("digits.npz")["x"]  # (rows, 64), 0 to 1
rng = np.random.default_rng(0)


def layer(n_in, n_out):
    return rng.normal(0, n_in**-0.5, (n_in, n_out)), np.zeros(n_out)


def perceptron(layers, x):
    (w, b), (v, c) = layers
    return np.tanh(x @ w + b) @ v + c


def loss(params, x):
    code = perceptron(params["encoder"], x)
    mean = code[:, :LATENT]
    log_variance = code[:, LATENT:]
    noise = rng.standard_normal(mean.shape, dtype=x.dtype)
    logits = perceptron(params["decoder"], mean + np.exp(log_variance / 2) * noise)
    reconstruction = np.sum(np.logaddexp(0, logits) - x * logits, axis=1)
    divergence = np.sum(np.exp(log_variance) + mean**2 - 1 - log_variance, axis=1) / 2
    return reconstruction + divergence


def objective(params, step):
    batch = digits[rng.integers(len(digits), size=BATCH_SIZE)]
    return np.mean(loss(params, batch))


def report(params, step, gradient):
    if step % 3 == 0:
        print(f"step {step}: loss {objective(params, step):.2f}")


params = {
    "encoder": [layer(64, HIDDEN), layer(HIDDEN, 2 * LATENT)],
    "decoder": [layer(LATENT, HIDDEN), layer(HIDDEN, 64)],
}
params = adam(grad(objective), params, report, STEPS, step_size=0.01)
