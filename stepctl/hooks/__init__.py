"""Hooks: what happens around the steps."""
