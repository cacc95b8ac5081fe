"""Metropolis sampling of a banana-shaped density, with a chain that grows and a Generator that is carried along."""

import numpy as np

import stepctl

N_STEPS = 40
SCALE = 0.8


def log_density(x):
    """Return the logarithm of Rosenbrock's density, up to a constant."""
    return -((1 - x[0]) ** 2) - 5 * (x[1] - x[0] ** 2) ** 2


rng = np.random.default_rng(0)
x = np.zeros(2)
state = {"rng": rng, "x": x, "chain": np.empty((0, 2)), "accepted": 0}
with stepctl.loop("runs/metropolis", state, last_step=N_STEPS) as run:
    for _ in run:
        proposal = x + SCALE * rng.standard_normal(2)
        if np.log(rng.random()) < log_density(proposal) - log_density(x):
            x[:] = proposal
            state["accepted"] += 1
        state["chain"] = np.vstack([state["chain"], x])
        run.log(log_density=log_density(x))

print(state["chain"])
