"""Train NumPy models from the command line; stop anywhere and resume at the exact global step."""

__version__ = "0.1.0"
