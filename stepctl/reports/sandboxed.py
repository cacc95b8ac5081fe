"""Reports computed in a sandbox; the calling process loads no NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepctl.reports.diff import CheckpointComparison
    from stepctl.reports.inspect import Inspection


def inspect_path(path: str, pattern: str) -> Inspection:
    """Call `reports.inspect.inspect_path`."""
    from stepctl.reports import inspect

    return inspect.inspect_path(path, pattern)


def compare_paths(path: str, other: str) -> CheckpointComparison:
    """Call `reports.diff.compare_paths`."""
    from stepctl.reports import diff

    return diff.compare_paths(path, other)
