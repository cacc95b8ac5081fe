"""Training on several processes: MPI, and the sum of gradients over ranks."""
