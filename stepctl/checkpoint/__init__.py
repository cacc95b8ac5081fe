"""Checkpoints: what one file holds (codec), and which files there are (store)."""
