"""A variational autoencoder of handwritten digits (Kingma and Welling 2014)."""

import autograd.numpy as np

import stepctl

HIDDEN = 24
LATENT = 4


def layer(rng, n_in, n_out):
    return rng.normal(0, n_in**-0.5, (n_in, n_out)), np.zeros(n_out)


def perceptron(layers, x):
    (w, b), (v, c) = layers
    return np.tanh(x @ w + b) @ v + c


class VAE(stepctl.LossModel):
    def initial_params(self, rng):
        rng = rng("weights")
        return {
            "encoder": [layer(rng, 64, HIDDEN), layer(rng, HIDDEN, 2 * LATENT)],
            "decoder": [layer(rng, LATENT, HIDDEN), layer(rng, HIDDEN, 64)],
        }

    def loss(self, params, x, y, rng):
        code = perceptron(params["encoder"], x)
        mean = code[:, :LATENT]
        log_variance = code[:, LATENT:]
        noise = rng("noise").standard_normal(mean.shape, dtype=x.dtype)
        logits = perceptron(params["decoder"], mean + np.exp(log_variance / 2) * noise)
        reconstruction = np.sum(np.logaddexp(0, logits) - x * logits, axis=1)
        divergence = np.sum(np.exp(log_variance) + mean**2 - 1 - log_variance, axis=1) / 2
        return reconstruction + divergence
