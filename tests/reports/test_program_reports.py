"""`inspect`, `diff`, `verify` and `load_checkpoint` cover the arrays and values of a program."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings

import stepctl
from stepctl.checkpoint import codec
from stepctl.cli.main import cli
from stepctl.errors import Exit
from stepctl.reports import diff
from stepctl.reports.inspect import compute_statistics
from stepctl.state.arena import Array
from stepctl.state.value_text import compare_values, value_texts
from stepctl.state.values import DTYPES, capture
from tests.support.checkpoints import STEP, small_state, written
from tests.support.program_states import (
    Emulator,
    full_program,
    program_state,
    same_values,
    with_bits,
)
from tests.support.state_strategies import STATES
from tests.support.stops import some_of

Change = Callable[[dict[str, Any]], object]


def command(*arguments: object, code: int = Exit.DONE) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


# --- diff

CHANGES: dict[str, tuple[Change, list[str]]] = {
    "a number": (lambda live: live.update(accepted=5), ["values/accepted: 3 and 5"]),
    "a type": (lambda live: live.update(accepted=True), ["values/accepted: 3 and True"]),
    "a scalar's type": (
        lambda live: live["scalars"].__setitem__(3, np.float32(0.1)),
        ["values/scalars/3: float16 0.1 and float32 0.1"],
    ),
    "a text": (
        lambda live: live.update(text="\x1b[31m"),
        [r"values/text: 'é \x1b[2J\n' and '\x1b[31m'"],
    ),
    "a longer list": (
        lambda live: live["none"].append(b"x"),
        ["values/none/6: nothing and b'x'"],
    ),
    "a list for a tuple": (
        lambda live: live.update(nan=list(live["nan"])),
        ["values/nan: (nan, -inf, -0.0, (1+nanj)) and [nan, -inf, -0.0, (1+nanj)]"],
    ),
    "a value less": (
        lambda live: live["emulator"].names.clear(),
        ["values/emulator/names/0: 'é' and nothing"],
    ),
    "memory order": (
        lambda live: live.update({"by columns": np.ascontiguousarray(live["by columns"])}),
        ["values/by columns: array in Fortran order and array"],
    ),
    "a bit of an array": (
        lambda live: live["emulator"].memory.__setitem__(3, 254),
        ["state/emulator/memory: 1 element differs, first at 3; max abs difference 1"],
    ),
    "a longer array": (
        lambda live: live.update(θ=np.zeros(5, np.int16)),
        ["state/θ: int16 (4,) and int16 (5,)"],
    ),
    "nothing": (lambda live: None, []),
}


@pytest.mark.process
@pytest.mark.parametrize("case", some_of(CHANGES, every=3))
def test_a_difference_is_printed_by_its_path_and_counts(case: str, tmp_path: Path) -> None:
    change, expected = CHANGES[case]
    live = full_program()
    change(live)
    a = written(tmp_path, program_state(full_program()), "a.h5")
    b = written(tmp_path, program_state(live), "b.h5")
    lines = command("diff", a, b, code=Exit.NEGATIVE if expected else Exit.DONE).splitlines()
    assert [line for line in lines[:-1] if not line.endswith(": equal")] == expected
    assert lines[-1] == ("different" if expected else "identical")
    found = json.loads(command("diff", a, b, "--json", code=bool(expected)))
    assert found["equal"] == (not expected)
    with codec.Reader(a) as reader:
        differences = diff.compare_state(reader, program_state(live))
    assert len(differences) == len(expected)
    for difference, line in zip(differences, expected, strict=True):
        assert line.startswith(f"{difference['path']}: ")


@pytest.mark.process
@pytest.mark.parametrize("kind", ["rng", "legacy"])
def test_generators_that_differ_are_one_line(kind: str, tmp_path: Path) -> None:
    live = full_program()
    live[kind].normal()
    a = written(tmp_path, program_state(full_program()), "a.h5")
    b = written(tmp_path, program_state(live), "b.h5")
    lines = [line for line in command("diff", a, b, code=1).splitlines() if "equal" not in line]
    assert len(lines) == 2
    assert lines[0].startswith(f"values/{kind}: ")
    one, other = lines[0].removeprefix(f"values/{kind}: ").split(" and ")
    assert one != other


@pytest.mark.process
@pytest.mark.parametrize(
    ("one", "other", "texts"),
    [
        (1, True, ["1", "True"]),
        (1, 1.0, ["1", "1.0"]),
        (0.0, -0.0, ["0.0", "-0.0"]),
        (float("nan"), -float("nan"), ["nan", "nan of the bits fff8000000000000"]),
        (None, False, ["None", "False"]),
        (np.float32(1), np.float64(1), ["float32 1.0", "float64 1.0"]),
        (np.float64("nan"), np.float32("nan"), ["float64 nan", "float32 nan"]),
        ((), [], ["()", "[]"]),
        ((1,), (1, 2), [None, "2"]),
    ],
)
def test_values_that_are_equal_in_python_and_not_the_same_differ(
    one: Any, other: Any, texts: list[str | None]
) -> None:
    a = capture({"n": one}).values
    b = capture({"n": other}).values
    assert compare_values(a, a) == []
    (difference,) = compare_values(a, b)
    assert [difference["a"], difference["b"]] == texts


@settings(deadline=None, max_examples=50)
@given(STATES, STATES)
def test_any_two_states_are_shown_and_compared(one: dict[str, Any], other: dict[str, Any]) -> None:
    a = capture(one).values
    b = capture(other).values
    for text in value_texts(a).values():
        assert len(text) <= 200
    assert compare_values(a, a) == []
    assert bool(compare_values(a, b)) == (a != b)


def test_keys_in_another_order_differ(tmp_path: Path) -> None:
    a = written(tmp_path, program_state({"s": {"a": 1, "b": 2}}), "a.h5")
    b = written(tmp_path, program_state({"s": {"b": 2, "a": 1}}), "b.h5")
    assert command("diff", a, b, code=1) == (
        "values/s: keys in the order a, b and keys in the order b, a\ndifferent\n"
    )


@pytest.mark.process
def test_a_task_and_a_program_differ(tmp_path: Path) -> None:
    a = written(tmp_path, small_state(), "a.h5")
    b = written(tmp_path, program_state({"n": 3}), "b.h5")
    assert "values: nothing and {'n': 3}" in command("diff", a, b, code=1)
    assert "values: {'n': 3} and nothing" in command("diff", b, a, code=1)


@pytest.mark.process
def test_many_differences_are_cut_in_the_text_and_whole_in_json(tmp_path: Path) -> None:
    a = written(tmp_path, program_state({"n": [0] * 1000}), "a.h5")
    b = written(tmp_path, program_state({"n": [1] * 1000}), "b.h5")
    lines = command("diff", a, b, code=1).splitlines()
    assert len(lines) == 52
    assert lines[-2] == "... and 950 more values differ"
    assert len(json.loads(command("diff", a, b, "--json", code=1))["values"]) == 1000


FIGURES = [
    (np.array([1 + 1j, 2]), np.array([1 + 3j, 2]), 1, 2.0),
    (np.array([True, False]), np.array([False, True]), 2, 1.0),
    (np.array([0, 2**64 - 1], np.uint64), np.array([0, 2**64 - 2], np.uint64), 1, 1.0),
    (np.array([2**63 - 1]), np.array([-(2**63)]), 1, 2.0**64 - 1),
    (np.array([1, 2], np.float16), np.array([1, 2.5], np.float16), 1, 0.5),
    (np.array([1e308]), np.array([-1e308]), 1, float("inf")),
]


@pytest.mark.parametrize(("a", "b", "n", "largest"), FIGURES)
def test_the_figures_of_every_dtype(a: Array, b: Array, n: int, largest: float) -> None:
    found = diff.compare_arrays([a], [b])
    assert not found["equal"]
    assert (found["n_different"], found["max_abs"]) == (n, largest)
    assert (found["max_ulp"] is None) == (a.dtype.kind in "biu")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_equal_bits_are_equal_in_every_dtype_nan_included(dtype: str) -> None:
    array = with_bits(dtype, (1000,))
    assert diff.compare_arrays([array], [array.copy()]) == {"equal": True}
    changed = array.copy()
    changed.view(np.uint8)[-1] ^= 1
    assert diff.compare_arrays([array], [changed])["first"] == 999


# --- inspect


@pytest.mark.process
def test_inspect_shows_values_and_statistics(tmp_path: Path) -> None:
    path = written(tmp_path, program_state(full_program()))
    lines = command("inspect", path).splitlines()
    first = lines.index("values") + 1
    shown = lines[first : lines.index("", first)]
    values = {line[2:20].strip(): line[22:] for line in shown}
    assert values["accepted"] == "3"
    assert values["large"] == f"-1{'0' * 40}"
    assert values["nan"] == "(nan, -inf, -0.0, (1+nanj))"
    assert values["text"] == r"'é \x1b[2J\n'"
    assert values["rng"].startswith("PCG64 generator ")
    assert "arrays" not in values  # it holds arrays only, and they are in the table
    assert all(len(text) < 120 for text in values.values())
    assert not any(line.startswith("parameters") for line in lines)
    assert any(line.startswith("state/θ ") for line in lines)


@pytest.mark.process
def test_inspect_selects_arrays_and_values_by_pattern(tmp_path: Path) -> None:
    path = written(tmp_path, program_state(full_program()))
    arrays = command("inspect", path, "--path", "state/cube")
    assert "state/cube" in arrays
    assert "values" not in arrays
    assert "state/" not in command("inspect", path, "--path", "values/accepted")


@pytest.mark.process
def test_inspect_gives_the_whole_values_as_json(tmp_path: Path) -> None:
    live = full_program() | {"long": "x" * 5000}
    path = written(tmp_path, program_state(live))
    contents = json.loads(command("inspect", path, "--json"))
    assert contents["values"] == json.loads(capture(live).values)
    assert contents["values"]["accepted"] == 3
    arrays = {array["path"]: array for array in contents["arrays"]}
    assert arrays["state/arrays/uint64"]["max"] == int(live["arrays"]["uint64"].max())
    written(tmp_path, small_state(), "task.h5")
    assert json.loads(command("inspect", tmp_path / "task.h5", "--json"))["values"] is None


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([3 + 4j, np.nan]), (5.0, 5.0, 5.0, 1)),
        (np.array([True, False]), (0, 1, 0.5, 0)),
        (np.array([2**64 - 1, 2**64 - 2], np.uint64), (2**64 - 2, 2**64 - 1, 2.0**64, 0)),
        (np.array([1, np.inf], np.float16), (1.0, 1.0, 1.0, 1)),
        (np.array([-1e308, 1e308]), (-1e308, 1e308, None, 0)),
    ],
)
def test_statistics_of_every_dtype(array: Array, expected: tuple[float | None, ...]) -> None:
    found = compute_statistics([array])
    assert (found["min"], found["max"], found["mean"], found["non_finite"]) == expected
    json.dumps(found, allow_nan=False)


def test_a_number_of_many_digits_is_shown_in_hexadecimal() -> None:
    assert value_texts(capture({"n": 1 << 100_000}).values)["n"] == f"0x1{'0' * 193} ..."


# --- load_checkpoint


def test_load_checkpoint_gives_the_state_without_running_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = full_program()
    path = written(tmp_path, program_state(live))
    monkeypatch.setattr(Emulator, "load_state_dict", lambda *_: pytest.fail("was called"))
    found = stepctl.load_checkpoint(path)
    assert found.global_step == STEP
    expected = copy.copy(live)
    expected["emulator"] = live["emulator"].state_dict()
    assert same_values(found.values, expected)
    assert found.values is not None
    assert found.values["θ"] is found.arrays["state/θ"]
    assert found.arrays["state/by columns"].tobytes() == live["by columns"].tobytes()
    assert stepctl.load_checkpoint(written(tmp_path, small_state(), "task.h5")).values is None
