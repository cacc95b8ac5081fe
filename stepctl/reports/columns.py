"""The columns and the classes of a run's data, as its config records them."""

from collections.abc import Iterable, Mapping
from typing import Any

from stepctl.system.text import in_one_line

_MAX_LENGTH = 160  # characters of a line


def described_columns(data: Mapping[str, Any]) -> list[str]:
    """Return the name of each column, with its kind unless it holds numbers; [] without names.

    `data` is the data section of a resolved config.
    """
    names = data.get("names") or []
    if not names:
        return []
    try:
        return _described(data, names)
    except (AttributeError, IndexError, KeyError, TypeError):  # a file may hold any config
        return []


def _described(data: Mapping[str, Any], names: list[str]) -> list[str]:
    kinds = {encoding["column"]: encoding for encoding in data.get("encodings") or []}
    target = data.get("target")
    if isinstance(target, int):
        target = names[target]
    chosen = data.get("columns")
    used = names if chosen is None else [_name(each, names) for each in chosen]
    excluded = {_name(each, names) for each in data.get("exclude") or []}
    found = []
    for name in used:
        if name == target or name in excluded:
            continue
        encoding = kinds.get(name)
        if encoding is None:
            found.append(name)
        elif encoding["kind"] == "boolean":
            found.append(f"{name} (boolean)")
        else:
            found.append(f"{name} ({len(encoding['categories'])} categories)")
    if target is not None:
        found.append(f"{target} (target)")
    return found


def _name(column: str | int, names: list[str]) -> str:
    return names[column] if isinstance(column, int) else column


def listed(words: Iterable[object]) -> str:
    """Return words in one line of limited length."""
    return in_one_line(", ".join(map(str, words)), _MAX_LENGTH)
