"""Metropolis sampling of a banana-shaped density, with a chain that grows and a Generator that is carried along."""

import numpy as np

N_STEPS = 40
SCALE = 0.8


def log_density(x):
    """Return the logarithm of Rosenbrock's density, up to a constant."""
    return -((1 - x[0]) ** 2) - 5 * (x[1] - x[0] ** 2) ** 2


rng = np.random.default_rng(0)
x = np.zeros(2)
chain = np.empty((0, 2))
accepted = 0

log_densities = []
for _ in range(N_STEPS):
    proposal = x + SCALE * rng.standard_normal(2)
    if np.log(rng.random()) < log_density(proposal) - log_density(x):
        x[:] = proposal
        accepted += 1
    chain = np.vstack([chain, x])
    log_densities.append(log_density(x))

print(chain)
