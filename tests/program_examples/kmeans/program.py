"""k-means (Lloyd) until no point changes its cluster.

The config ends the run: stop: {last_step: 1000, when: {metric: n_changed, below: 1}}.
"""

import numpy as np

import stepctl

N_POINTS = 800
N_CLUSTERS = 12

points = np.random.default_rng(1).random((N_POINTS, 2))


class KMeans(stepctl.Program):
    """One step assigns each point to its nearest center, and moves the centers."""

    def initial_state(self, rng):
        rng = np.random.default_rng(12)
        centers = rng.choice(points, N_CLUSTERS, replace=False)
        labels = np.full(N_POINTS, -1)
        return {"centers": centers, "labels": labels}

    def step(self, state, step, rng):
        centers = state["centers"]
        labels = state["labels"]
        distances = ((points[:, None] - centers) ** 2).sum(axis=2)
        nearest = distances.argmin(axis=1)
        n_changed = np.count_nonzero(nearest != labels)
        labels[:] = nearest
        for j in range(N_CLUSTERS):
            members = points[labels == j]
            centers[j] = members.mean(axis=0)
        return {"inertia": distances.min(axis=1).sum(), "n_changed": n_changed}
