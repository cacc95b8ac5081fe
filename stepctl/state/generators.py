"""NumPy random generators as JSON: the state of the bit generator, and its seed sequence with the spawn count."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from stepctl.errors import ConfigError
from stepctl.state.arena import Array
from stepctl.system.text import config_text

Json = Any
BIT_GENERATORS: dict[str, type[np.random.BitGenerator]] = {
    "MT19937": np.random.MT19937,
    "PCG64": np.random.PCG64,
    "PCG64DXSM": np.random.PCG64DXSM,
    "Philox": np.random.Philox,
    "SFC64": np.random.SFC64,
}
_LARGEST_WORD = {"uint32": 2**32 - 1, "uint64": 2**64 - 1}
_MT19937_WORDS = 624
_PHILOX_BUFFER_WORDS = 4
_MAX_POOL_SIZE = 64  # words of a seed sequence, by default 4; seeding takes its square
_MAX_ENTROPY_DIGITS = 2_000  # hexadecimal ones of one number; NumPy splits it in quadratic time


def encode_float(value: float) -> Json:
    if np.isfinite(value):
        return value  # repr has enough digits for every bit
    return {"$float": struct.pack(">d", value).hex()}


def decode_float(encoded: Json) -> float:
    if isinstance(encoded, dict):
        (value,) = struct.unpack(">d", bytes.fromhex(encoded["$float"]))
        return cast(float, value)
    return float(encoded)


def encode_state(state: Mapping[str, Any]) -> Json:
    """Encode the state dict of a bit generator: ints, floats, and arrays of unsigned integers."""
    encoded: dict[str, Json] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            encoded[key] = encode_state(value)
        elif isinstance(value, np.ndarray):
            encoded[key] = [value.dtype.name, value.tolist()]
        elif isinstance(value, int):
            encoded[key] = hex(value)
        elif isinstance(value, float):
            encoded[key] = encode_float(value)
        else:
            encoded[key] = str(value)
    return encoded


def decode_state(encoded: Any) -> dict[str, Any]:
    """Return the state dict of a bit generator, within the bounds that NumPy does not check itself.

    Raises a TypeError, ValueError, LookupError, AttributeError or OverflowError on other content.
    """
    state = _decode_fields(encoded, nested=True)
    if state["bit_generator"] not in BIT_GENERATORS:
        raise ValueError(f"unknown bit generator {state['bit_generator']!r}")
    # NumPy would read beyond its buffers
    _refuse_outside(state.get("buffer_pos", 0), 0, _PHILOX_BUFFER_WORDS)
    inner = state["state"]
    if isinstance(inner, dict):
        _refuse_outside(inner.get("pos", 0), 0, _MT19937_WORDS)
    return state


def _decode_fields(encoded: Any, *, nested: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in encoded.items():
        if key == "bit_generator":
            fields[key] = value
        elif key == "gauss":
            fields[key] = decode_float(value)
        elif isinstance(value, dict) and nested:
            fields[key] = _decode_fields(value, nested=False)
        elif isinstance(value, list):
            fields[key] = _decode_words(value)
        else:
            fields[key] = int(value, 16)
    return fields


def _decode_words(encoded: Any) -> Array:
    dtype, words = encoded
    largest = _LARGEST_WORD[dtype]
    for word in words:
        _refuse_outside(word, 0, largest)
    return np.array(words, dtype)


def _refuse_outside(number: Any, low: int, high: int) -> None:
    if type(number) is not int or not low <= number <= high:
        raise ValueError(f"{config_text(number)} is not an integer from {low} to {high}")


def refuse_bit_generator(name: str, place: str) -> None:
    """Raise ConfigError unless NumPy has a bit generator of this name; `place` begins the message."""
    if name not in BIT_GENERATORS:
        known = ", ".join(BIT_GENERATORS)
        raise ConfigError(f"{place}: the bit generator {name} cannot be saved; use one of {known}")


def encode_bit_generator(generator: np.random.BitGenerator, place: str) -> Json:
    """Encode the state and the seed sequence; ConfigError, which begins with `place`, for a foreign class."""
    refuse_bit_generator(type(generator).__name__, place)
    return {"state": encode_state(generator.state), "seed": _encode_seed(generator, place)}


def _encode_seed(generator: np.random.BitGenerator, place: str) -> Json:
    """Encode the seed sequence, which `Generator.spawn` draws from."""
    seed: Any = generator.seed_seq
    if seed is None:
        return None
    if type(seed) is not np.random.SeedSequence:
        kind = type(seed).__name__
        raise ConfigError(f"{place}: a seed sequence of type {kind} cannot be saved")
    if seed.pool_size > _MAX_POOL_SIZE:
        raise ConfigError(
            f"{place}: the seed sequence has a pool of {seed.pool_size} words; "
            f"at most {_MAX_POOL_SIZE} can be saved"
        )
    entropy: Any = seed.entropy
    if isinstance(entropy, int | np.integer):
        encoded: Json = _hex(entropy, place)
    else:
        encoded = _ints(entropy, place)
    return {
        "entropy": encoded,
        "spawn_key": _ints(seed.spawn_key, place),
        "pool_size": seed.pool_size,
        "spawned": seed.n_children_spawned,
    }


def _ints(values: Any, place: str) -> list[str]:
    return [_hex(value, place) for value in values]


def _hex(value: Any, place: str) -> str:
    digits = hex(value)
    if len(digits) > _MAX_ENTROPY_DIGITS:
        raise ConfigError(
            f"{place}: the seed is a number of {len(digits)} hexadecimal digits; "
            f"at most {_MAX_ENTROPY_DIGITS} can be saved"
        )
    return digits


def copy_bit_generator(source: np.random.BitGenerator, target: Any) -> None:
    """Give a bit generator the state, the seed sequence and the spawn count of another of its kind."""
    target.__setstate__((source.state, source.seed_seq))


def decode_bit_generator(content: Any) -> np.random.BitGenerator:
    """Return a new bit generator; on other content, raises the errors of `decode_state`."""
    state = decode_state(content["state"])
    create = BIT_GENERATORS[state["bit_generator"]]
    seed = content["seed"]
    if seed is None:
        generator = _without_seed(create)
    else:
        generator = create(_decode_seed(seed))
    generator.state = state
    return generator


def decode_random_state(content: Any) -> np.random.RandomState:
    """Return a new RandomState; on other content, raises the errors of `decode_state`."""
    state = decode_state(content)
    generator = np.random.RandomState(BIT_GENERATORS[state["bit_generator"]](0))
    generator.set_state(state)
    return generator


def _decode_seed(seed: Any) -> np.random.SeedSequence:
    _refuse_outside(seed["pool_size"], 0, _MAX_POOL_SIZE)
    encoded = seed["entropy"]
    if isinstance(encoded, list):
        entropy: Any = [_decode_hex(digits) for digits in encoded]
    else:
        entropy = _decode_hex(encoded)
    return np.random.SeedSequence(
        entropy,
        spawn_key=tuple(_decode_hex(digits) for digits in seed["spawn_key"]),
        pool_size=seed["pool_size"],
        n_children_spawned=seed["spawned"],
    )


def _decode_hex(digits: str) -> int:
    _refuse_outside(len(digits), 0, _MAX_ENTROPY_DIGITS)
    return int(digits, 16)


def _without_seed(create: type[np.random.BitGenerator]) -> np.random.BitGenerator:
    """Return a bit generator without a seed sequence, as NumPy makes them from a key or a legacy seed."""
    if create is np.random.Philox:
        return np.random.Philox(key=0)
    if create is np.random.MT19937:
        legacy = np.random.RandomState(0)
        return legacy._bit_generator
    raise ValueError(f"{create.__name__} without a seed sequence")
