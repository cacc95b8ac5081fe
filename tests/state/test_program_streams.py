"""The random streams of a program depend on the seed, the name and the step only."""

from __future__ import annotations

import numpy as np
import pytest

from stepctl.state.streams import Streams


def test_a_stream_depends_on_seed_name_and_step_alone() -> None:
    def drawn(seed: int, name: str, step: int, before: int = 0) -> list[float]:
        streams = Streams(seed, "steps")
        for number in range(before):
            streams.begin_step(number)
            streams(name).standard_normal(number + 1)
        streams.begin_step(step)
        streams("another").random(3)
        found: list[float] = streams(name).standard_normal(4).tolist()
        return found

    expected = drawn(1, "x", 5)
    assert drawn(1, "x", 5, before=5) == expected
    assert drawn(1, "x", 5, before=9) == expected
    others = [drawn(2, "x", 5), drawn(1, "y", 5), drawn(1, "x", 6)]
    assert all(expected != other for other in others)


def test_within_a_step_a_name_is_one_generator() -> None:
    streams = Streams(0, "steps")
    streams.begin_step(3)
    first, second = streams("x").random(), streams("x").random()
    assert first != second
    streams.begin_step(3)
    assert [streams("x").random(), streams("x").random()] == [first, second]


def test_each_purpose_has_streams_of_its_own() -> None:
    drawn = set()
    for purpose in ("initial state", "steps", "evaluations"):
        streams = Streams(0, purpose)
        streams.begin_step(0)
        drawn.add(streams("x").random())
    assert len(drawn) == 3


def test_streams_of_distant_steps_do_not_overlap() -> None:
    streams = Streams(0, "steps")
    streams.begin_step(1)
    first = streams("x").random(10_000)
    streams.begin_step(2)
    assert not np.isin(streams("x").random(10_000), first).any()


def test_a_stream_that_is_used_as_a_generator_says_how() -> None:
    streams = Streams(0, "steps")
    with pytest.raises(AttributeError, match=r'rng\("a name"\)\.normal\('):
        streams.normal(3)
    streams.begin_step(0)
    with pytest.raises(TypeError, match="non-empty string"):
        streams("")
