"""Checks of this machine and of the file system that holds the runs."""
