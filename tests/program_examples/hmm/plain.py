"""A hidden Markov model of three dice, fitted to rolls by expectation maximisation (Baum-Welch)."""

import numpy as np

N_STEPS = 40
N_DICE = 3
DICE = np.array(
    [
        [0.30, 0.30, 0.10, 0.10, 0.10, 0.10],
        [0.05, 0.05, 0.40, 0.40, 0.05, 0.05],
        [0.10, 0.10, 0.10, 0.10, 0.10, 0.50],
    ]
)


def roll(rng, n_sequences, length):
    """Return rolls (n_sequences, length); the die in use changes with probability 0.1."""
    rolls = np.empty((n_sequences, length), int)
    for sequence in rolls:
        die = rng.integers(N_DICE)
        for time in range(length):
            if rng.random() < 0.1:
                die = rng.integers(N_DICE)
            sequence[time] = rng.choice(6, p=DICE[die])
    return rolls


rolls = roll(np.random.default_rng(0), n_sequences=20, length=30)
n_sequences, length = rolls.shape

rng = np.random.default_rng(1)
start = np.full(N_DICE, 1 / N_DICE)
transition = rng.dirichlet(np.full(N_DICE, 5.0), size=N_DICE)
emission = rng.dirichlet(np.full(6, 5.0), size=N_DICE)

log_likelihoods = []
for _ in range(N_STEPS):
    # expectation: scaled forward and backward probabilities, (n_sequences, length, n_dice)
    likelihood = emission.T[rolls]
    forward = np.empty((n_sequences, length, N_DICE))
    backward = np.ones((n_sequences, length, N_DICE))
    scale = np.empty((n_sequences, length, 1))
    for t in range(length):
        before = forward[:, t - 1] @ transition if t > 0 else start
        forward[:, t] = before * likelihood[:, t]
        scale[:, t] = forward[:, t].sum(axis=1, keepdims=True)
        forward[:, t] /= scale[:, t]
    for t in range(length - 2, -1, -1):
        ahead = likelihood[:, t + 1] * backward[:, t + 1] / scale[:, t + 1]
        backward[:, t] = ahead @ transition.T
    posterior = forward * backward
    ahead = likelihood[:, 1:] * backward[:, 1:] / scale[:, 1:]
    pairs = transition * np.einsum("sti,stj->ij", forward[:, :-1], ahead)

    # maximisation
    start[:] = posterior[:, 0].mean(axis=0)
    transition[:] = pairs / pairs.sum(axis=1, keepdims=True)
    for face in range(6):
        emission[:, face] = posterior[rolls == face].sum(axis=0)
    emission /= emission.sum(axis=1, keepdims=True)
    log_likelihoods.append(np.log(scale).sum())

print(emission.round(2))
