"""Randomness without a stream to carry along: every draw is a function of (seed, stream, index)."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_WORD = 0xFFFFFFFF
_ROUNDS = 12  # fewer leave a bias at n below 10
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_HALF = np.uint64(32)


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

    A generalised Feistel network over pairs (left, right) in Z_a x Z_b, with a b just above n, and cycle walking
    for the few numbers that land outside (Black and Rogaway 2002, sections 4 and 5). The key is
    (seed, stream, index).
    """

    def __init__(self, n: int, seed: int, stream: str, *index: int) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation needs 1 to 2^62 elements, not {n}")
        self.n = n
        a = max(math.isqrt(n - 1) + 1, 2)
        self._a, self._b = np.uint64(a), np.uint64(max(-(-n // a), 2))
        self._keys = seed_sequence(seed, stream, *index).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Map positions in [0, n), at least 1-D, to the numbers that stand there."""
        found = self._encrypt(positions.astype(np.uint64))
        outside = np.flatnonzero(found >= self.n)
        while outside.size:
            walked = self._encrypt(found.flat[outside])
            found.flat[outside] = walked
            outside = outside[walked >= self.n]
        return found.astype(np.int64)

    def _encrypt(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        right, left = np.divmod(x, self._a)
        mixed, scratch = np.empty_like(x), np.empty_like(x)
        for i in range(0, _ROUNDS, 2):
            _add_mixed(left, right, self._keys[i], self._a, mixed, scratch)
            _add_mixed(right, left, self._keys[i + 1], self._b, mixed, scratch)
        right *= self._a
        right += left
        return right


def _add_mixed(
    target: npt.NDArray[np.uint64],
    source: npt.NDArray[np.uint64],
    key: np.uint64,
    modulus: np.uint64,
    mixed: npt.NDArray[np.uint64],
    scratch: npt.NDArray[np.uint64],
) -> None:
    """target <- (target + hash(source, key)) mod modulus, in place; uint64 arithmetic wraps, as it must."""
    # multiply and xor-shift twice, as in SplitMix64 (Steele et al. 2014); the upper half is the hash
    np.bitwise_xor(source, key, out=mixed)
    np.multiply(mixed, _MULTIPLIERS[0], out=mixed)
    np.right_shift(mixed, _HALF, out=scratch)
    np.bitwise_xor(mixed, scratch, out=mixed)
    np.multiply(mixed, _MULTIPLIERS[1], out=mixed)
    np.right_shift(mixed, _HALF, out=mixed)
    # hash * modulus / 2^32 is in [0, modulus) (Lemire 2019)
    np.multiply(mixed, modulus, out=mixed)
    np.right_shift(mixed, _HALF, out=mixed)
    np.add(target, mixed, out=target)
    # below the modulus the difference wraps to something huge, so the smaller one is the remainder
    np.subtract(target, modulus, out=scratch)
    np.minimum(target, scratch, out=target)


def epoch_order(n: int, seed: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return which of n samples stand at these positions (rising) of endless shuffled epochs, as int64.

    Position p lies in epoch p // n; each epoch is a permutation of its own.
    """
    epochs, offsets = np.divmod(positions, n)
    found = np.empty_like(positions)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        first, end = np.searchsorted(epochs, (epoch, epoch + 1))
        if first < end:
            found[first:end] = Permutation(n, seed, "order", epoch)(offsets[first:end])
    return found
