"""Draws are functions of (seed, stream, index), an epoch holds every sample once, global state is untouched."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import stepctl
from stepctl.data.permutation import Permutation, epoch_order
from stepctl.state.rng import rng
from tests.support.runs import make_config, train


def first_draw(seed: int, stream: str, *index: int) -> int:
    return int(rng(seed, stream, *index).bit_generator.random_raw())


def test_a_draw_is_pinned_to_its_key() -> None:
    """If these change, no run that was started before can be resumed exactly: raise numerics.STREAMS."""
    assert first_draw(0, "order") == 15429595140299566861
    assert first_draw(0, "init/dense0/weight") == 8381660796124808653
    assert first_draw(1, "step/dropout0", 0, 0) == 16557058895206776963
    assert first_draw(2**62 + 5, "step/dropout0", 123456789, 3) == 7374887085591673367
    assert first_draw(0, "split", 2**40) == 15059654807847941455


def test_a_permutation_is_pinned_to_its_key() -> None:
    assert Permutation(10, 0, "order", 0)(np.arange(10)).tolist() == [9, 7, 5, 3, 8, 0, 1, 2, 6, 4]
    positions = np.array([0, 1, 10**12 - 1])
    assert Permutation(10**12, 7, "order", 3)(positions).tolist() == [
        610610608561,
        750755763225,
        953652580147,
    ]


def test_a_draw_depends_on_nothing_but_its_key() -> None:
    expected = [first_draw(0, "a", i) for i in range(5)]
    np.random.seed(123)  # noqa: NPY002 - what other code does must not matter
    np.random.default_rng(0).random(1000)
    rng(0, "a", 0).random(1000)
    assert [first_draw(0, "a", i) for i in reversed(range(5))] == expected[::-1]


def test_seed_stream_and_every_index_count() -> None:
    keys: list[tuple[Any, ...]] = [(0, "a"), (0, "a", 0), (0, "a", 0, 0), (0, "a", 0, 0, 0)]
    keys += [(1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (0, "a", 0, 2**32)]
    keys += [(2**32, "a"), (0, "a", 2**32), (0, "a0"), (0, "")]
    assert len({first_draw(*key) for key in keys}) == len(keys)


def test_a_seed_is_no_shifted_copy_of_another() -> None:
    draws = [{first_draw(seed, "order", index) for index in range(200)} for seed in range(4)]
    assert first_draw(1, "order", 0) != first_draw(0, "order", 1)
    assert len(set().union(*draws)) == 4 * 200


def test_no_two_of_many_keys_share_a_first_draw() -> None:
    seeds, streams = (
        (0, 1, 2, 2**31, 2**32, 2**33, 2**63 - 1),
        ("order", "split", "step/dropout0", "step/dropout1"),
    )
    indices = [
        (),
        *((step,) for step in range(40)),
        *((step, shard) for step in range(40) for shard in range(4)),
    ]
    draws = [
        first_draw(seed, stream, *index)
        for seed in seeds
        for stream in streams
        for index in indices
    ]
    assert len(set(draws)) == len(draws) == 7 * 4 * 201


@pytest.mark.parametrize("index", [-1, 2**64])
def test_an_index_that_has_no_words_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=rf"index {index} of random stream 'order' is outside"):
        rng(0, "order", index)


@pytest.mark.parametrize("n", [*range(1, 301, 50), 1000, 4096, 4097, 10_007, 65_537])
def test_a_permutation_is_a_bijection(n: int) -> None:
    for size in range(n, min(n + 50, 301)) if n < 301 else [n]:
        for key in range(3):
            found = Permutation(size, key, "order", key)(np.arange(size))
            assert found.dtype == np.int64
            assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("n", [10**12, 2**40 + 7, 2**62])
def test_a_permutation_of_very_many_is_evaluated_where_it_is_asked(n: int) -> None:
    permutation = Permutation(n, 0, "order", 0)
    positions = np.concatenate([np.arange(1000), np.arange(n - 1000, n)])
    found = permutation(positions)
    assert found.min() >= 0
    assert found.max() < n
    assert len(set(found.tolist())) == 2000
    assert np.array_equal(permutation(positions[::-1])[::-1], found)
    # the mean of 2000 uniform numbers has a standard error of 0.65%
    assert abs(float(found.mean()) / n - 0.5) < 0.04


@pytest.mark.parametrize("shape", [(1, 11), (11, 1), (1, 1, 11)], ids=str)
def test_positions_may_have_any_shape(shape: tuple[int, ...]) -> None:
    for key in range(20):
        permutation, positions = Permutation(11, key, "order"), np.arange(11)
        assert np.array_equal(
            permutation(positions.reshape(shape)), permutation(positions).reshape(shape)
        )


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_a_permutation_of_too_few_or_too_many_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="1 to 2\\^62 elements"):
        Permutation(n, 0, "order")


def test_permutations_differ_by_epoch_seed_and_stream() -> None:
    keys: list[tuple[Any, ...]] = [(0, "order", epoch) for epoch in range(100)]
    keys += [*((seed, "order", 0) for seed in range(1, 100)), (0, "split")]
    orders = {tuple(Permutation(50, *key)(np.arange(50)).tolist()) for key in keys}
    assert len(orders) == len(keys) == 200


def looks_uniform(
    counts: npt.NDArray[np.int64], degrees_of_freedom: int, deviations: float = 6
) -> bool:
    """Tell whether chi-square lies within this many of its standard deviations."""
    expected = counts.sum() / counts.size
    chi_square = ((counts - expected) ** 2).sum() / expected
    return bool(abs(chi_square - degrees_of_freedom) < deviations * np.sqrt(2 * degrees_of_freedom))


@pytest.mark.training
@pytest.mark.parametrize("n", [6, 10])
def test_every_number_and_pair_is_equally_frequent_at_every_position(n: int) -> None:
    orders = np.array([Permutation(n, key, "order", 0)(np.arange(n)) for key in range(1500)])
    places = np.array([np.bincount(orders[:, position], minlength=n) for position in range(n)])
    assert looks_uniform(places, (n - 1) ** 2)
    unequal = ~np.eye(n, dtype=bool).ravel()
    for a, b in [(0, 1), (3, 4), (0, n - 1)]:
        pairs = np.bincount(orders[:, a] * n + orders[:, b], minlength=n * n)
        assert looks_uniform(pairs[unequal], n * (n - 1) - 1)


# at 5 and 6, too few rounds show only in many orders
@pytest.mark.training
@pytest.mark.parametrize(
    ("n", "epochs"),
    [(1, 100), (2, 8000), (3, 8000), (4, 8000), (5, 60_000), (6, 50_000), (7, 40_000)],
)
def test_every_order_of_a_small_set_is_equally_frequent(n: int, epochs: int) -> None:
    orders = epoch_order(n, 3, np.arange(n * epochs)).reshape(epochs, n)
    counts = np.bincount(rank_among_orders(orders), minlength=math.factorial(n))
    assert len(counts) == math.factorial(n)
    if n == 1:
        assert counts.tolist() == [epochs]
    else:
        assert looks_uniform(counts, len(counts) - 1, deviations=3.5)


def rank_among_orders(orders: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Number each row, an order of 0 .. n - 1, from 0 to n! - 1 (its Lehmer code)."""
    count, n = orders.shape
    ranks = np.zeros(count, np.int64)
    for i in range(n):
        ranks *= n - i
        ranks += (orders[:, i + 1 :] < orders[:, i : i + 1]).sum(axis=1)
    return ranks


# two odd sides would be 11 x 11, 31 x 31, 245 x 245
@pytest.mark.training
@pytest.mark.parametrize(
    ("n", "count"), [(121, 300), (961, 300), (60_000, 40), (100, 300), (10_000, 60)]
)
def test_an_order_is_as_often_odd_as_even(n: int, count: int) -> None:
    n_odd = sum(is_odd(Permutation(n, key, "order", 0)(np.arange(n))) for key in range(count))
    assert abs(n_odd - count / 2) < 4 * np.sqrt(count / 4)


def is_odd(order: npt.NDArray[np.int64]) -> bool:
    """Tell whether a permutation takes an odd number of swaps: its elements minus its cycles."""
    following, seen = order.tolist(), bytearray(len(order))
    n_cycles = 0
    for start in range(len(following)):
        n_cycles += not seen[start]
        position = start
        while not seen[position]:
            seen[position] = 1
            position = following[position]
    return (len(following) - n_cycles) % 2 == 1


POWERS = [2**k + off for k in range(11, 18) for off in (-1, 0, 1)]


@pytest.mark.training
@pytest.mark.parametrize(
    "sizes",
    [range(1, 500), range(500, 1000), range(1000, 1500), range(1500, 2001), POWERS],
    ids=str,
)
def test_an_order_of_any_size_holds_every_number_once(sizes: Sequence[int]) -> None:
    for n in sizes:
        order = Permutation(n, n, "order", 0)(np.arange(n))
        assert np.array_equal(np.sort(order), np.arange(n)), n


@pytest.mark.parametrize("n", [7, 60, 2000, 10**6 + 3])
def test_a_few_positions_are_found_as_among_many(n: int) -> None:
    positions = 1000 * n - 3000 + np.arange(20_000)
    many = epoch_order(n, 1, positions)
    chosen = np.arange(0, len(positions), 997)
    few = [int(epoch_order(n, 1, positions[[i]])[0]) for i in chosen]
    assert many[chosen].tolist() == few


def test_neighbours_in_a_large_permutation_are_unrelated() -> None:
    n = 10**9
    found = Permutation(n, 0, "order", 0)(np.arange(20_000))
    shares = found / n
    assert looks_uniform(np.bincount((shares * 64).astype(int), minlength=64), 63)
    assert abs(np.corrcoef(shares[:-1], shares[1:])[0, 1]) < 6 / np.sqrt(20_000)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_each_epoch_holds_every_sample_once(n: int) -> None:
    epochs = epoch_order(n, 0, np.arange(6 * n)).reshape(6, n)
    assert all(np.array_equal(np.sort(epoch), np.arange(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs.tolist()}) == 6


@pytest.mark.parametrize("n", [1, 7, 100])
def test_the_order_is_the_same_however_it_is_cut(n: int) -> None:
    length = 4 * n + 20
    whole = epoch_order(n, 5, np.arange(length))
    for seed in range(4):
        ends = np.sort(
            np.random.default_rng(seed).choice(np.arange(1, length), 6, replace=False)
        ).tolist()
        cuts = [0, *ends, length]
        assert set(range(n, length, n)) - set(cuts)  # some piece crosses the end of an epoch
        pieces = [epoch_order(n, 5, np.arange(a, b)) for a, b in pairwise(cuts)]
        assert np.array_equal(np.concatenate(pieces), whole)


def test_the_order_of_a_late_epoch_needs_no_earlier_ones() -> None:
    n, epoch = 10**9 + 7, 10**9
    order = epoch_order(n, 0, epoch * n + n - 3 + np.arange(6))
    last, first = Permutation(n, 0, "order", epoch), Permutation(n, 0, "order", epoch + 1)
    assert order.tolist() == [*last(np.arange(n - 3, n)), *first(np.arange(3))]


def global_state() -> tuple[bytes, int, int]:
    state: Any = np.random.get_state()  # noqa: NPY002 - the global state is what is watched
    return state[1].tobytes(), state[2], state[3]


@pytest.mark.training
def test_a_training_run_leaves_global_randomness_alone(tmp_path: Path) -> None:
    before = global_state()
    train(make_config(stop={"last_step": 3}), tmp_path / "run")
    assert global_state() == before
    np.random.random()  # noqa: NPY002
    assert global_state() != before


ALLOWED = {"Generator", "RandomState", "SeedSequence", "BitGenerator"} | {
    "MT19937",
    "PCG64",
    "PCG64DXSM",
    "Philox",
    "SFC64",
}


def forbidden_randomness(source: str) -> Iterator[str]:
    """Yield each use of np.random except the classes, which hold no global state, and each `import random`."""
    tree = ast.parse(source)
    allowed = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ALLOWED
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "random" and id(node) not in allowed:
            if isinstance(node.value, ast.Name) and node.value.id in ("np", "numpy"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from (
                name.name
                for name in node.names
                if name.name in ("random", "numpy.random", "secrets")
            )
        elif isinstance(node, ast.ImportFrom) and node.module in (
            "random",
            "numpy.random",
            "secrets",
            "numpy",
        ):
            wanted = (
                {"random"}
                if node.module == "numpy"
                else {name.name for name in node.names} - ALLOWED
            )
            yield from (name.name for name in node.names if name.name in wanted)


FORBIDDEN = [
    "np.random.rand(3)",
    "x = numpy.random.default_rng()",
    "draw = np.random",
    "import random",
    "import numpy.random as r",
    "from numpy import random",
    "from numpy.random import shuffle",
    "from random import choice",
]


@pytest.mark.parametrize("source", FORBIDDEN)
def test_forbidden_randomness_is_found(source: str) -> None:
    assert list(forbidden_randomness(source))


@pytest.mark.training
def test_no_file_of_the_package_uses_other_randomness() -> None:
    files = sorted(Path(stepctl.__path__[0]).rglob("*.py"))
    assert "rng.py" in {path.name for path in files}
    found = {
        path.name: set(uses)
        for path in files
        if (uses := list(forbidden_randomness(path.read_text())))
    }
    # ids and delays decide nothing, and advance no generator; the check of determinism puts the global ones back
    system_entropy = (
        "ledger.py",
        "file_store.py",
        "heartbeat.py",
        "manifest.py",
        "protocol.py",
        "uploader.py",
    )
    assert found == {name: {"secrets"} for name in system_entropy} | {
        "determinism.py": {"random", "np.random"}
    }
