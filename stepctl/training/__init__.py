"""The training loop, and building its parts from a config."""
