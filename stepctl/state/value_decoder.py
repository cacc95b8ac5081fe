"""The text of a captured state, `CapturedState.values`, as Python values. The text may be hostile.

    decode('{"accepted": 3, "scale": {"$tuple": [1, 2]}}', {})  # {"accepted": 3, "scale": (1, 2)}

No code of a user is run: an object is what its `state_dict` returned.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast, final

import numpy as np

from stepctl.errors import CheckpointError
from stepctl.state.arena import Array
from stepctl.state.generators import (
    Json,
    decode_bit_generator,
    decode_float,
    decode_random_state,
)
from stepctl.state.values import DTYPES, MAX_DEPTH, is_key, join
from stepctl.system.text import config_text, has_surrogate

_ROOT = "root"
_MALFORMED = (TypeError, ValueError, LookupError, AttributeError, OverflowError, struct.error)


@dataclass(frozen=True)
class SavedObject:
    """What `state_dict` of an object returned."""

    items: dict[str, Any]


def decode(
    values: str,
    arrays: Mapping[str, Array],
    make_object: Callable[[dict[str, Any]], Any] = SavedObject,
) -> dict[str, Any]:
    """Return the state of a text and its arrays by path. Arrays are not copied, except for Fortran order.

    `make_object` makes the value of an object from what its `state_dict` returned. CheckpointError if
    the text is not what `capture` writes, or does not refer to each array once.
    """
    decoder = _Decoder(arrays, make_object)
    try:
        state = decoder.state(parse(values))
    except RecursionError as error:
        raise CheckpointError("values", "/values is nested too deeply") from error
    decoder.refuse_unused_arrays()
    return state


def decode_value(encoded: Json) -> Any:
    """Return the value of parsed JSON that refers to no array."""
    return _Decoder({}, SavedObject).decode(encoded, "", depth=1)


def parse(values: str) -> Json:
    """Return the JSON value of a text; CheckpointError if it is not JSON, RecursionError if it is too deep."""
    try:
        return json.loads(values, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except ValueError as error:
        raise CheckpointError("values", f"/values is not JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    items = dict(pairs)
    if len(items) < len(pairs):
        raise ValueError("a key occurs twice")
    return items


@final
class _Decoder:
    """Decodes tagged JSON. Anything that `capture` does not write is refused."""

    def __init__(
        self, arrays: Mapping[str, Array], make_object: Callable[[dict[str, Any]], Any]
    ) -> None:
        self._arrays = arrays
        self._make_object = make_object
        self._unused = set(arrays)

    def refuse_unused_arrays(self) -> None:
        if self._unused:
            raise CheckpointError("values", f"/values does not refer to /state/{min(self._unused)}")

    def state(self, encoded: Json) -> dict[str, Any]:
        """Decode a whole text, which must be a dict."""
        state = self.decode(encoded, "", depth=0)
        if not isinstance(state, dict):
            self._refuse("", encoded)
        return state

    def _items(self, encoded: Json, path: str) -> list[tuple[str, Json]]:
        """Return the encoded items of a dict."""
        if not isinstance(encoded, dict):
            self._refuse(path, encoded)
        if set(encoded) == {"$dict"}:
            return self._pairs(encoded["$dict"], path)
        if any(key.startswith("$") or not is_key(key) for key in encoded):
            self._refuse(path, encoded)
        return list(encoded.items())

    def _pairs(self, encoded: Json, path: str) -> list[tuple[str, Json]]:
        items = [(key, item) for key, item in encoded]
        if not all(is_key(key) for key, _ in items) or len(dict(items)) < len(items):
            self._refuse(path, encoded)
        return items

    def decode(self, encoded: Json, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            self._refuse(path, encoded)
        if isinstance(encoded, list):
            return self._list(encoded, path, depth)
        if isinstance(encoded, str) and has_surrogate(encoded):
            self._refuse(path, encoded)
        if not isinstance(encoded, dict):
            return encoded
        if len(encoded) == 1:
            (tag, content), *_ = encoded.items()
            decode = self._TAGS.get(tag)
            if decode is not None:
                try:
                    return decode(self, content, path, depth)
                except _MALFORMED as error:
                    where = path or _ROOT
                    raise CheckpointError("values", f"/values, {where}: {error}") from error
        return self._dict(encoded, path, depth)

    def _refuse(self, path: str, encoded: Json) -> NoReturn:
        raise CheckpointError(
            "values", f"/values, {path or _ROOT}: unexpected {config_text(encoded)}"
        )

    def _list(self, encoded: Json, path: str, depth: int) -> list[Any]:
        if not isinstance(encoded, list):
            self._refuse(path, encoded)
        return [
            self.decode(item, join(path, str(index)), depth + 1)
            for index, item in enumerate(encoded)
        ]

    def _tuple(self, encoded: Json, path: str, depth: int) -> tuple[Any, ...]:
        return tuple(self._list(encoded, path, depth))

    def _dict(self, encoded: Json, path: str, depth: int) -> dict[str, Any]:
        return {
            key: self.decode(item, join(path, key), depth + 1)
            for key, item in self._items(encoded, path)
        }

    def _tagged_dict(self, pairs: Json, path: str, depth: int) -> dict[str, Any]:
        return self._dict({"$dict": pairs}, path, depth)

    def _object(self, encoded: Json, path: str, depth: int) -> Any:
        return self._make_object(self._dict(encoded, path, depth))

    def _array(self, name: Json, path: str, depth: int) -> Array:
        if name != path or name not in self._unused:
            self._refuse(path, name)
        self._unused.discard(name)
        return self._arrays[name]

    def _fortran(self, name: Json, path: str, depth: int) -> Array:
        return np.asfortranarray(self._array(name, path, depth))

    def _int(self, digits: Json, path: str, depth: int) -> int:
        return int(digits, 16)

    def _float(self, digits: Json, path: str, depth: int) -> float:
        return decode_float({"$float": digits})

    def _complex(self, parts: Json, path: str, depth: int) -> complex:
        real, imaginary = parts
        return complex(decode_float(real), decode_float(imaginary))

    def _bytes(self, text: Json, path: str, depth: int) -> bytes:
        return base64.b64decode(text, validate=True)

    def _scalar(self, parts: Json, path: str, depth: int) -> np.generic:
        name, digits = parts
        if name not in DTYPES:
            self._refuse(path, parts)
        data = bytes.fromhex(digits)
        if name == "bool" and data not in (b"\0", b"\1"):
            self._refuse(path, parts)
        (scalar,) = np.frombuffer(data, np.dtype(name).newbyteorder("<")).astype(name)
        return cast(np.generic, scalar)

    def _generator(self, content: Json, path: str, depth: int) -> np.random.Generator:
        return np.random.Generator(decode_bit_generator(content))

    def _random_state(self, content: Json, path: str, depth: int) -> np.random.RandomState:
        return decode_random_state(content)

    _TAGS: ClassVar[dict[str, Callable[..., Any]]] = {
        "$array": _array,
        "$fortran": _fortran,
        "$tuple": _tuple,
        "$dict": _tagged_dict,
        "$int": _int,
        "$float": _float,
        "$complex": _complex,
        "$bytes": _bytes,
        "$scalar": _scalar,
        "$generator": _generator,
        "$random_state": _random_state,
        "$object": _object,
    }
