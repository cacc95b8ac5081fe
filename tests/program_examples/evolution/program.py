"""Evolution of sums of sines towards a square wave; each creature also inherits how far its children differ."""

import numpy as np

import stepctl

N_PARENTS = 8
N_CREATURES = 20
N_GENES = 6
TIMES = np.linspace(0, 1, 50)
SINES = np.sin(2 * np.pi * np.outer(TIMES, np.arange(1, N_GENES + 1)))
TARGET = np.sign(np.sin(2 * np.pi * TIMES))


class Creature:
    """The amplitudes of a sum of sines, and the spread of its children around it."""

    def __init__(self, genome, spread):
        self.genome = genome
        self.spread = spread
        self.error = np.mean((SINES @ genome - TARGET) ** 2)

    def child(self, rng):
        """Return a mutated copy."""
        spread = self.spread * np.exp(0.3 * rng.standard_normal())
        return Creature(self.genome + spread * rng.standard_normal(N_GENES), spread)

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, saved):
        vars(self).update(saved)


class Evolution(stepctl.Program):
    """One step is one generation."""

    def initial_state(self, rng):
        rng = np.random.default_rng(0)
        population = [Creature(rng.standard_normal(N_GENES), 0.3) for _ in range(N_CREATURES)]
        return {"population": population}

    def step(self, state, step, rng):
        rng = rng("offspring")
        population = state["population"]
        population.sort(key=lambda creature: creature.error)
        parents = population[:N_PARENTS]
        population[N_PARENTS:] = [
            parents[i].child(rng) for i in rng.integers(N_PARENTS, size=N_CREATURES - N_PARENTS)
        ]
        return {"error": min(creature.error for creature in population)}
