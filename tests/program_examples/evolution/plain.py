"""Evolution of sums of sines towards a square wave; each creature also inherits how far its children differ."""

import numpy as np

from tests.program_examples.streams import stream

SEED = 0
N_STEPS = 40
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


rng = np.random.default_rng(SEED)
population = [Creature(rng.standard_normal(N_GENES), 0.3) for _ in range(N_CREATURES)]

errors = []
for step in range(N_STEPS):
    rng = stream(SEED, "offspring", step)
    population.sort(key=lambda creature: creature.error)
    parents = population[:N_PARENTS]
    population[N_PARENTS:] = [
        parents[i].child(rng) for i in rng.integers(N_PARENTS, size=N_CREATURES - N_PARENTS)
    ]
    errors.append(min(creature.error for creature in population))

best = min(population, key=lambda creature: creature.error)
print(f"error {best.error:.3f} of {best.genome.round(2)}")
