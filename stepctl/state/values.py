"""The state of a user's program as arrays by path and one JSON text.

    captured = capture({"x": np.zeros(3), "accepted": 0, "rng": np.random.default_rng(0)})
    captured.arrays  # {"x": array([0., 0., 0.])}, copies
    captured.values  # '{"x": {"$array": "x"}, "accepted": 0, "rng": {"$generator": ...}}'

JSON holds what it can express exactly. Everything else is an object with one key that begins with "$":

    $array      path of an array in `arrays`
    $fortran    path of an array in `arrays` that is Fortran-contiguous, and not C-contiguous
    $tuple      list of items
    $dict       list of [key, value], for a dict whose keys begin with "$"
    $int        hexadecimal digits of an int beyond 64 bits
    $float      16 hexadecimal digits, the big-endian bits of a NaN or an infinity
    $complex    [real, imaginary]
    $bytes      base64
    $scalar     [dtype, hexadecimal bytes] of a NumPy scalar, little-endian
    $generator, $random_state   state and seed sequence of a NumPy generator
    $object     what `state_dict()` of an object returned

`value_decoder.decode` is the way back.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import numpy as np

from stepctl.errors import ConfigError
from stepctl.state.arena import Array
from stepctl.state.generators import (
    Json,
    encode_bit_generator,
    encode_float,
    encode_state,
    refuse_bit_generator,
)
from stepctl.state.streams import StreamGenerator
from stepctl.system.text import a_or_an, has_surrogate, in_one_line
from stepctl.system.user_code import describe_error

DTYPES = frozenset(
    np.dtype(code).name
    for code in ["?", "b", "h", "i", "q", "B", "H", "I", "Q", "e", "f", "d", "F", "D"]
)  # bool, integers, float16 to float64, complex64 and complex128
# A text of this length is written in a tenth of a second, on the training thread, and read within
# the time and memory that a file which may be hostile is allowed.
MAX_TEXT = 1 << 20
MAX_OBJECTS = 5_000  # arrays, and the containers that hold them; each is an object of the file
MAX_DEPTH = 100  # levels of nesting
MAX_KEY_BYTES = 255
USER_CODE_ERRORS = (Exception, SystemExit)
_LARGEST_JSON_INT = 1 << 63
_MAX_SHOWN = 60  # characters of a value in a message


def _copy(path: str, array: Array) -> Array:
    return array.copy(order="K")


@dataclass(frozen=True)
class CapturedState:
    """A copy of a program's state.

    arrays: path -> array, C- or Fortran-contiguous. values: tagged JSON that refers to the arrays by their paths.
    """

    arrays: Mapping[str, Array]
    values: str

    def capture(self) -> CapturedState:
        """Return itself: it never changes."""
        return self

    def view(self) -> CapturedState:
        """Return itself."""
        return self


def capture(state: Mapping[str, Any], copy: Callable[[str, Array], Array] = _copy) -> CapturedState:
    """Return a copy of a state. Raises ConfigError, with the path, for a value that no checkpoint can hold.

    `copy` copies the array of a path, in its memory order.
    """
    encoder = _Encoder(copy)
    encoded = encoder.encode(dict(state), "")
    encoder.refuse_shared_memory()
    text = _dumps(encoded)
    if len(text) > MAX_TEXT:
        items = dict(encoded["$dict"]) if "$dict" in encoded else encoded
        sizes = {key: len(_dumps(item)) for key, item in items.items()}
        key = max(sizes, key=sizes.__getitem__)
        raise ConfigError(
            f"{place(key)}: is {sizes[key]:,} bytes of text; a checkpoint holds {MAX_TEXT:,} outside of "
            "arrays; keep many numbers, or bytes, in a NumPy array"
        )
    return CapturedState(encoder.arrays, text)


def _dumps(encoded: Json) -> str:
    return json.dumps(encoded, separators=(",", ":"))


@final
class _Encoder:
    """Encodes one state. Refuses containers and memory that two paths share: a restore would separate them."""

    def __init__(self, copy: Callable[[str, Array], Array]) -> None:
        self._copy = copy
        self.arrays: dict[str, Array] = {}
        self._folders: set[str] = set()  # containers that hold arrays
        self._paths: dict[int, str] = {}  # id of a mutable object -> its path
        self._kept: list[object] = []  # results of `state_dict`, kept alive so that no id is reused
        self._memory: list[tuple[int, int, str]] = []  # (first byte, end, path) of each array

    def encode(self, value: Any, path: str, depth: int = 0) -> Json:
        if depth > MAX_DEPTH:
            raise ConfigError(f"{place(path)}: is nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, np.generic):
            return self._scalar(value, path, depth)
        encode = self._BY_TYPE.get(type(value))
        if encode is not None:
            return encode(self, value, path, depth)
        return self._object(value, path, depth)

    def refuse_shared_memory(self) -> None:
        """Raise ConfigError if two of the arrays overlap."""
        spans = sorted(self._memory)
        for (_, end, path), (start, _, other_path) in pairwise(spans):
            if start < end:
                raise ConfigError(
                    f"{place(path)} and {place(other_path)} share memory; copy one of them"
                )

    def _same(self, value: bool | None, path: str, depth: int) -> Json:
        return value

    def _str(self, value: str, path: str, depth: int) -> Json:
        if has_surrogate(value):
            raise ConfigError(f"{place(path)}: {_shown(value)} cannot be encoded as UTF-8")
        return value

    def _int(self, value: int, path: str, depth: int) -> Json:
        if -_LARGEST_JSON_INT <= value < _LARGEST_JSON_INT:
            return value
        return {"$int": hex(value)}

    def _float(self, value: float, path: str, depth: int) -> Json:
        return encode_float(value)

    def _complex(self, value: complex, path: str, depth: int) -> Json:
        return {"$complex": [encode_float(value.real), encode_float(value.imag)]}

    def _bytes(self, value: bytes, path: str, depth: int) -> Json:
        return {"$bytes": base64.b64encode(value).decode()}

    def _scalar(self, value: np.generic, path: str, depth: int) -> Json:
        _refuse_dtype(value.dtype, path)
        little_endian = np.asarray(value, value.dtype.newbyteorder("<"))
        return {"$scalar": [value.dtype.name, little_endian.tobytes().hex()]}

    def _tuple(self, value: tuple[Any, ...], path: str, depth: int) -> Json:
        return {"$tuple": self._items(value, path, depth)}

    def _list(self, value: list[Any], path: str, depth: int) -> Json:
        self._refuse_shared(value, path)
        return self._items(value, path, depth)

    def _generator(self, value: np.random.Generator, path: str, depth: int) -> Json:
        self._refuse_shared(value.bit_generator, path)
        return {"$generator": encode_bit_generator(value.bit_generator, place(path))}

    def _random_state(self, value: np.random.RandomState, path: str, depth: int) -> Json:
        self._refuse_shared(value._bit_generator, path)
        state = value.get_state(legacy=False)
        refuse_bit_generator(state["bit_generator"], place(path))
        return {"$random_state": encode_state(state)}

    def _stream(self, value: StreamGenerator, path: str, depth: int) -> Json:
        raise ConfigError(
            f"{place(path)}: is {value!r}, whose draws belong to one step, so it cannot be part of the "
            "state; call rng in each step, or store a generator of your own: "
            f"np.random.default_rng({value!r}.integers(1 << 63))"
        )

    def _array(self, array: Array, path: str, depth: int) -> Json:
        self._refuse_shared(array, path)
        _refuse_dtype(array.dtype, path)
        if not (array.flags.c_contiguous or array.flags.f_contiguous):
            raise ConfigError(
                f"{place(path)}: is a view with strides {array.strides}; store a contiguous array: "
                "np.ascontiguousarray(...)"
            )
        if array.dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
            raise ConfigError(
                f"{place(path)}: a bool array with a byte that is neither 0 nor 1, as a view of other "
                "numbers has; use array != 0"
            )
        if array.size:
            start = array.__array_interface__["data"][0]
            self._memory.append((start, start + array.nbytes, path))
        self._count_objects(path)
        self.arrays[path] = self._copy(path, array)
        return {"$array" if array.flags.c_contiguous else "$fortran": path}

    def _count_objects(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        while folder and folder not in self._folders:
            self._folders.add(folder)
            folder = folder.rpartition("/")[0]
        if len(self.arrays) + len(self._folders) >= MAX_OBJECTS:
            raise ConfigError(
                f"{place(path)}: the state has more than {MAX_OBJECTS:,} arrays and containers of arrays; "
                "keep arrays of equal shapes in one array: np.stack(...)"
            )

    def _items(self, items: list[Any] | tuple[Any, ...], path: str, depth: int) -> list[Json]:
        return [
            self.encode(item, join(path, str(index)), depth + 1) for index, item in enumerate(items)
        ]

    def _dict(self, items: Mapping[Any, Any], path: str, depth: int) -> Json:
        self._refuse_shared(items, path)
        for key in items:
            _refuse_key(key, path)
        encoded = {
            key: self.encode(item, join(path, key), depth + 1) for key, item in items.items()
        }
        if any(key.startswith("$") for key in encoded):
            return {"$dict": [[key, item] for key, item in encoded.items()]}
        return encoded

    def _object(self, value: Any, path: str, depth: int) -> Json:
        if not (has_method(value, "state_dict") and has_method(value, "load_state_dict")):
            raise ConfigError(
                f"{place(path)}: {a_or_an(type(value).__name__)} cannot be saved; use NumPy arrays, numbers, text, "
                "lists, dicts, generators, or an object with state_dict() and load_state_dict()"
            )
        self._refuse_shared(value, path)
        try:
            found = value.state_dict()
        except USER_CODE_ERRORS as error:
            raise ConfigError(
                f"{place(path)}: state_dict() failed: {in_one_line(describe_error(error))}"
            ) from error
        if not isinstance(found, Mapping):
            kind = type(found).__name__
            raise ConfigError(f"{place(path)}: state_dict() returned a {kind}; a dict is needed")
        items = dict(found)
        self._kept.append(items)
        return {"$object": self._dict(items, path, depth)}

    def _refuse_shared(self, value: object, path: str) -> None:
        first = self._paths.setdefault(id(value), path)
        if first != path:
            raise ConfigError(f"{place(first)} and {place(path)} are the same object; copy one")

    _BY_TYPE: ClassVar[dict[type, Callable[..., Json]]] = {
        type(None): _same,
        bool: _same,
        int: _int,
        float: _float,
        complex: _complex,
        str: _str,
        bytes: _bytes,
        tuple: _tuple,
        list: _list,
        dict: _dict,
        np.ndarray: _array,
        np.random.Generator: _generator,
        np.random.RandomState: _random_state,
        StreamGenerator: _stream,
    }


def place(path: str) -> str:
    """Return a path as a message names it: state['walkers/3']."""
    return f"state[{path!r}]" if path else "state"


def join(path: str, key: str) -> str:
    """Return the path of an item in the container at `path`."""
    return f"{path}/{key}" if path else key


def has_method(value: object, name: str) -> bool:
    """Return whether the class of a value has a method of this name."""
    return callable(getattr(type(value), name, None))


def is_key(key: object) -> bool:
    """Return whether a dict of a state may have this key: the name of an HDF5 object can be it."""
    if not isinstance(key, str) or key in ("", ".") or "/" in key or "\0" in key:
        return False
    return not has_surrogate(key) and len(key.encode()) <= MAX_KEY_BYTES


def _refuse_key(key: object, path: str) -> None:
    if not is_key(key):
        raise ConfigError(
            f"{place(path)}: key {_shown(key)}; keys must be non-empty text without '/', "
            f"of at most {MAX_KEY_BYTES} bytes, and not '.'"
        )


def _shown(value: object) -> str:
    return in_one_line(ascii(value), _MAX_SHOWN)


def _refuse_dtype(dtype: np.dtype[Any], path: str) -> None:
    if dtype.name not in DTYPES or not dtype.isnative:
        raise ConfigError(
            f"{place(path)}: dtype {dtype} cannot be saved; use bool, an integer, float16 to float64, or complex"
        )
