"""Layers, one per file."""
