"""The YAML reader: core-schema scalars, the place of every value, and what is refused."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion

from stepctl.config import yaml
from stepctl.errors import ConfigError

SCALARS: dict[str, Any] = {
    # integers
    "0": 0, "7": 7, "+7": 7, "-7": -7, "017": 17, "0o17": 15, "0x1F": 31, "0xff": 255,
    # floats
    "1e-3": 0.001, "1e3": 1000.0, "1E+3": 1000.0, "1.": 1.0, ".5": 0.5, "-.5": -0.5, "+1.5e-2": 0.015, "3.0": 3.0,
    # booleans and null
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "null": None, "Null": None, "NULL": None, "~": None, "": None,
    # what YAML 1.1 and other readers take for something else
    "no": "no", "yes": "yes", "on": "on", "off": "off", "y": "y", "tRUE": "tRUE", "nULL": "nULL", "1_000": "1_000",
    "0b1": "0b1", "0O17": "0O17", "-0x1": "-0x1", "+0o7": "+0o7", "1:30": "1:30", "2020-01-01": "2020-01-01",
    ".": ".", "e1": "e1", "1e": "1e", "=": "=",
    # quoted and block scalars are strings whatever they spell
    "'1'": "1", '"1e-3"': "1e-3", "'true'": "true", '"null"': "null", "'~'": "~", "''": "", "'0x1F'": "0x1F",
    "|-\n  1": "1", ">-\n  null": "null",
}  # fmt: skip

REFUSED: dict[str, str] = {
    "duplicate keys, at every level": "a: 1\nb: {c: 1, c: 2}\na: 2",
    "duplicate keys in other words": 'a: 1\n"a": 2',
    "anchors and aliases": "a: &x [1]\nb: [*x, 2]",
    "an alias of nothing": "a: *x",
    "tags": "a: !!python/object/apply:os.system [echo]\nb: !mine {c: 1}\nd: !!str 1\ne: ! f",
    "a merge key": "a:\n  <<: {b: 1}",
    "a key that is no word": "? {b: 1}\n: 2",
    "a key with an anchor": "&x a: 1",
    "more documents": "a: 1\n---\nb: 2\n---\nc: 3",
    "not finite": "a: .inf\nb: [-.INF, .nan]\nc: 1e999",
    "a list": "- 1",
    "a scalar": "5",
    "nothing": "# nothing but a comment",
    "a list that is not closed": "a: 1\nb: [1, 2",
    "a tab": "a:\n\t- 1",
    "what stands before a broken end, too": "a: &x 1\nb: [1, 2",
    "another YAML": "%YAML 1.1\n---\na: 1",
    "no character": 'a: "\\U00110000"',
    "half a character": '"a\\ud800": "\\udfff"',
    "a character that YAML has not": "a: 1\nb: \x00",
    "what a terminal would obey": '"\\e[31m\\u202e\\n": {}\n"\\e[31m\\u202e\\n": &x 1',
    "a number beyond 64 bits": "a: 18446744073709551615\nb: 18446744073709551616\nc: 0x" + "f" * 99,
    "a number of too many digits": "a: " + "9" * 5000,
    "too deep": "a: " + "[" * 20 + "]" * 20,
    "several at once": "a: &x 1\nb: !t 2\na: .nan\n<<: {}",
}


def problems(text: str) -> list[str]:
    """Return the lines of the error that this text is refused with."""
    with pytest.raises(ConfigError) as caught:
        yaml.loads(text, "c.yaml")
    return str(caught.value).splitlines()


def unreadable(path: Path) -> str:
    """Return the error that a file is refused with, which begins with its path."""
    with pytest.raises(ConfigError) as caught:
        yaml.load(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    return message.replace(str(path), "PATH")


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_follow_the_core_schema(text: str) -> None:
    value = yaml.loads(f"a: {text}", "c.yaml").value["a"]
    assert (type(value), value) == (type(SCALARS[text]), SCALARS[text])


def test_keys_are_strings() -> None:
    assert list(yaml.loads("1: a\n01: b\nnull: c\ntrue: d", "c.yaml").value) == [
        "1",
        "01",
        "null",
        "true",
    ]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_every_problem_at_its_place(case: str, snapshot: SnapshotAssertion) -> None:
    assert problems(REFUSED[case]) == snapshot


def test_as_deep_as_allowed() -> None:
    value = yaml.loads("a: " + "[" * 19 + "]" * 19, "c.yaml").value["a"]
    for _ in range(18):
        (value,) = value
    assert value == []


def test_places_are_line_and_column() -> None:
    document = yaml.loads("seed: 1\ndata:\n  name: digits\n  sizes: [1, 22, {b: 3}]\n", "c.yaml")
    places = {(): "1:1", ("seed",): "1:7", ("data", "name"): "3:9", ("data", "sizes", 1): "4:14"}
    places |= {("data", "sizes", 2, "b"): "4:22"}
    for path, place in places.items():
        assert document.place(path) == f"c.yaml:{place}"
    assert document.place(("data", "sizes"), key=True) == "c.yaml:4:3"
    assert document.place(("data", "missing", "below")) == document.place(("data",)) == "c.yaml:3:3"


def test_leading_comments_count_as_lines() -> None:
    """The same text is parsed once, whatever comments a file has before it."""
    text = "seed: 0\n"
    assert yaml.loads(text, "a.yaml").place(("seed",)) == "a.yaml:1:7"
    commented = yaml.loads(f"# one\n# two\n{text}", "b.yaml")
    assert commented.place(("seed",)) == "b.yaml:3:7"
    assert commented.place(("seed",), key=True) == "b.yaml:3:1"
    for wrong, place in (("seed: !a 0\n", "c.yaml:2:7"), ("seed: \x07\n", "c.yaml:2:7")):
        with pytest.raises(ConfigError, match=place):
            yaml.loads(f"# one\n{wrong}", "c.yaml")


def test_a_place_without_a_text() -> None:
    assert yaml.Document({"a": 1}).place(("a",)) == "config"


def test_a_file_is_text_of_limited_length(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"a: 1 #" + b"x" * (yaml.MAX_BYTES - 6))
    assert yaml.load(str(path)).value == {"a": 1}
    path.write_bytes(b"a: 1 #" + b"x" * (yaml.MAX_BYTES - 5))
    assert unreadable(path) == snapshot(name="too long")
    path.write_bytes(b"a: caf\xe9!")
    assert unreadable(path) == snapshot(name="not UTF-8")
    path.write_bytes("é: ü".encode())
    assert yaml.load(str(path)).value == {"é": "ü"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_named(
    encoding: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1", encoding)
    assert unreadable(path) == snapshot


def test_a_pipe_or_device_is_refused_without_waiting(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert [unreadable(tmp_path / "pipe"), unreadable(Path("/dev/zero"))] == snapshot


def test_a_name_is_shown_in_one_line_and_not_in_full() -> None:
    for path, shown in {"a\nb\x1b[31m": "a\\nb\\x1b[31m", "no\0path": "no\\x00path"}.items():
        with pytest.raises(ConfigError) as caught:
            yaml.load(path)
        assert str(caught.value).startswith(f"{shown}: ")
    with pytest.raises(ConfigError) as caught:
        yaml.loads("[", "c" * 10_000)
    assert len(problems("a: *" + "x" * 30_000)[0]) < 1100


def test_a_file_that_cannot_be_read(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    assert [unreadable(tmp_path / "nope.yaml"), unreadable(tmp_path)] == snapshot


@pytest.mark.parametrize(
    "text", ["[" * 60_000, "{a: " * 15_000, "[? " * 20_000], ids=lambda text: text[:3]
)
def test_a_bottomless_file_is_refused_at_once(text: str) -> None:
    start = time.process_time()
    (line,) = problems(f"a: {text}")
    assert line.endswith("nested deeper than 20 levels")
    assert time.process_time() - start < 5, "without the limit it is four minutes"


def test_not_every_problem_of_a_ruin_is_listed() -> None:
    lines = problems("a: 1\n" * 1001)
    assert len(lines) == 51
    assert lines[-1] == "... and 950 more"


SETTINGS: dict[str, tuple[str, Any]] = {
    "seed=1e-3": ("seed", 0.001),
    "a.b=no": ("a", {"b": "no", "c": [1]}),
    "a.c={d: 0x10}": ("a", {"b": 1, "c": {"d": 16}}),
    "a.new.deep=[1, 2]": ("a", {"b": 1, "c": [1], "new": {"deep": [1, 2]}}),
    "seed.inside=1": ("seed", {"inside": 1}),
    "a=": ("a", None),
    "a='b=c'": ("a", "b=c"),
    "a=b=c": ("a", "b=c"),
}
NOT_SETTINGS = {
    "no value": "seed",
    "no key": "=1",
    "an empty part of a key": "a..b=1",
    "an empty last part of a key": "a.=1",
    "not finite": "a=[1, .inf]",
    "duplicate keys": "a={b: 1, b: 2}",
    "an anchor": "a=&x 1",
    "a long key without a value": "a" * 300,
    "a key that is too deep": ".".join("a" * 21) + "=1",
    "a value that is too long": f"a={'[1, ' * 9000}",
    "a list that is not closed": "a=[1",
}


def document() -> yaml.Document:
    return yaml.loads("seed: 0\na: {b: 1, c: [1]}", "c.yaml")


@pytest.mark.parametrize("assignment", SETTINGS)
def test_set_reads_its_value_as_the_file_is_read(assignment: str) -> None:
    changed = document()
    changed.set(assignment)
    key, value = SETTINGS[assignment]
    assert changed.value == {**document().value, key: value}


@pytest.mark.parametrize("case", NOT_SETTINGS)
def test_set_refuses_as_the_file_is_refused(case: str, snapshot: SnapshotAssertion) -> None:
    changed = document()
    with pytest.raises(ConfigError) as caught:
        changed.set(NOT_SETTINGS[case])
    assert str(caught.value) == snapshot
    assert changed.value == document().value


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        document().set_all(["seed", "a.b=[1", "seed=1", "a..b=1"])
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "--set seed",
        "--set a.b:1:3",
        "--set a..b=1",
    ]


def test_an_option_is_a_place_too() -> None:
    changed = document()
    changed.put("a", {"c": 2}, "--an-option")
    assert changed.value == {"seed": 0, "a": {"c": 2}}
    assert changed.place(("a", "c")) == changed.place(("a",), key=True) == "--an-option"
    assert changed.place(("seed",)) == "c.yaml:1:7"


def test_set_is_a_place_of_its_own() -> None:
    changed = document()
    changed.set("a.c=[1, {d: 2}]")
    assert changed.place(("a", "c", 1, "d")) == "--set a.c:1:9"
    assert changed.place(("a", "c"), key=True) == "--set a.c"
    assert changed.place(("a", "b")) == "c.yaml:2:8"
    changed.set("a=1")
    assert changed.place(("a", "c", 1, "d")) == "--set a:1:1"


odd = [
    "a: b",
    "- a",
    "#",
    " a ",
    "&x",
    "*x",
    "!t",
    "a\nb",
    "\r",
    "---",
    "<<",
    "\ufeff",
    "\x85",
    "\u2028",
    "\0",
    "\U0001f600",
]
texts = st.sampled_from([*SCALARS, *map(str, SCALARS.values()), *odd])
texts |= st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | texts
nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
plain_values = st.dictionaries(texts, nested, max_size=4)


def spelled(value: Any) -> Any:
    """Return a value in which 1, 1.0 and True, and 0.0 and -0.0, are different things."""
    if isinstance(value, dict):
        return {key: spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spelled(item) for item in value]
    return type(value).__name__, value, math.copysign(1, value) if isinstance(value, float) else 0


@pytest.mark.training
@settings(deadline=None, derandomize=True, max_examples=200)
@given(plain_values)
def test_written_values_are_read_back(value: dict[str, Any]) -> None:
    assert spelled(yaml.loads(yaml.dumps(value), "c.yaml").value) == spelled(value)


@pytest.mark.parametrize("text", SCALARS)
def test_a_string_that_looks_like_something_else_stays_one(text: str) -> None:
    for value in ({"a": text}, {text: 1}, {"a": [text, {text: text}]}):
        assert yaml.loads(yaml.dumps(value), "c.yaml").value == value


def test_shared_values_are_written_out_in_order() -> None:
    shared = [1, 2]
    assert yaml.dumps({"b": shared, "a": shared}) == "b: [1, 2]\na: [1, 2]\n"
