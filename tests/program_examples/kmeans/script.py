"""k-means (Lloyd) until no point changes its cluster."""

import numpy as np

import stepctl

N_POINTS = 800
N_CLUSTERS = 12

points = np.random.default_rng(1).random((N_POINTS, 2))

rng = np.random.default_rng(12)
centers = rng.choice(points, N_CLUSTERS, replace=False)
labels = np.full(N_POINTS, -1)

state = {"centers": centers, "labels": labels}
with stepctl.loop("runs/kmeans", state, last_step=1000) as run:
    for _ in run:
        distances = ((points[:, None] - centers) ** 2).sum(axis=2)
        nearest = distances.argmin(axis=1)
        n_changed = np.count_nonzero(nearest != labels)
        labels[:] = nearest
        for j in range(N_CLUSTERS):
            members = points[labels == j]
            centers[j] = members.mean(axis=0)
        run.log(inertia=distances.min(axis=1).sum())
        if n_changed == 0:
            run.stop("no point changed its cluster")

print(f"{N_CLUSTERS} clusters after {run.global_step} steps")
