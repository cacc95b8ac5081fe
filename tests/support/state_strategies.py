"""Hypothesis strategies for the state of a program."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from stepctl.state.generators import BIT_GENERATORS
from stepctl.state.values import DTYPES

# at most 255 bytes of UTF-8
KEYS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=63
).filter(lambda key: key != ".")
_DTYPE = st.sampled_from(sorted(DTYPES)).map(np.dtype)
_C_ARRAYS = _DTYPE.flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, min_side=0, max_side=3))
)
_ARRAYS = _C_ARRAYS | _C_ARRAYS.map(np.asfortranarray)
_SCALARS = _DTYPE.flatmap(lambda dtype: npst.arrays(dtype, 1).map(lambda array: array[0]))
_PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=1 << 70)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)


@st.composite
def _generators(draw: st.DrawFn) -> np.random.Generator:
    """A generator that was used, and that has children."""
    kind = BIT_GENERATORS[draw(st.sampled_from(sorted(BIT_GENERATORS)))]
    entropy = draw(st.integers(0, 1 << 200) | st.lists(st.integers(0, 1 << 70)))
    spawn_key = draw(st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple))
    pool_size = draw(st.sampled_from([4, 8]))
    generator = np.random.Generator(
        kind(np.random.SeedSequence(entropy, spawn_key=spawn_key, pool_size=pool_size))
    )
    generator.integers(0, 9, draw(st.integers(0, 5)), dtype=np.uint32)
    generator.random(draw(st.integers(0, 5)))
    generator.spawn(draw(st.integers(0, 3)))
    return generator


@st.composite
def _random_states(draw: st.DrawFn) -> np.random.RandomState:
    kind = BIT_GENERATORS[draw(st.sampled_from(sorted(BIT_GENERATORS)))]
    generator = np.random.RandomState(kind(draw(st.integers(0, 99))))
    generator.normal(size=draw(st.integers(0, 3)))
    return generator


_VALUES = st.recursive(
    _PLAIN | _ARRAYS | _SCALARS | _generators() | _random_states(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS | st.just("$array"), inner, max_size=3)
    ),
    max_leaves=8,
)
STATES: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    KEYS | st.just("$tuple"), _VALUES, max_size=4
)
