"""Hooks: callbacks at the start of a segment, after each step and at the end."""

from __future__ import annotations

NAMES: dict[str, str] = {}  # every hook in a config is a user's own
