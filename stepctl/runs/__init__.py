"""Runs: creating, resuming, forking and pruning them."""
