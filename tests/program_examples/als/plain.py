"""Matrix factorisation by alternating least squares, from half of the ratings."""

import numpy as np

N_STEPS = 40
N_USERS, N_ITEMS, RANK = 60, 40, 3
PENALTY = 0.1


def solve(ratings, known, factors):
    """Return the rows that fit the known ratings best: ridge regression on the other side's factors."""
    gram = np.einsum("ij,jk,jl->ikl", known, factors, factors) + PENALTY * np.eye(RANK)
    return np.linalg.solve(gram, ((ratings * known) @ factors)[:, :, None])[:, :, 0]


rng = np.random.default_rng(0)
ratings = rng.standard_normal((N_USERS, RANK)) @ rng.standard_normal((RANK, N_ITEMS))
ratings += 0.1 * rng.standard_normal(ratings.shape)
known = rng.random(ratings.shape) < 0.5

rng = np.random.default_rng(1)
users = rng.standard_normal((N_USERS, RANK))
items = rng.standard_normal((N_ITEMS, RANK))

errors = []
for _ in range(N_STEPS):
    users = solve(ratings, known, items)
    items = solve(ratings.T, known.T, users)
    residuals = (ratings - users @ items.T)[~known]
    errors.append(np.sqrt(np.mean(residuals**2)))

print((users @ items.T).round(1))
