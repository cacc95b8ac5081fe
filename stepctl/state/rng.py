"""Counter-based random numbers: every draw is a function of (seed, stream, index)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn, final

import numpy as np

_WORD_MASK = 0xFFFFFFFF


@lru_cache(maxsize=256)
def _stream_words(stream: str) -> tuple[int, ...]:
    digest = hashlib.sha256(stream.encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))


def seed_sequence(seed: int, stream: str, *index: int) -> np.random.SeedSequence:
    """Return the seed sequence of (seed, stream, index).

    The spawn key is a fixed number of 32-bit words: four of the stream's SHA-256 digest, and two
    per index (64 bits, low word first). No two keys have the same words.
    """
    words = list(_stream_words(stream))
    for i in index:
        if not 0 <= i < 1 << 64:
            raise ValueError(f"index {i} of random stream {stream!r} is outside 0..2^64-1")
        words.append(i & _WORD_MASK)
        words.append(i >> 32)
    return np.random.SeedSequence(seed, spawn_key=words)


def rng(seed: int, stream: str, *index: int) -> np.random.Generator:
    """Return a Philox generator (Salmon et al. 2011) for one use of a stream.

    The index is the step, or (step, shard) for what a shard draws.
    """
    return np.random.Generator(np.random.Philox(seed_sequence(seed, stream, *index)))


@final
class NamedGenerators:
    """The generators that one call of a user's method draws from; one name is one generator.

    `training` is False in an evaluation.
    """

    def __init__(
        self, create: Callable[[str], np.random.Generator], *, training: bool = True
    ) -> None:
        self._create = create
        self._generators: dict[str, np.random.Generator] = {}
        self.training = training

    def __call__(self, name: str) -> np.random.Generator:
        """Return the generator of a name. A second call with it continues the generator."""
        generator = self._generators.get(name)
        if generator is None:
            generator = self._create(name)
            self._generators[name] = generator
        return generator

    def __getattr__(self, name: str) -> NoReturn:
        refuse_attribute(name)


def refuse_attribute(name: str) -> NoReturn:
    """Raise AttributeError for an attribute that a function `rng` lacks, such as `rng.normal`."""
    if hasattr(np.random.Generator, name):
        raise AttributeError(
            f'rng.{name}: rng is a function that returns a generator; use rng("a name").{name}(...)'
        )
    raise AttributeError(f"rng has no attribute {name!r}")
