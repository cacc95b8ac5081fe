"""No text of `/values`, however it was changed, does more than being refused or restored."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.errors import CheckpointError, ConfigError, StepctlError
from stepctl.state.program_state import restore
from stepctl.state.value_decoder import SavedObject, _Decoder, decode
from stepctl.state.value_text import compare_values, value_texts
from stepctl.state.values import CapturedState, capture
from tests.support.program_states import (
    Emulator,
    empty_program,
    fresh_program,
    full_program,
    same_values,
    small_program,
)

Figure = Callable[[str, int], None]

ODD: list[Any] = [None, True, 0, -1, 5, 625, 2**31, 2**64, 10**400, 1.5, "", "a", "0x1", "-0x1"]
ODD += [
    "0x" + "f" * 30,
    "\udc80",
    [],
    {},
    [[]],
    ["uint32", [1]],
    ["uint64", [2**63]],
    ["bool", "02"],
]
TAGS = ["$array", "$fortran", "$tuple", "$dict", "$int", "$float", "$complex", "$bytes", "$scalar"]
TAGS += ["$generator", "$random_state", "$object", "$", "a/b", "."]


def nodes(encoded: Any) -> list[Any]:
    """Return every list and dict in a JSON value, and the value itself."""
    found = [encoded]
    children = encoded.values() if isinstance(encoded, dict) else encoded
    for child in children:
        if isinstance(child, dict | list):
            found += nodes(child)
    return found


def with_changed_structure(text: str, generator: random.Random) -> str:
    """Replace, remove, move or tag a value somewhere in the text."""
    encoded = json.loads(text)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        node = generator.choice(nodes(encoded))
        if not node:
            continue
        key = generator.choice(list(node) if isinstance(node, dict) else range(len(node)))
        how = generator.randrange(4)
        if how == 0:
            node[key] = copy.deepcopy(generator.choice(ODD))
        elif how == 1:
            del node[key]
        elif how == 2:
            node[key] = copy.deepcopy(generator.choice(nodes(encoded)))
        elif isinstance(node, dict):
            node[generator.choice(TAGS)] = node.pop(key)
    return json.dumps(encoded)


def with_changed_letters(text: str, generator: random.Random) -> str:
    """Change, remove or repeat some letters of the text."""
    for _ in range(generator.choice((1, 1, 2, 8))):
        start = generator.randrange(len(text))
        end = start + generator.choice((0, 1, 1, 3, 40))
        new = generator.choice(
            ["", "0", "-", '"', "[", "}", "$", "\\u0000", "1e999", text[start:end] * 2]
        )
        text = text[:start] + new + text[end:]
    return text


def draw(value: Any) -> None:
    """Use every generator in a decoded state: one with a bad state might read beyond its memory."""
    if isinstance(value, SavedObject):
        value = value.items
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            draw(item)
    elif isinstance(value, np.random.Generator):
        value.random(700)
        value.integers(0, 9, 3, dtype=np.uint32)
        if value.bit_generator.seed_seq is not None:
            value.spawn(1)
    elif isinstance(value, np.random.RandomState):
        value.random_sample(700)
        value.normal()


def attempt(live: dict[str, Any], captured: CapturedState) -> StepctlError | None:
    """Decode and restore; return the refusal."""
    try:
        draw(decode(captured.values, captured.arrays))
        restore(live, captured)
    except (CheckpointError, ConfigError) as error:
        return error
    return None


@pytest.mark.parametrize("change", [with_changed_structure, with_changed_letters])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(1, 41))]
)
def test_a_changed_text_is_refused_or_restored(
    seed: int, change: Callable[[str, random.Random], str], figure: Figure
) -> None:
    generator = random.Random(seed)
    n_refused = 0
    for saved, fresh in ((small_program, fresh_program), (full_program, empty_program)):
        captured = capture(saved())
        for _ in range(150):
            text = change(captured.values, generator)
            live = fresh()
            held = dict(live)
            refusal = attempt(live, CapturedState(captured.arrays, text))
            if refusal is None:
                draw(live)
                value_texts(text)
                compare_values(text, captured.values)
                continue
            n_refused += 1
            assert "\n" not in str(refusal)
            if isinstance(refusal, CheckpointError):
                assert refusal.code == "values"
                assert all(live[key] is held[key] for key in held)
    assert 100 < n_refused < 300
    figure("changed texts of values", 300)


def test_the_page_of_the_format_lists_every_tag_and_its_example_is_right() -> None:
    page = (Path(__file__).parents[2] / "runs" / "README.md").read_text()
    section = page[page.index("### The state of a program") :]
    assert re.findall(r"^\| `(\$\w+)` \|", section, re.MULTILINE) == list(_Decoder._TAGS)
    state = eval(section.split("```python\n")[1].split("```")[0], {"np": np, "float": float})
    values = section.split("```json\n")[1].split("```")[0].strip()
    captured = capture(state)
    assert captured.values == values
    assert [f"`/state/{path}`" in section for path in captured.arrays] == [True, True]


def test_what_is_refused_is_refused_before_anything_changes() -> None:
    """Not even the values before the one that is refused."""
    captured = capture(full_program())
    live = full_program()
    live["accepted"] = 99
    live["arrays"]["int8"][:] = 1
    before = copy.deepcopy(live)
    encoded = json.loads(captured.values)
    encoded["emulator"] = {"$object": 3}
    with pytest.raises(CheckpointError, match="emulator"):
        restore(live, CapturedState(captured.arrays, json.dumps(encoded)))
    assert same_values(live, before)


def test_an_object_that_is_missing_or_fails_leaves_the_rest_unchanged() -> None:
    captured = capture(full_program())
    live = full_program() | {"accepted": 99, "emulator": None}
    live["rng"].random()
    before = copy.deepcopy(live)
    with pytest.raises(ConfigError, match=r"state\['emulator'\]: .* put the object into the state"):
        restore(live, captured)
    assert same_values(live, before)


def test_an_object_whose_load_fails_leaves_the_rest_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = capture(full_program())
    live = full_program() | {"accepted": 99}
    live["arrays"]["int8"][:] = 1
    before = copy.deepcopy(live)
    monkeypatch.setattr(Emulator, "load_state_dict", lambda *_: {}["missing"])
    with pytest.raises(ConfigError, match=r"state\['emulator'\]: load_state_dict\(\) failed"):
        restore(live, captured)
    assert same_values(live, before)


def test_a_captured_state_can_be_restored_twice() -> None:
    captured = capture(full_program())
    one = empty_program()
    restore(one, captured)
    one["rng"].random()
    one["θ"][:] = 0
    one["none"].append(1)
    other = empty_program()
    restore(other, captured)
    assert same_values(other, full_program())
