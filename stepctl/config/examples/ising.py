"""The two-dimensional Ising model, sampled with the Metropolis algorithm."""

import numpy as np

import stepctl


class Ising(stepctl.Program):
    """Spins of -1 or 1 on a square grid with periodic boundaries; one step is one sweep over all of them.

    Args:
        size: Spins in a row and in a column; even.
        temperature: In units of the coupling; the critical one is 2.269.
        burn_in: Steps before the averages begin.
    """

    def __init__(self, *, size: int = 64, temperature: float = 2.0, burn_in: int = 0):
        self.temperature = temperature
        self.burn_in = burn_in
        rows, columns = np.indices((size, size))
        black = (rows + columns) % 2 == 0
        self.colors = (black, ~black)
        self.size = size

    def initial_state(self, rng):
        spins = np.ones((self.size, self.size), np.int8)
        return {"spins": spins, "n": 0, "energy_sum": 0.0, "magnetization_sum": 0.0}

    def step(self, state, step, rng):
        spins = state["spins"]
        for (
            color
        ) in self.colors:  # the neighbors of a black spin are white, so all can flip at once
            cost = 2 * spins * neighbor_sum(spins)
            flips = rng("flips").random(spins.shape) < np.exp(-cost / self.temperature)
            spins[flips & color] *= -1
        if step >= self.burn_in:
            state["n"] += 1
            state["energy_sum"] += -0.5 * np.mean(spins * neighbor_sum(spins))
            state["magnetization_sum"] += abs(np.mean(spins))
        n = max(state["n"], 1)
        return {
            "energy": state["energy_sum"] / n,
            "magnetization": state["magnetization_sum"] / n,
        }


def neighbor_sum(spins):
    return (
        np.roll(spins, 1, axis=0)
        + np.roll(spins, -1, axis=0)
        + np.roll(spins, 1, axis=1)
        + np.roll(spins, -1, axis=1)
    )
