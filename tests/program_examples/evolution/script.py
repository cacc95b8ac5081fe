"""Evolution of sums of sines towards a square wave; each creature also inherits how far its children differ."""

import numpy as np

import stepctl

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

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, saved):
        vars(self).update(saved)


rng = np.random.default_rng(SEED)
population = [Creature(rng.standard_normal(N_GENES), 0.3) for _ in range(N_CREATURES)]

state = {"population": population}
with stepctl.loop("runs/evolution", state, last_step=N_STEPS, seed=SEED) as run:
    for _ in run:
        rng = run.rng("offspring")
        population.sort(key=lambda creature: creature.error)
        parents = population[:N_PARENTS]
        population[N_PARENTS:] = [
            parents[i].child(rng) for i in rng.integers(N_PARENTS, size=N_CREATURES - N_PARENTS)
        ]
        run.log(error=min(creature.error for creature in population))

best = min(population, key=lambda creature: creature.error)
print(f"error {best.error:.3f} of {best.genome.round(2)}")
