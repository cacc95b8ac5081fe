"""Randomness without a stream to carry along: every draw is a function of (seed, stream, index)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_WORD = 0xFFFFFFFF
_ROUNDS = 20
_BLOCK = 1 << 13  # positions whose intermediate arrays stay in the cache
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_HALF = np.uint64(32)

_Integers = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


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
    """A keyed bijection on [0, n), evaluated only at the positions asked for. The key is (seed, stream, index)."""

    def __init__(self, n: int, seed: int, stream: str, *index: int) -> None:
        self.n = n
        self._network = _FeistelNetwork(n, [seed_sequence(seed, stream, *index)])

    def __call__(self, positions: _Integers) -> _Integers:
        """Map positions in [0, n), an array of any shape, to the numbers at these positions."""
        flat = positions.ravel()
        return self._network(flat, np.zeros_like(flat)).reshape(positions.shape)


def epoch_order(n: int, seed: int, positions: _Integers) -> _Integers:
    """Return which of n samples are at these positions (ascending) of endless shuffled epochs, as int64.

    Position p is in epoch p // n; each epoch is a permutation of its own.
    """
    epochs, offsets = np.divmod(positions, n)
    first, last = int(epochs[0]), int(epochs[-1])
    seeds = [seed_sequence(seed, "order", epoch) for epoch in range(first, last + 1)]
    return _FeistelNetwork(n, seeds)(offsets, epochs - first)


class _FeistelNetwork:
    """Keyed bijections on [0, n), one for each seed sequence, in O(1) memory at any n.

    A Feistel network over pairs (left, right) in Z_a x Z_b, with a b just above n (Hoang and Rogaway 2010, "On
    generalized Feistel networks": the alternating numeric network), and cycle walking for the numbers outside [0, n)
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    b is even. A round rotates one side, for each value of the other, and a rotation of an odd number of elements is an
    even permutation: two odd sides would produce even permutations only (Even and Goldreich 1983, "DES-like functions
    can generate the alternating group").

    The deviation from a uniform permutation falls with each round and is largest for n = 5 to 7. After 12 rounds it is
    4 % and 9 % (rms over all orders) for n = 5 and 6; after 20 it is below 0.4 %.
    """

    def __init__(self, n: int, seeds: Sequence[np.random.SeedSequence]) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation needs 1 to 2^62 elements, not {n}")
        self._n = n
        self._a = max(math.isqrt(n - 1) + 1, 2)
        half_b = -(-n // (2 * self._a))
        self._b = 2 * half_b
        # (rounds, keys); even rounds change the left side, odd ones the right side
        states = [seed.generate_state(_ROUNDS, np.uint64) for seed in seeds]
        self._keys: _Words = np.stack(states, axis=1).astype(np.uint64, copy=False)
        self._moduli = np.array([self._a, self._b] * (_ROUNDS // 2), np.uint64)

    def __call__(self, x: _Integers, key_numbers: _Integers) -> _Integers:
        """Map each x in [0, n) by the bijection of its key; x and key_numbers: (count,)."""
        width, n_keys = max(self._a, self._b), self._keys.shape[1]
        # a table costs a hash for each of its entries
        tables = self._tables(width) if 4 * width * n_keys <= len(x) else None
        found = np.empty_like(x)
        for start in range(0, len(x), _BLOCK):
            block = slice(start, start + _BLOCK)
            found[block] = self._encrypt(x[block], key_numbers[block], tables)
        outside = np.flatnonzero(found >= self._n)
        while outside.size:
            walked = self._encrypt(found[outside], key_numbers[outside], tables)
            found[outside] = walked
            outside = outside[walked >= self._n]
        return found

    def _tables(self, width: int) -> _Integers:
        """Return the values of every round function at 0 .. width - 1: (rounds, keys, width)."""
        values = np.empty((*self._keys.shape, width), np.int64)
        _hash(np.arange(width), self._keys[:, :, np.newaxis], self._moduli[:, np.newaxis, np.newaxis], out=values)
        return values

    def _encrypt(self, x: _Integers, key_numbers: _Integers, tables: _Integers | None) -> _Integers:
        right, left = np.divmod(x, self._a)
        value, scratch = np.empty_like(x), np.empty_like(x)
        one_key = self._keys.shape[1] == 1
        table_start = None if tables is None or one_key else key_numbers * tables.shape[2]
        for i in range(_ROUNDS):
            source, target = (right, left) if i % 2 == 0 else (left, right)
            if tables is None:
                keys = self._keys[i] if one_key else self._keys[i, key_numbers]
                _hash(source, keys, self._moduli[i], out=value)
            else:
                entry = source if table_start is None else np.add(source, table_start, out=scratch)
                # entries are in range; "clip" lets take write straight into out
                np.take(tables[i], entry, out=value, mode="clip")
            _add_modulo(target, value, self._moduli[i], scratch)
        right *= self._a
        right += left
        return right


def _hash(source: _Integers, keys: _Words, modulus: _Words | np.uint64, *, out: _Integers) -> None:
    """Write keyed hashes of the source, in [0, modulus); uint64 arithmetic wraps, as it must."""
    # multiply and xor-shift twice, as in SplitMix64 (Steele et al. 2014); the upper half is the hash
    words = out.view(np.uint64)
    np.bitwise_xor(source.view(np.uint64), keys, out=words)
    np.multiply(words, _MULTIPLIERS[0], out=words)
    np.bitwise_xor(words, words >> _HALF, out=words)
    np.multiply(words, _MULTIPLIERS[1], out=words)
    np.right_shift(words, _HALF, out=words)
    # hash * modulus / 2^32 is in [0, modulus) (Lemire 2019)
    np.multiply(words, modulus, out=words)
    np.right_shift(words, _HALF, out=words)


def _add_modulo(target: _Integers, value: _Integers, modulus: np.uint64, scratch: _Integers) -> None:
    """target <- (target + value) mod modulus, in place; both are below the modulus."""
    total, reduced = target.view(np.uint64), scratch.view(np.uint64)
    np.add(target, value, out=target)
    # below the modulus the difference wraps to something huge, so the smaller one is the remainder
    np.subtract(total, modulus, out=reduced)
    np.minimum(total, reduced, out=total)
