"""The values of a captured state as text, for reports. No code of a user is run.

value_texts('{"accepted": 3, "scale": {"$tuple": [1, 2]}}')
# {"accepted": "3", "scale": "(1, 2)"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, TypedDict

import numpy as np

from stepctl.state.generators import Json, encode_float
from stepctl.state.value_decoder import decode_value, parse
from stepctl.state.values import join

_MAX_LENGTH = 200  # characters of a value
_MAX_DIFFERENCES = 10_000
_MAX_DECIMAL_BITS = 10_000  # Python refuses to write much longer ints in decimal
_NOTHING: Json = object()


class ValueDifference(TypedDict):
    """Two values as text; None where there is none."""

    path: str  # "values/accepted"
    a: str | None
    b: str | None


class _Container(NamedTuple):
    kind: str
    items: dict[str, Json]


class _Brackets(NamedTuple):
    start: str
    end: str


_BRACKETS = {
    "list": _Brackets("[", "]"),
    "tuple": _Brackets("(", ")"),
    "dict": _Brackets("{", "}"),
    "object": _Brackets("object {", "}"),
}


def value_texts(values: str) -> dict[str, str]:
    """Return the top-level values as Python would write them, shortened, by key.

    Values that consist of arrays only are left out.
    """
    root = _as_container(parse(values))
    assert root is not None
    return {key: _text(item) for key, item in root.items.items() if not _is_of_arrays(item)}


def compare_values(a: str | None, b: str | None) -> list[ValueDifference]:
    """Return the first differences between two texts, each by its path; None is a task's."""
    if a == b:
        return []
    parsed_a = _NOTHING if a is None else parse(a)
    parsed_b = _NOTHING if b is None else parse(b)
    return list(islice(_differences(parsed_a, parsed_b, "values"), _MAX_DIFFERENCES))


def _differences(a: Json, b: Json, path: str) -> Iterator[ValueDifference]:
    one = _as_container(a)
    other = _as_container(b)
    if one is None or other is None or one.kind != other.kind:
        if a is _NOTHING or b is _NOTHING or json.dumps(a) != json.dumps(b):
            yield {"path": path, "a": _text(a), "b": _text(b)}
        return
    for key in dict.fromkeys([*one.items, *other.items]):
        item = one.items.get(key, _NOTHING)
        other_item = other.items.get(key, _NOTHING)
        yield from _differences(item, other_item, join(path, key))
    if one.items.keys() == other.items.keys() and list(one.items) != list(other.items):
        order = f"keys in the order {', '.join(one.items)}"
        other_order = f"keys in the order {', '.join(other.items)}"
        yield {"path": path, "a": order[:_MAX_LENGTH], "b": other_order[:_MAX_LENGTH]}


def _as_container(encoded: Json) -> _Container | None:
    if isinstance(encoded, list):
        return _Container("list", _numbered(encoded))
    if not isinstance(encoded, dict):
        return None
    if "$tuple" in encoded:
        return _Container("tuple", _numbered(encoded["$tuple"]))
    if "$dict" in encoded:
        return _Container("dict", dict(encoded["$dict"]))
    if "$object" in encoded:
        inner = _as_container(encoded["$object"])
        assert inner is not None
        return _Container("object", inner.items)
    if any(key.startswith("$") for key in encoded):
        return None
    return _Container("dict", encoded)


def _numbered(items: list[Json]) -> dict[str, Json]:
    return {str(index): item for index, item in enumerate(items)}


def _is_of_arrays(encoded: Json) -> bool:
    if isinstance(encoded, dict) and "$array" in encoded:
        return True
    container = _as_container(encoded)
    if container is None or not container.items:
        return False
    return all(_is_of_arrays(item) for item in container.items.values())


def _text(encoded: Json) -> Any:
    """Return a value as Python would write it, shortened; None for `_NOTHING`."""
    if encoded is _NOTHING:
        return None
    text = ""
    for piece in _pieces(encoded):
        text += piece
        if len(text) > _MAX_LENGTH:
            return f"{text[: _MAX_LENGTH - 4]} ..."
    return text


def _pieces(encoded: Json) -> Iterator[str]:
    container = _as_container(encoded)
    if container is None:
        yield _text_of_leaf(encoded)
        return
    is_sequence = container.kind in ("list", "tuple")
    brackets = _BRACKETS[container.kind]
    yield brackets.start
    separator = ""
    for key, item in container.items.items():
        yield separator
        if not is_sequence:
            yield f"{key!r}: "
        yield from _pieces(item)
        separator = ", "
    if container.kind == "tuple" and len(container.items) == 1:
        yield ","
    yield brackets.end


def _text_of_leaf(encoded: Json) -> str:
    if isinstance(encoded, dict) and "$array" in encoded:
        return "array"
    if isinstance(encoded, dict) and "$fortran" in encoded:
        return "array in Fortran order"
    value: Any = decode_value(encoded)
    if isinstance(value, np.generic):
        return f"{value.dtype.name} {value!s}"
    if isinstance(value, float) and np.isnan(value) and encoded != encode_float(float("nan")):
        return f"nan of the bits {encoded['$float']}"
    if isinstance(value, int) and value.bit_length() > _MAX_DECIMAL_BITS:
        return hex(value)
    if isinstance(value, np.random.Generator):
        return f"{type(value.bit_generator).__name__} generator {_digest(encoded)}"
    if isinstance(value, np.random.RandomState):
        return f"RandomState {_digest(encoded)}"
    return repr(value)


def _digest(encoded: Json) -> str:
    """Return a few digits that differ if the state of a generator differs."""
    return hashlib.sha256(json.dumps(encoded).encode()).hexdigest()[:12]
