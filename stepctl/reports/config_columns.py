"""The config keys that differ between runs, and their names as the heads of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepctl.config.keys import DECIDED_KEYS

_SECTIONS = ("optimizer", "model", "program", "data")  # come first, in this order
_TARGET = ("stop.last_step", "stop.num_steps")  # has a column of its own
_LEFT_OUT = frozenset((*_TARGET, *DECIDED_KEYS))


def differing_values(configs: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Return for each flat config its values of the keys that differ; {} where it is None.

    A key differs if at least two of the configs have it, with different values; those that a run
    decides from its data do not count. The keys of the optimizer come first, then those of the
    model, the program, the data, and all others.
    """
    keys = dict.fromkeys(key for config in configs for key in config or {})
    differing = [key for key in keys if key not in _LEFT_OUT and _differs(key, configs)]
    differing.sort(key=_rank)
    return [{key: (config or {}).get(key) for key in differing if config} for config in configs]


def _rank(key: str) -> int:
    section = key.partition(".")[0]
    return _SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS)


def _differs(key: str, configs: Sequence[dict[str, Any] | None]) -> bool:
    values = [config[key] for config in configs if config is not None and key in config]
    return any(value != values[0] for value in values)


def short_names(keys: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Return the shortest ends of dotted keys that are unique and not `taken`.

    A rate that is written as a number has the key `learning_rate.value`; the end is left out.
    """
    parts_of = [key.removesuffix(".value").split(".") for key in keys]
    names = []
    for parts in parts_of:
        for length in range(1, len(parts) + 1):
            same_end = [other for other in parts_of if other[-length:] == parts[-length:]]
            name = ".".join(parts[-length:])
            if len(same_end) == 1 and name not in taken:
                break
        names.append(name)
    return names
