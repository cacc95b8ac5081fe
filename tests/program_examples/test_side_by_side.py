"""Each plain program becomes a script or a program of stepctl by few changes, and computes the same bits.

`pytest -n 0 -s tests/program_examples/test_side_by_side.py` prints the differences.
"""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepctl
from stepctl.state.arena import same_bits
from stepctl.state.streams import Streams
from stepctl.state.values import capture
from tests.program_examples.streams import stream
from tests.support.program_examples import EXAMPLES, Example
from tests.support.program_runs import FORMS, rows, train

MOST_CHANGES = 10
by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


def code(example: Example, version: str) -> list[str]:
    """Return the lines of a version without blank lines and indentation, which `with` changes."""
    lines = [line.strip() for line in example.file(version).read_text().splitlines()]
    return [line for line in lines if line]


def changes(example: Example, version: str) -> list[tuple[int, int]]:
    """Return (lines removed, lines added) of each place at which a version differs from the plain one."""
    matcher = difflib.SequenceMatcher(
        None, code(example, "plain"), code(example, version), autojunk=False
    )
    return [
        (plain_end - plain_start, end - start)
        for tag, plain_start, plain_end, start, end in matcher.get_opcodes()
        if tag != "equal"
    ]


def show(example: Example, version: str) -> None:
    print()
    names = (f"{example.name}/plain.py", f"{example.name}/{version}.py")
    print(
        *difflib.unified_diff(code(example, "plain"), code(example, version), *names, lineterm=""),
        sep="\n",
    )


@by_name
def test_a_script_is_the_plain_program_with_at_most_ten_lines_changed(example: Example) -> None:
    """A line that is replaced counts once, as does one that is only added or only removed."""
    show(example, "script")
    n_changes = sum(max(removed, added) for removed, added in changes(example, "script"))
    print(f"{n_changes} lines changed")
    assert 0 < n_changes <= MOST_CHANGES


@by_name
def test_a_program_keeps_all_but_ten_lines_of_the_plain_one(example: Example) -> None:
    """A class has another shape, so its own lines do not count, but each line that did not survive the move does."""
    show(example, "program")
    n_changes = sum(removed for removed, _ in changes(example, "program"))
    print(f"{n_changes} lines changed or left out")
    assert 0 < n_changes <= MOST_CHANGES


@pytest.mark.training
@pytest.mark.parametrize("form", FORMS)
@by_name
def test_the_final_bits_and_metrics_are_those_of_the_plain_program(
    example: Example, form: str, tmp_path: Path
) -> None:
    plain = runpy.run_path(str(example.file("plain")))
    expected = capture({name: savable(plain[name]) for name in example.state})
    state = capture(train(example, form, tmp_path / "run", log_every=1))
    assert state.values == expected.values
    assert state.arrays.keys() == expected.arrays.keys()
    for path, array in expected.arrays.items():
        assert same_bits(state.arrays[path], array), path
    for name in example.series:
        np.testing.assert_array_equal(stepctl.load_series(tmp_path / "run", name), plain[name])
    metrics = [row[example.metric] for row in rows(tmp_path / "run")]
    assert metrics == plain[example.history]


def savable(value: Any) -> Any:
    """Return a variable of a plain program, with methods for saving if it is a list of objects."""
    if isinstance(value, list) and hasattr(value[0], "__dict__"):
        type(value[0]).state_dict = lambda self: vars(self)
        type(value[0]).load_state_dict = lambda self, saved: vars(self).update(saved)
    return value


def test_the_random_streams_can_be_computed_without_stepctl() -> None:
    streams = Streams(5, "steps")
    for step in (0, 1, 1 << 40):
        streams.begin_step(step)
        for name in ("noise", "another"):
            expected = stream(5, name, step).standard_normal(9)
            np.testing.assert_array_equal(streams(name).standard_normal(9), expected)
