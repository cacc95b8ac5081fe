"""Layers: the pieces that models are made of, one a file."""
