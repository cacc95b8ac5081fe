"""Hamiltonian Monte Carlo sampling of a correlated normal distribution (Neal 2011), whose samples form a series."""

import numpy as np

import stepctl

N_STEPS = 40
STEP_SIZE = 0.3
N_LEAPS = 5
PRECISION = np.linalg.inv([[1.0, 0.8], [0.8, 1.0]])


def potential(x):
    return x @ PRECISION @ x / 2


def leapfrog(x, momentum):
    """Return position and momentum after a simulation of the dynamics."""
    momentum = momentum - STEP_SIZE / 2 * (PRECISION @ x)
    for leap in range(N_LEAPS):
        x = x + STEP_SIZE * momentum
        size = STEP_SIZE if leap < N_LEAPS - 1 else STEP_SIZE / 2
        momentum = momentum - size * (PRECISION @ x)
    return x, momentum


rng = np.random.default_rng(0)
x = np.zeros(2)
state = {"rng": rng, "x": x, "accepted": 0}
with stepctl.loop("runs/hmc", state, last_step=N_STEPS) as run:
    for _ in run:
        momentum = rng.standard_normal(2)
        proposal, end = leapfrog(x, momentum)
        energy = potential(x) + momentum @ momentum / 2
        if np.log(rng.random()) < energy - potential(proposal) - end @ end / 2:
            x[:] = proposal
            state["accepted"] += 1
        run.append("samples", x)
        run.log(potential=potential(x))

print(state["accepted"] / N_STEPS)
