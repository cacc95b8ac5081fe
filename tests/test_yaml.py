"""The reader of configs: 1.2 core scalars, where every value stands, and a refusal of whatever could surprise."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepctl import yamlio
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

REFUSED: dict[str, tuple[str, list[str]]] = {
    "duplicate keys, at every level": (
        "a: 1\nb: {c: 1, c: 2}\na: 2",
        [
            "c.yaml:2:11: duplicate key 'c'; the first stands at c.yaml:2:5",
            "c.yaml:3:1: duplicate key 'a'; the first stands at c.yaml:1:1",
        ],
    ),
    "duplicate keys in other words": (
        'a: 1\n"a": 2',
        ["c.yaml:2:1: duplicate key 'a'; the first stands at c.yaml:1:1"],
    ),
    "anchors and aliases": (
        "a: &x [1]\nb: [*x, 2]",
        ["c.yaml:1:4: anchor &x; write each value out where it is used", "c.yaml:2:5: alias *x; write the value out"],
    ),
    "an alias of nothing": ("a: *x", ["c.yaml:1:4: alias *x; write the value out"]),
    "tags": (
        "a: !!python/object/apply:os.system [echo]\nb: !mine {c: 1}\nd: !!str 1\ne: ! f",
        [
            "c.yaml:1:4: tag tag:yaml.org,2002:python/object/apply:os.system; plain values only",
            "c.yaml:2:4: tag !mine; plain values only",
            "c.yaml:3:4: tag tag:yaml.org,2002:str; plain values only",
            "c.yaml:4:4: tag !; plain values only",
        ],
    ),
    "a merge key": ("a:\n  <<: {b: 1}", ["c.yaml:2:3: merge key <<; write the keys out"]),
    "a key that is no word": ("? {b: 1}\n: 2", ["c.yaml:1:3: a key must be a word"]),
    "a key with an anchor": ("&x a: 1", ["c.yaml:1:1: a key takes no anchor and no tag"]),
    "more documents": (
        "a: 1\n---\nb: 2\n---\nc: 3",
        ["c.yaml:2:1: a second document; one is allowed", "c.yaml:4:1: a second document; one is allowed"],
    ),
    "not finite": (
        "a: .inf\nb: [-.INF, .nan]\nc: 1e999",
        [
            "c.yaml:1:4: .inf is not a finite number",
            "c.yaml:2:5: -.INF is not a finite number",
            "c.yaml:2:12: .nan is not a finite number",
            "c.yaml:3:4: 1e999 is not a finite number",
        ],
    ),
    "a list": ("- 1", ["c.yaml:1:1: a mapping of keys is needed, such as 'seed: 0'"]),
    "a scalar": ("5", ["c.yaml:1:1: a mapping of keys is needed, such as 'seed: 0'"]),
    "nothing": ("# nothing but a comment", ["c.yaml:1:1: a mapping of keys is needed, such as 'seed: 0'"]),
    "a list that is not closed": (
        "a: 1\nb: [1, 2",
        ["c.yaml:2:9: not YAML: expected ',' or ']', but got '<stream end>'"],
    ),
    "a tab": ("a:\n\t- 1", ["c.yaml:2:1: not YAML: found character '\\t' that cannot start any token"]),
    "what stands before a broken end, too": (
        "a: &x 1\nb: [1, 2",
        [
            "c.yaml:1:4: anchor &x; write each value out where it is used",
            "c.yaml:2:9: not YAML: expected ',' or ']', but got '<stream end>'",
        ],
    ),
    "another YAML": ("%YAML 1.1\n---\na: 1", ["c.yaml:1:1: YAML 1.2 is read here; drop the directive"]),
    "no character": ('a: "\\U00110000"', ["c.yaml: not YAML: chr() arg not in range(0x110000)"]),
    "half a character": (
        '"a\\ud800": "\\udfff"',
        [
            "c.yaml:1:1: 'a\\ud800' holds half a character (a lone surrogate); write it whole",
            "c.yaml:1:12: '\\udfff' holds half a character (a lone surrogate); write it whole",
        ],
    ),
    "a character that YAML has not": (
        "a: 1\nb: \x00",
        ["c.yaml:2:4: the character '\\x00' is not allowed; save the file as plain UTF-8 text"],
    ),
    "what a terminal would obey": (
        '"\\e[31m\\u202e\\n": {}\n"\\e[31m\\u202e\\n": &x 1',
        [
            "c.yaml:2:1: duplicate key '\\x1b[31m\\u202e\\n'; the first stands at c.yaml:1:1",
            "c.yaml:2:19: anchor &x; write each value out where it is used",
        ],
    ),
    "a number beyond 64 bits": (
        "a: 18446744073709551615\nb: 18446744073709551616\nc: 0x" + "f" * 99,
        [
            "c.yaml:2:4: 18446744073709551616 is too large a number",
            "c.yaml:3:4: 0xffffffffffffffffffffff is too large a number",
        ],
    ),
    "a number of too many digits": ("a: " + "9" * 5000, ["c.yaml:1:4: a number of 5000 digits is too long"]),
    "too deep": ("a: " + "[" * 20 + "]" * 20, ["c.yaml:1:23: nested deeper than 20 levels"]),
    "several at once": (
        "a: &x 1\nb: !t 2\na: .nan\n<<: {}",
        [
            "c.yaml:1:4: anchor &x; write each value out where it is used",
            "c.yaml:2:4: tag !t; plain values only",
            "c.yaml:3:1: duplicate key 'a'; the first stands at c.yaml:1:1",
            "c.yaml:3:4: .nan is not a finite number",
            "c.yaml:4:1: merge key <<; write the keys out",
        ],
    ),
}


def problems(text: str) -> list[str]:
    """Return the lines of the error that this text is refused with."""
    with pytest.raises(ConfigError) as caught:
        yamlio.loads(text, "c.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_those_of_the_core_schema(text: str) -> None:
    value = yamlio.loads(f"a: {text}", "c.yaml").value["a"]
    assert (type(value), value) == (type(SCALARS[text]), SCALARS[text])


def test_keys_are_strings() -> None:
    assert list(yamlio.loads("1: a\n01: b\nnull: c\ntrue: d", "c.yaml").value) == ["1", "01", "null", "true"]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_every_problem_at_its_place(case: str) -> None:
    text, expected = REFUSED[case]
    assert problems(text) == expected


def test_as_deep_as_allowed() -> None:
    value = yamlio.loads("a: " + "[" * 19 + "]" * 19, "c.yaml").value["a"]
    for _ in range(18):
        (value,) = value
    assert value == []


def test_places_are_line_and_column() -> None:
    document = yamlio.loads("seed: 1\ndata:\n  name: digits\n  sizes: [1, 22, {b: 3}]\n", "c.yaml")
    places = {(): "1:1", ("seed",): "1:7", ("data", "name"): "3:9", ("data", "sizes", 1): "4:14"}
    places |= {("data", "sizes", 2, "b"): "4:22"}
    for path, place in places.items():
        assert document.place(path) == f"c.yaml:{place}"
    assert document.place(("data", "sizes"), key=True) == "c.yaml:4:3"
    assert document.place(("data", "missing", "below")) == document.place(("data",)) == "c.yaml:3:3"


def test_a_place_without_a_text() -> None:
    assert yamlio.Document({"a": 1}).place(("a",)) == "config"


def test_a_file_is_text_of_limited_length(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"a: 1 #" + b"x" * (yamlio.MAX_BYTES - 6))
    assert yamlio.load(str(path)).value == {"a": 1}
    path.write_bytes(b"a: 1 #" + b"x" * (yamlio.MAX_BYTES - 5))
    with pytest.raises(ConfigError, match=r"c\.yaml: longer than 32768 bytes; a config is a page of text$"):
        yamlio.load(str(path))
    path.write_bytes(b"a: caf\xe9!")
    with pytest.raises(
        ConfigError, match=r"c\.yaml: not UTF-8 text: invalid continuation byte at byte 6; save it as UTF-8$"
    ):
        yamlio.load(str(path))
    path.write_bytes("é: ü".encode())
    assert yamlio.load(str(path)).value == {"é": "ü"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1", encoding)
    with pytest.raises(ConfigError, match=r"; save (it|the file) as (plain )?UTF-8"):
        yamlio.load(str(path))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(ConfigError) as caught:
            yamlio.load(path)
        reason = "not a regular file; copy its content into one"
        assert str(caught.value) == f"{path}: cannot be read: {reason}; check the path"


def test_a_name_is_shown_in_one_line_and_not_in_full() -> None:
    for path, shown in {"a\nb\x1b[31m": "a\\nb\\x1b[31m", "no\0path": "no\\x00path"}.items():
        with pytest.raises(ConfigError) as caught:
            yamlio.load(path)
        assert str(caught.value).startswith(f"{shown}: ")
    with pytest.raises(ConfigError) as caught:
        yamlio.loads("[", "c" * 10_000)
    assert len(problems("a: *" + "x" * 30_000)[0]) < 1100


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: cannot be read: No such file or directory; check the path$"):
        yamlio.load(str(tmp_path / "nope.yaml"))
    with pytest.raises(ConfigError, match=r": cannot be read: Is a directory; check the path$"):
        yamlio.load(str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 60_000, "{a: " * 15_000, "[? " * 20_000], ids=lambda text: text[:3])
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
    "seed": "--set seed: give KEY=VALUE, such as optimizer.learning_rate=1e-3",
    "=1": "--set =1: give KEY=VALUE, such as optimizer.learning_rate=1e-3",
    "a..b=1": "--set a..b=1: give KEY=VALUE, such as optimizer.learning_rate=1e-3",
    "a.=1": "--set a.=1: give KEY=VALUE, such as optimizer.learning_rate=1e-3",
    "a=[1, .inf]": "--set a:1:5: .inf is not a finite number",
    "a={b: 1, b: 2}": "--set a:1:8: duplicate key 'b'; the first stands at --set a:1:2",
    "a=&x 1": "--set a:1:1: anchor &x; write each value out where it is used",
    "a" * 300: f"--set {'a' * 94} ... {'a' * 100}: give KEY=VALUE, such as optimizer.learning_rate=1e-3",
    ".".join("a" * 21) + "=1": f"--set {'.'.join('a' * 21)}: nested deeper than 20 levels",
    f"a={'[1, ' * 9000}": "--set a: longer than 32768 bytes; a config is a page of text",
    "a=[1": "--set a:1:3: not YAML: expected ',' or ']', but got '<stream end>'",
}


def document() -> yamlio.Document:
    return yamlio.loads("seed: 0\na: {b: 1, c: [1]}", "c.yaml")


@pytest.mark.parametrize("assignment", SETTINGS)
def test_set_reads_its_value_as_the_file_is_read(assignment: str) -> None:
    changed = document()
    changed.set(assignment)
    key, value = SETTINGS[assignment]
    assert changed.value == {**document().value, key: value}


@pytest.mark.parametrize("assignment", NOT_SETTINGS)
def test_set_refuses_as_the_file_is_refused(assignment: str) -> None:
    changed = document()
    with pytest.raises(ConfigError) as caught:
        changed.set(assignment)
    assert str(caught.value) == NOT_SETTINGS[assignment]
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
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
plain_values = st.dictionaries(texts, nested, max_size=4)


def spelled(value: Any) -> Any:
    """Return a value in which 1, 1.0 and True, and 0.0 and -0.0, are different things."""
    if isinstance(value, dict):
        return {key: spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spelled(item) for item in value]
    return type(value).__name__, value, math.copysign(1, value) if isinstance(value, float) else 0


@settings(deadline=None, derandomize=True, max_examples=200)
@given(plain_values)
def test_what_is_written_is_read_back(value: dict[str, Any]) -> None:
    assert spelled(yamlio.loads(yamlio.dumps(value), "c.yaml").value) == spelled(value)


@pytest.mark.parametrize("text", SCALARS)
def test_a_string_that_looks_like_something_else_stays_one(text: str) -> None:
    for value in ({"a": text}, {text: 1}, {"a": [text, {text: text}]}):
        assert yamlio.loads(yamlio.dumps(value), "c.yaml").value == value


def test_shared_values_are_written_out_in_order() -> None:
    shared = [1, 2]
    assert yamlio.dumps({"b": shared, "a": shared}) == "b: [1, 2]\na: [1, 2]\n"
