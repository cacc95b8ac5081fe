"""Matrix factorisation by alternating least squares, from half of the ratings."""

import numpy as np

import stepctl

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


class ALS(stepctl.Program):
    """One step solves for the users' factors, and then for the items'."""

    def initial_state(self, rng):
        rng = np.random.default_rng(1)
        users = rng.standard_normal((N_USERS, RANK))
        items = rng.standard_normal((N_ITEMS, RANK))
        return {"users": users, "items": items}

    def step(self, state, step, rng):
        state["users"] = solve(ratings, known, state["items"])
        state["items"] = solve(ratings.T, known.T, state["users"])
        residuals = (ratings - state["users"] @ state["items"].T)[~known]
        return {"error": np.sqrt(np.mean(residuals**2))}
