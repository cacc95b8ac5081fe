"""Strict YAML: 1.2 core scalars, where every value stands, and nothing that surprises.

Refused: duplicate keys, anchors and aliases, tags, merge keys, more than one document.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from stepctl import files
from stepctl.errors import ConfigError
from stepctl.files import open_regular
from stepctl.problems import Path, in_lines, in_one_line

MAX_BYTES = 1 << 15  # half a second's work
_MAX_DEPTH = 20
_MAX_KNOWN = 4  # texts
_LONGEST_NAME = 200  # characters of a file's name in a message

# YAML 1.2.2, section 10.3.2: the core schema's scalars
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Document:
    """A parsed mapping, and for each path in it the place where it was written ("file:line:column")."""

    value: dict[str, Any]
    places: dict[Path, str] = field(default_factory=dict)
    key_places: dict[Path, str] = field(default_factory=dict)

    def place(self, path: Path, key: bool = False) -> str:
        """Return where this path, or the nearest path above it, was written."""
        if key and path in self.key_places:
            return self.key_places[path]
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "config")

    def set(self, assignment: str) -> None:
        """Apply "a.b=VALUE", with VALUE read as YAML; ConfigError if it is not of that form."""
        key, equals, text = assignment.partition("=")
        path, option = tuple(key.split(".")), in_one_line(f"--set {key}", _LONGEST_NAME)
        if not equals or not all(path):
            given = in_one_line(f"--set {assignment}", _LONGEST_NAME)
            raise ConfigError(f"{given}: give KEY=VALUE, such as optimizer.learning_rate=1e-3")
        if len(path) > _MAX_DEPTH:
            raise ConfigError(f"{option}: nested deeper than {_MAX_DEPTH} levels")
        if len(assignment) > MAX_BYTES:
            raise ConfigError(f"{option}: longer than {MAX_BYTES} bytes; a config is a page of text")
        parsed = _Parser(text, option).parse()
        self._put(path, parsed.root, option, *parsed.places_in(option))

    def set_all(self, assignments: Iterable[str]) -> None:
        """Apply each "a.b=VALUE"; ConfigError with the problems of all."""
        problems: list[str] = []
        for assignment in assignments:
            try:
                self.set(assignment)
            except ConfigError as error:
                problems += str(error).splitlines()
        if problems:
            raise ConfigError(in_lines(problems))

    def put(self, key: str, value: Any, option: str) -> None:
        """Set a dotted key to what a command-line option, or a caller, asks for."""
        self._put(tuple(key.split(".")), value, option, {(): option}, {})

    def _put(
        self, path: tuple[str, ...], value: Any, name: str, places: dict[Path, str], key_places: dict[Path, str]
    ) -> None:
        at = self.value
        for part in path[:-1]:
            child = at.get(part)
            if not isinstance(child, dict):
                child = at[part] = {}
            at = child
        at[path[-1]] = value
        for old in [old for old in self.places if old[: len(path)] == path]:
            del self.places[old]
        self.places |= {path + below: place for below, place in places.items()}
        self.key_places |= {path: name} | {path + below: place for below, place in key_places.items()}


def load(path: str, shown: str | None = None) -> Document:
    """Read a YAML file whose top is a mapping; ConfigError with every problem, one a line.

    Messages call the file `shown`.
    """
    name = in_one_line(shown or path, _LONGEST_NAME)
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{name}: longer than {MAX_BYTES} bytes; a config is a page of text")
        text = data.decode()
    except OSError as error:
        if files.is_unavailable(error):
            raise files.unreadable(name, error) from error
        raise ConfigError(f"{name}: cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{name}: not UTF-8 text: {where}; save it as UTF-8") from error
    except ValueError as error:
        raise ConfigError(f"{name}: not a path: {error}") from error
    return loads(text, name)


def loads(text: str, name: str) -> Document:
    """Read YAML text whose top is a mapping; `name` stands for the file in messages."""
    parsed = _parsed(text, name)
    if not isinstance(parsed.root, dict):
        raise ConfigError(f"{name}:1:1: a mapping of keys is needed, such as 'seed: 0'")
    return Document(copy.deepcopy(parsed.root), *parsed.places_in(name))


_known: dict[str, _Parser] = {}  # a run reads the same text from its config, its frozen one and each checkpoint


def _parsed(text: str, name: str) -> _Parser:
    if text not in _known:
        parser = _Parser(text, name).parse()
        if len(_known) == _MAX_KNOWN:
            _known.clear()
        _known[text] = parser
    return _known[text]


class _Parser:
    """Builds plain values from the event stream, and notes where each stands (":line:column")."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.root: Any = None
        self.spots: dict[Path, str] = {}
        self.key_spots: dict[Path, str] = {}
        self.problems: list[str] = []
        self._events: Iterator[yaml.Event] = iter(())

    def parse(self) -> _Parser:
        try:
            self._documents()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{self.name}:{mark.line + 1}:{mark.column + 1}" if mark else self.name
            self.problems.append(f"{place}: not YAML: {error.problem or error.context}")
        except yaml.reader.ReaderError as error:
            above, start = self.text.count("\n", 0, error.position), self.text.rfind("\n", 0, error.position)
            place = f"{self.name}:{above + 1}:{error.position - start}"
            letter = ascii(self.text[error.position])
            self.problems.append(f"{place}: the character {letter} is not allowed; save the file as plain UTF-8 text")
        except (yaml.YAMLError, ValueError) as error:  # PyYAML lets chr()'s ValueError through
            self.problems.append(f"{self.name}: not YAML: {' '.join(str(error).split())}")
        if self.problems:
            raise ConfigError(in_lines(self.problems))
        return self

    def places_in(self, name: str) -> tuple[dict[Path, str], dict[Path, str]]:
        """Return the places of values and of keys in a file of this name."""
        values, keys = (
            {path: f"{name}{spot}" for path, spot in spots.items()} for spots in (self.spots, self.key_spots)
        )
        return values, keys

    def _documents(self) -> None:
        # one event at a time: the depth limit must come before the scanner's quadratic time
        self._events = yaml.parse(self.text, yaml.SafeLoader)
        n_documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                n_documents += 1
                if n_documents > 1:
                    self._problem(event, "a second document; one is allowed")
                if event.version not in (None, (1, 2)):
                    self._problem(event, "YAML 1.2 is read here; drop the directive")
            elif isinstance(event, yaml.NodeEvent):
                value = self._value(event, ())
                self.root = value if n_documents == 1 else self.root

    def _problem(self, event: yaml.Event, message: str) -> None:
        self.problems.append(f"{self._place(event)}: {message}")

    def _place(self, event: yaml.Event) -> str:
        return f"{self.name}{self._spot(event)}"

    def _spot(self, event: yaml.Event) -> str:
        mark = event.start_mark
        assert mark is not None
        return f":{mark.line + 1}:{mark.column + 1}"

    def _value(self, event: Any, path: Path) -> Any:
        self.spots.setdefault(path, self._spot(event))
        if isinstance(event, yaml.AliasEvent):
            self._problem(event, f"alias *{event.anchor}; write the value out")
            return None
        if event.anchor:
            self._problem(event, f"anchor &{event.anchor}; write each value out where it is used")
        if event.tag:
            self._problem(event, f"tag {event.tag}; plain values only")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if len(path) >= _MAX_DEPTH:
            raise ConfigError(f"{self._place(event)}: nested deeper than {_MAX_DEPTH} levels")
        return self._sequence(path) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(path)

    def _sequence(self, path: Path) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, (*path, len(values))))
        return values

    def _mapping(self, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, path)
            below = (*path, key)
            if key in values:
                self._problem(event, f"duplicate key {key!r}; the first stands at {self.name}{self.key_spots[below]}")
            else:
                self.key_spots[below] = self._spot(event)
            value = self._value(next(self._events), below)
            values.setdefault(key, value)
        return values

    def _key(self, event: yaml.Event, path: Path) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            self._value(event, (*path, "?"))
            self._problem(event, "a key must be a word")
            return "?"
        if event.anchor or event.tag:
            self._problem(event, "a key takes no anchor and no tag")
        if event.value == "<<" and event.implicit[0]:
            self._problem(event, "merge key <<; write the keys out")
        return self._text(event)

    def _text(self, event: yaml.ScalarEvent) -> str:
        text: str = event.value
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            self._problem(event, f"{text[:24]!a} holds half a character (a lone surrogate); write it whole")
        return text

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text = self._text(event)
        if not event.implicit[0]:
            return text
        try:
            value = _core_scalar(text)
        except ValueError:
            value = 0
            self._problem(event, f"a number of {len(text)} digits is too long")
        if isinstance(value, int) and value.bit_length() > 64:
            value = 0
            self._problem(event, f"{text[:24]} is too large a number")
        if isinstance(value, float) and not math.isfinite(value):
            self._problem(event, f"{text} is not a finite number")
        return value


def _core_scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF_NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes whatever the strict reader would not read back as the same string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern in (
    ("merge", re.compile("<<")),
    ("null", _NULL),
    ("bool", _BOOL),
    ("int", _INT),
    ("float", _FLOAT),
    ("float", _INF_NAN),
):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern.pattern})$"), None)


def dumps(value: dict[str, Any]) -> str:
    """Write plain values as YAML that `loads` reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> leaf value."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat
