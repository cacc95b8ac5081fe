"""Checkpoints: the file format, and the files of a run."""
