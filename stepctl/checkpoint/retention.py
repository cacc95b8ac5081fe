"""Which checkpoints to keep: a pure function of their steps."""

from collections.abc import Iterable


def to_prune(steps: Iterable[int], keep_last: int | None) -> list[int]:
    """Return the steps to remove, oldest first: all but the `keep_last` highest (None keeps all)."""
    ordered = sorted(steps)
    return ordered[:-keep_last] if keep_last is not None else []
