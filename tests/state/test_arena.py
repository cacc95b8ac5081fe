"""Arenas are aligned and contiguous, a workspace reuses its buffers, a tree sum has one order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from stepctl.distributed.gradient_sum import SharedMemoryTreeSum, dry_run
from stepctl.state.arena import Arena, Array, aligned_empty, aligned_zeros, same_bits
from stepctl.state.tree_sum import TreeSum
from stepctl.state.workspace import Workspace

SHAPES = {
    "dense0/weight": (3, 5),
    "dense0/bias": (5,),
    "scalar": (),
    "nothing": (0, 4),
    "dense1/weight": (17, 1),
}
DTYPES = ["float32", "float64"]


def filled(dtype: str = "float32") -> Arena:
    arena = Arena(SHAPES, dtype)
    for i, view in enumerate(arena.values()):
        view[...] = np.arange(view.size, dtype=dtype).reshape(view.shape) + 100 * (i + 1)
    return arena


def gaps(arena: Arena) -> Array:
    """Return which elements of the flat buffer belong to no array."""
    taken = arena.like()
    for view in taken.values():
        view[...] = 1
    return np.equal(taken.flat, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_view_is_an_aligned_part_of_the_one_buffer(dtype: str) -> None:
    arena = filled(dtype)
    assert {name: view.shape for name, view in arena.items()} == SHAPES
    for view in arena.values():
        assert view.dtype == dtype
        assert view.flags.c_contiguous
        assert view.size == 0 or (view.ctypes.data % 64 == 0 and np.shares_memory(view, arena.flat))
    assert arena.flat.ndim == 1
    assert arena.n_bytes == arena.flat.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_two_views_overlap_and_the_gaps_are_zero(dtype: str) -> None:
    arena = filled(dtype)
    assert sorted(arena.flat[arena.flat != 0]) == sorted(
        np.concatenate([view.ravel() for view in arena.values()])
    )
    assert arena.n_elements == 15 + 5 + 1 + 0 + 17 == np.count_nonzero(~gaps(arena))
    assert gaps(arena).any()
    assert not arena.flat[gaps(arena)].any()


def test_a_write_to_a_view_is_a_write_to_the_buffer_and_back() -> None:
    arena = Arena(SHAPES, "float32")
    arena["dense0/bias"][2] = 7
    assert arena.flat.sum() == 7
    arena.flat.fill(3)
    assert arena["dense0/weight"].sum() == 45


def test_an_assignment_writes_into_the_view() -> None:
    arena = Arena(SHAPES, "float32")
    view = arena["dense0/weight"]
    arena["dense0/weight"] = np.arange(5)
    assert arena["dense0/weight"] is view
    assert np.array_equal(view, [range(5)] * 3)
    with pytest.raises(KeyError):
        arena["dense9/weight"] = 0
    with pytest.raises(ValueError, match="broadcast"):
        arena["dense0/weight"] = np.arange(4)


def test_like_is_zeros_of_the_same_layout_in_other_memory() -> None:
    arena = filled("float64")
    other = arena.like()
    assert other.shapes == arena.shapes
    assert other.dtype == arena.dtype
    assert other.flat.shape == arena.flat.shape
    assert not other.flat.any()
    assert not np.shares_memory(other.flat, arena.flat)


def test_copy_from_takes_every_value() -> None:
    arena = filled()
    other = arena.like()
    other.copy_from(arena)
    assert other.same_bits(arena)
    arena["scalar"][...] = 0
    assert not other.same_bits(arena)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (0.0, 0.0, True),
        (0.0, -0.0, False),
        (np.nan, np.nan, True),
        (np.nan, -np.nan, False),
        (1.0, np.nextafter(1.0, 2.0), False),
    ],
)
def test_same_bits_compares_bits_not_values(a: float, b: float, same: bool) -> None:
    left, right = Arena({"w": (2,)}, "float64"), Arena({"w": (2,)}, "float64")
    left["w"][1], right["w"][1] = a, b
    assert left.same_bits(right) is same
    assert same_bits(left["w"], right["w"]) is same


@pytest.mark.parametrize(
    "other",
    [Arena({"v": (2,)}, "float32"), Arena({"w": (2, 1)}, "float32"), Arena({"w": (2,)}, "int32"),
     Arena({"w": (2,), "v": (2,)}, "float32"), Arena({}, "float32")],
    ids=["name", "shape", "dtype", "one more", "one less"],
)  # fmt: skip
def test_same_bits_compares_names_shapes_and_dtypes(other: Arena) -> None:
    arena = Arena({"w": (2,)}, "float32")
    assert arena.same_bits(arena.like())
    assert not arena.same_bits(other)


@pytest.mark.parametrize("order", [["a/b", "a/b/c"], ["a/b/c", "a/b"], ["a", "a/b/c"]], ids=str)
def test_a_name_that_is_a_folder_of_another_is_refused(order: list[str]) -> None:
    with pytest.raises(
        ValueError,
        match=r"array name 'a/b(/c)?': 'a(/b)?' is an array already, so it cannot be a fold",
    ):
        Arena(dict.fromkeys(order, (1,)), "float32")


def test_names_that_only_look_like_folders_are_allowed() -> None:
    assert set(Arena({"a": (1,), "ab/c": (1,), "a.b": (1,)}, "float32")) == {"a", "ab/c", "a.b"}


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", ".", "..", "a/../b", ".hidden", "a b", "ä", "a\n"]
)
def test_a_name_that_is_not_a_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"array name .*: use letters"):
        Arena({name: (1,)}, "float32")


def test_a_name_may_have_sixteen_folders_at_most() -> None:
    Arena({"a/" * 16 + "w": (1,)}, "float32")
    with pytest.raises(ValueError, match=r"array name .* at most 16 folders"):
        Arena({"a/" * 17 + "w": (1,)}, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sentinel_is_found_until_all_of_an_array_is_written(dtype: str) -> None:
    arena = filled(dtype)
    assert arena.with_sentinel() == []
    arena.fill_sentinel()
    assert not arena.flat[gaps(arena)].any()
    assert arena.with_sentinel() == [name for name, view in arena.items() if view.size]
    arena["dense0/weight"][:2], arena["dense0/bias"], arena["dense1/weight"] = 1, np.nan, np.inf
    assert arena.with_sentinel() == ["dense0/weight", "scalar"]


def test_an_arena_may_be_empty() -> None:
    arena = Arena({}, "float32")
    assert (len(arena), arena.n_elements, arena.n_bytes) == (0, 0, 0)


@pytest.mark.parametrize("shape", [(), (1,), (7, 3)], ids=str)
def test_aligned_empty_is_aligned(shape: tuple[int, ...]) -> None:
    held = [aligned_empty(shape, dtype) for dtype in ("u1", "f4", "f8") for _ in range(20)]
    assert {array.ctypes.data % 64 for array in held} == {0}
    assert {array.shape for array in held} == {shape}


REQUESTS = [((4, 3), None), ((4, 3), None), ((4,), "bool"), ((2, 2), "int64")]


def one_pass(
    workspace: Workspace, requests: Sequence[tuple[tuple[int, ...], str | None]] = REQUESTS
) -> list[Array]:
    workspace.start()
    return [workspace.empty(shape, dtype) for shape, dtype in requests]


def test_a_workspace_reuses_its_buffers_in_the_next_pass() -> None:
    workspace = Workspace("float32")
    first, second = one_pass(workspace), one_pass(workspace)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert [(array.shape, str(array.dtype)) for array in first] == [
        ((4, 3), "float32"), ((4, 3), "float32"), ((4,), "bool"), ((2, 2), "int64"),
    ]  # fmt: skip


def test_a_workspace_never_returns_one_buffer_twice_in_a_pass() -> None:
    arrays = one_pass(Workspace("float32"))
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


@pytest.mark.parametrize("changed", [((5, 3), None), ((12,), None), ((4, 3), "float64")])
def test_a_workspace_makes_a_new_buffer_for_a_new_shape_or_dtype_only(
    changed: tuple[tuple[int, ...], str],
) -> None:
    workspace = Workspace("float32")
    before = one_pass(workspace)
    after = one_pass(workspace, [REQUESTS[0], changed, *REQUESTS[2:]])
    assert [a is b for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    assert after[1].shape == changed[0]
    assert after[1].dtype == (changed[1] or "float32")
    assert not np.shares_memory(after[1], before[1])


def test_a_workspace_drops_the_rng_of_the_previous_pass() -> None:
    workspace = Workspace("float32")
    workspace.start(lambda stream: np.random.default_rng(0))
    assert workspace.rng is not None
    workspace.start()
    assert workspace.rng is None


def summands(n: int) -> list[Array]:
    """Return float32 data whose sum depends on the order of the additions."""
    random = np.random.default_rng(n)
    return [
        random.normal(0, 10.0 ** random.integers(-4, 4, 200)).astype(np.float32) for _ in range(n)
    ]


def tree(values: list[Array]) -> Array:
    """Add neighbours until one is left: ((0 + 1) + (2 + 3)) + ..."""
    while len(values) > 1:
        values = [sum(values[i + 1 : i + 2], values[i]) for i in range(0, len(values), 2)]
    return values[0]


def tree_sum(sums: TreeSum, values: list[Array]) -> Array:
    for value in values:
        sums.leaf()["w"][:] = value
        sums.add()
    return sums.total()["w"].copy()


@pytest.mark.parametrize("n", range(1, 10))
def test_a_tree_sum_adds_in_the_order_of_the_tree_step_after_step(n: int) -> None:
    sums = TreeSum(Arena({"w": (200,)}, "float32"))
    for step in range(3):
        values = summands(n)[step:] + summands(n)[:step]
        assert same_bits(tree_sum(sums, values), tree(values))


def test_a_tree_sum_takes_another_number_of_summands_each_time() -> None:
    sums = TreeSum(Arena({"w": (200,)}, "float32"))
    for n in (9, 1, 6, 3, 8):
        assert same_bits(tree_sum(sums, summands(n)), tree(summands(n)))


@pytest.mark.parametrize("n", range(4, 10))
def test_the_order_of_the_tree_matters_to_these_data(n: int) -> None:
    assert not same_bits(sum(summands(n)[1:], summands(n)[0]), tree(summands(n)))


def test_a_subtree_may_be_summed_elsewhere() -> None:
    values = summands(8)
    halves = [
        tree_sum(TreeSum(Arena({"w": (200,)}, "float32")), values[at : at + 4]) for at in (0, 4)
    ]
    assert same_bits(halves[0] + halves[1], tree(values))


@pytest.mark.parametrize(("n", "most"), [(1, 1), (2, 2), (4, 3), (9, 4), (64, 7)])
def test_a_tree_sum_holds_few_arenas_and_makes_none_after_the_first_step(n: int, most: int) -> None:
    sums, leaves = TreeSum(Arena({"w": (2,)}, "float32")), []
    for _ in range(4 * n):
        leaves.append(sums.leaf())
        sums.add()
        if len(leaves) % n == 0:
            sums.total()
    used = [{id(leaf) for leaf in leaves[start : start + n]} for start in range(0, 4 * n, n)]
    assert len(set().union(*used)) <= most
    assert set().union(*used[1:]) <= used[0]


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 11])
@pytest.mark.parametrize("first_leaf", [0, 1, 5])
def test_every_tree_sum_of_the_same_leaves_uses_the_same_buffers(n: int, first_leaf: int) -> None:
    """Ranks read each other's partial sums where a dry run says that they are."""
    layout = Arena({"w": (3,)}, "float32")
    expected = dry_run(range(first_leaf, first_leaf + n))
    given = [layout.like() for _ in range(expected.n_buffers + 2)]
    for tree in (TreeSum(layout, first_leaf), TreeSum(layout, first_leaf, given)):
        for _ in range(3):
            for _ in range(n):
                tree.leaf().flat.fill(1)
                tree.add()
            assert tree.partial_sums() == expected.partial_sums()
            sizes = [2**subtree.height for subtree in tree.partial_sums()]
            assert sum(sizes) == n
            if tree.n_buffers == len(given):
                buffers = [given[subtree.value] for subtree in tree.partial_sums()]
                assert [buffer["w"][0] for buffer in buffers] == sizes
            tree.reset()


def test_a_sum_in_shared_memory_can_be_reset_halfway() -> None:
    layout, leaves = Arena({"x": (3,)}, "float64"), [range(3)]
    tree = SharedMemoryTreeSum(
        layout, 0, leaves, aligned_zeros((SharedMemoryTreeSum.n_bytes(layout, leaves),), "uint8")
    )
    for dropped_after in range(3):
        for number in range(dropped_after):
            tree.leaf()["x"] = number
            tree.add()
        tree.leaf()["x"] = 99
        tree.reset()
        for number in (1, 2, 4):
            tree.leaf()["x"] = number
            tree.add()
        assert tree.total()["x"].tolist() == [7, 7, 7]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_first_array_with_a_nan_or_infinity_is_found(dtype: str) -> None:
    """Also beside finite values whose squares overflow; no warning is given."""
    arena = Arena({"a": (3,), "b": (40_000,), "c": (2,)}, dtype)
    assert arena.first_non_finite() is None
    arena["a"] = np.finfo(dtype).max
    assert arena.first_non_finite() is None
    for bad in (np.nan, np.inf, -np.inf):
        arena["c"] = bad
        assert arena.first_non_finite() == "c"
        arena["b"][39_999] = bad
        assert arena.first_non_finite() == "b"
        arena["b"] = 0
    assert Arena({}, dtype).first_non_finite() is None
