"""k-means (Lloyd) of a table whose last column is a label."""

import numpy as np

import stepctl


class KMeans(stepctl.Program):
    """One step assigns each row to its nearest center, and moves the centers to the means of their rows.

    Args:
        table: A CSV file, which may be compressed. The last column is used by `evaluate` only.
        n_clusters: The number of centers, which start at random rows.
    """

    def __init__(self, *, table: stepctl.File, n_clusters: int):
        columns = np.loadtxt(table, delimiter=",")
        self.rows = columns[:, :-1]
        self.labels = columns[:, -1].astype(int)
        self.n_clusters = n_clusters

    def initial_state(self, rng):
        centers = rng("centers").choice(self.rows, self.n_clusters, replace=False)
        return {"centers": centers, "nearest": np.full(len(self.rows), -1)}

    def step(self, state, step, rng):
        centers = state["centers"]
        distances = ((self.rows[:, None] - centers) ** 2).sum(axis=2)
        nearest = distances.argmin(axis=1)
        n_changed = np.count_nonzero(nearest != state["nearest"])
        state["nearest"] = nearest
        for cluster in np.unique(nearest):
            centers[cluster] = self.rows[nearest == cluster].mean(axis=0)
        return {"inertia": distances.min(axis=1).sum(), "n_changed": n_changed}

    def evaluate(self, state, rng):
        """Return the share of rows whose label is the most frequent one of their cluster."""
        counts = np.zeros((self.n_clusters, self.labels.max() + 1), int)
        np.add.at(counts, (state["nearest"], self.labels), 1)
        return {"purity": counts.max(axis=1).sum() / len(self.labels)}
