"""k-means (Lloyd) until no point changes its cluster."""

import numpy as np

N_POINTS = 800
N_CLUSTERS = 12

points = np.random.default_rng(1).random((N_POINTS, 2))

rng = np.random.default_rng(12)
centers = rng.choice(points, N_CLUSTERS, replace=False)
labels = np.full(N_POINTS, -1)

inertias = []
while True:
    distances = ((points[:, None] - centers) ** 2).sum(axis=2)
    nearest = distances.argmin(axis=1)
    n_changed = np.count_nonzero(nearest != labels)
    labels[:] = nearest
    for j in range(N_CLUSTERS):
        members = points[labels == j]
        centers[j] = members.mean(axis=0)
    inertias.append(distances.min(axis=1).sum())
    if n_changed == 0:
        break

print(f"inertia {inertias[-1]:.3f} after {len(inertias)} steps")
