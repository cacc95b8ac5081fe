"""Messages as snapshots hold them: what differs from run to run is replaced by fixed words."""

from __future__ import annotations

import re

TOP_LEVEL_KEYS = r"(?<=allowed: seed, ).*"  # the list of a message about an unknown key


def without_paths(text: str, patterns: tuple[str, ...] = (), **paths: object) -> str:
    """Return a text with each path replaced by its keyword, and each match of a pattern by "...".

    without_paths("/tmp/x/a.npz: no such file", HERE="/tmp/x") == "HERE/a.npz: no such file"
    """
    for keyword, path in paths.items():
        text = text.replace(str(path), keyword)
    for pattern in patterns:
        text = re.sub(pattern, "...", text)
    return text


def normalize(output: str, patterns: tuple[str, ...] = (), **paths: object) -> str:
    """Return what a command printed, which ends with a newline, without that and without paths."""
    assert output.endswith("\n"), output
    return without_paths(output.removesuffix("\n"), patterns, **paths)
