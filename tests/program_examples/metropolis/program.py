"""Metropolis sampling of a banana-shaped density, with a chain that grows and a Generator that is carried along."""

import numpy as np

import stepctl

SCALE = 0.8


def log_density(x):
    """Return the logarithm of Rosenbrock's density, up to a constant."""
    return -((1 - x[0]) ** 2) - 5 * (x[1] - x[0] ** 2) ** 2


class Metropolis(stepctl.Program):
    """One step adds a sample to the chain."""

    def __init__(self, *, scale: float = SCALE):
        self.scale = scale

    def initial_state(self, rng):
        rng = np.random.default_rng(0)
        x = np.zeros(2)
        return {"rng": rng, "x": x, "chain": np.empty((0, 2)), "accepted": 0}

    def step(self, state, step, rng):
        rng = state["rng"]
        x = state["x"]
        proposal = x + self.scale * rng.standard_normal(2)
        if np.log(rng.random()) < log_density(proposal) - log_density(x):
            x[:] = proposal
            state["accepted"] += 1
        state["chain"] = np.vstack([state["chain"], x])
        return {"log_density": log_density(x)}
