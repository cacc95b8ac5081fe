"""Randomness without a stream to carry along: every draw is a function of (seed, stream, index)."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_WORD = 0xFFFFFFFF
_ROUNDS = 8


@lru_cache(maxsize=256)
def _stream_words(stream: str) -> tuple[int, ...]:
    digest = hashlib.sha256(stream.encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))


def seed_sequence(seed: int, stream: str, *index: int) -> np.random.SeedSequence:
    """Mix (seed, stream, index) into a seed sequence.

    Each part takes a fixed number of 32-bit words (two per index), so that no two keys spell the same words.
    """
    words = list(_stream_words(stream))
    for i in index:
        if not 0 <= i < 1 << 64:
            raise ValueError(f"index {i} of random stream {stream!r} is outside 0..2^64-1")
        words += [i & _WORD, i >> 32]
    return np.random.SeedSequence(seed, spawn_key=words)


def rng(seed: int, stream: str, *index: int) -> np.random.Generator:
    """Return a counter-based generator (Philox; Salmon et al. 2011) for one use of one stream.

    What a step draws is indexed by the step, what a shard of it draws by (step, shard).
    """
    return np.random.Generator(np.random.Philox(seed_sequence(seed, stream, *index)))


class Permutation:
    """A keyed bijection on [0, n), evaluated only where it is asked: O(1) memory at any n.

    A Feistel network (Luby and Rackoff 1988) over the bits of n - 1, with cycle walking (Black and Rogaway
    2002) for the numbers that land outside. The key is (seed, stream, index).
    """

    def __init__(self, n: int, seed: int, stream: str, *index: int) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation needs 1 to 2^62 elements, not {n}")
        self.n = n
        bits = max((n - 1).bit_length(), 2)
        self._low_bits, self._high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = seed_sequence(seed, stream, *index).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Map positions in [0, n), any shape, to the numbers that stand there."""
        found = self._encrypt(positions.astype(np.uint64))
        outside = np.flatnonzero(found >= self.n)
        while outside.size:
            walked = self._encrypt(found[outside])
            found[outside] = walked
            outside = outside[walked >= self.n]
        return found.astype(np.int64)

    def _encrypt(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        low, high = x & self._low_mask, x >> self._low_bits
        for i in range(0, _ROUNDS, 2):
            low ^= _mix(high, self._keys[i]) & self._low_mask
            high ^= _mix(low, self._keys[i + 1]) & self._high_mask
        return (high << self._low_bits) | low


def _mix(x: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    # SplitMix64's finaliser (Steele et al. 2014); uint64 arithmetic wraps, as it must.
    x = x ^ key
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def epoch_order(n: int, seed: int, start: int, count: int) -> npt.NDArray[np.int64]:
    """Return which of n samples stand at positions start, ..., start + count - 1 of endless shuffled epochs.

    Position p lies in epoch p // n; each epoch is a permutation of its own. Returns (count,) int64.
    """
    parts, position = [], start
    while position < start + count:
        epoch, offset = divmod(position, n)
        end = min(n, offset + start + count - position)
        permutation = Permutation(n, seed, "order", epoch)
        parts.append(permutation(np.arange(offset, end, dtype=np.int64)))
        position += end - offset
    return np.concatenate(parts)
