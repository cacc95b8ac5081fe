"""Strict YAML 1.2, with the place of every value for messages.

Refused: duplicate keys, anchors, aliases, tags, merge keys, several documents.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from stepctl.config.messages import KeyPath
from stepctl.errors import ConfigError
from stepctl.system import files
from stepctl.system.files import open_regular
from stepctl.system.text import has_surrogate, in_lines, in_one_line

MAX_BYTES = 1 << 15  # parsed in half a second
_MAX_DEPTH = 20
_MAX_CACHED = 4  # texts
_MAX_NAME = 200  # characters of a file's name in a message

Position = tuple[int, int]  # line and column of a text, from 1


_LEADING_COMMENTS = re.compile(r"\A(?:#[\x20-\x7e]*\n)+")

# YAML 1.2.2, section 10.3.2: the core schema's scalars
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Document:
    """A parsed mapping, and the place ("file:line:column") of each value and key by its path."""

    value: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    key_places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath, key: bool = False) -> str:
        """Return the place of a value, or of its key; of the nearest section if it has none."""
        if key and path in self.key_places:
            return self.key_places[path]
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "config")

    def set(self, assignment: str, section: str | None = None) -> None:
        """Apply "a.b=VALUE", where VALUE is YAML; ConfigError if it does not have this form.

        The text is the argument of --set, or with a `section` of the option of its name, whose keys
        are those of the section.
        """
        key, equals, text = assignment.partition("=")
        path = tuple(key.split("."))
        name = "--set" if section is None else f"--{section}"
        option = in_one_line(f"{name} {key}", _MAX_NAME)
        if not equals or not all(path):
            given = in_one_line(f"{name} {assignment}", _MAX_NAME)
            example = "optimizer.learning_rate=1e-3" if section is None else "path=FILE"
            raise ConfigError(f"{given}: give KEY=VALUE, such as {example}")
        if section is not None:
            path = (section, *path)
        if len(path) > _MAX_DEPTH:
            raise ConfigError(f"{option}: nested deeper than {_MAX_DEPTH} levels")
        if len(assignment) > MAX_BYTES:
            raise ConfigError(
                f"{option}: longer than {MAX_BYTES} bytes; a config is a page of text"
            )
        parsed = _Parser(text, option).parse()
        self._put(path, parsed.root, option, *parsed.places_in(option))

    def set_all(self, assignments: Iterable[str], section: str | None = None) -> None:
        """Apply several "a.b=VALUE"; ConfigError with all problems. See `set` for `section`."""
        problems: list[str] = []
        for assignment in assignments:
            try:
                self.set(assignment, section)
            except ConfigError as error:
                problems += str(error).splitlines()
        if problems:
            raise ConfigError(in_lines(problems))

    def with_assignments(self, assignments: Iterable[str]) -> Document:
        """Return a copy with several "a.b=VALUE" applied; ConfigError with all problems."""
        changed = copy.deepcopy(self)
        changed.set_all(assignments)
        return changed

    def put(self, key: str, value: Any, option: str) -> None:
        """Set a dotted key to the value of a command-line option or of a caller's argument."""
        self._put(tuple(key.split(".")), value, option, {(): option}, {})

    def _put(
        self,
        names: tuple[str, ...],
        value: Any,
        option: str,
        places: dict[KeyPath, str],
        key_places: dict[KeyPath, str],
    ) -> None:
        """Set a value; `places` and `key_places` are those within it.

        The name of an item of a list is its number.
        """
        section: Any = self.value
        *outer, last = names
        path: KeyPath = ()
        for name in outer:
            key = _key_in(section, name, option)
            path += (key,)
            below = section.get(key) if isinstance(section, dict) else section[key]
            if not isinstance(below, dict | list):
                section[key] = {}
                self.places[path] = option
            section = section[key]
        key = _key_in(section, last, option)
        section[key] = value
        path += (key,)
        replaced = [old for old in self.places if old[: len(path)] == path]
        for old in replaced:
            del self.places[old]
        self.places |= {path + below: place for below, place in places.items()}
        self.key_places[path] = option
        self.key_places |= {path + below: place for below, place in key_places.items()}


def _key_in(section: dict[str, Any] | list[Any], name: str, option: str) -> str | int:
    """Return the key of a name: in a list the number of an item; ConfigError if there is none."""
    if isinstance(section, dict):
        return name
    if name.isascii() and name.isdecimal() and int(name) < len(section):
        return int(name)
    known = f"its items are 0 to {len(section) - 1}" if section else "it is empty"
    raise ConfigError(f"{option}: the list has no item {name!r}; {known}")


def load(path: str, shown: str | None = None) -> Document:
    """Read a YAML file that holds a mapping; ConfigError with all problems, in a file `shown`."""
    name = in_one_line(shown or path, _MAX_NAME)
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
        raise ConfigError(f"{name}: invalid path: {error}") from error
    return loads(text, name)


def loads(text: str, name: str) -> Document:
    """Parse YAML text that holds a mapping; messages name the file `name`."""
    content = _LEADING_COMMENTS.sub("", text)
    n_skipped = text.count("\n") - content.count("\n")
    parsed = _parse(content, name, n_skipped)
    if not isinstance(parsed.root, dict):
        raise ConfigError(f"{name}:1:1: the file should hold a mapping, such as 'seed: 0'")
    return Document(copy.deepcopy(parsed.root), *parsed.places_in(name, n_skipped))


# Texts without their leading comments: config.yaml and each checkpoint then hold the same one.
_cache: dict[str, _Parser] = {}


def _parse(text: str, name: str, n_skipped: int) -> _Parser:
    if text not in _cache:
        parser = _Parser(text, name, n_skipped).parse()
        if len(_cache) == _MAX_CACHED:
            _cache.clear()
        _cache[text] = parser
    return _cache[text]


class _Parser:
    """Builds plain values from PyYAML's events, and records their positions in the text.

    `n_skipped` is the number of lines of the file before the text, for messages.
    """

    def __init__(self, text: str, name: str, n_skipped: int = 0) -> None:
        self.text = text
        self.name = name
        self.root: Any = None
        self.positions: dict[KeyPath, Position] = {}
        self.key_positions: dict[KeyPath, Position] = {}
        self._n_skipped = n_skipped
        self.problems: list[str] = []
        self._events: Iterator[yaml.Event] = iter(())

    def parse(self) -> _Parser:
        """Parse the text; ConfigError with all problems."""
        try:
            self._documents()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self._place(_position(mark)) if mark else self.name
            self.problems.append(f"{place}: not YAML: {error.problem or error.context}")
        except yaml.reader.ReaderError as error:
            self.problems.append(self._forbidden_character(error.position))
        except (yaml.YAMLError, ValueError) as error:  # ValueError: of chr() within PyYAML
            self.problems.append(f"{self.name}: not YAML: {' '.join(str(error).split())}")
        if self.problems:
            raise ConfigError(in_lines(self.problems))
        return self

    def places_in(
        self, name: str, n_skipped: int = 0
    ) -> tuple[dict[KeyPath, str], dict[KeyPath, str]]:
        """Return the places of values and of keys in a file of this name."""
        places = {path: _place(name, at, n_skipped) for path, at in self.positions.items()}
        key_places = {path: _place(name, at, n_skipped) for path, at in self.key_positions.items()}
        return places, key_places

    def _place(self, position: Position) -> str:
        return _place(self.name, position, self._n_skipped)

    def _forbidden_character(self, index: int) -> str:
        line = self.text.count("\n", 0, index) + 1 + self._n_skipped
        column = index - self.text.rfind("\n", 0, index)
        character = ascii(self.text[index])
        return (
            f"{self.name}:{line}:{column}: the character {character} is not allowed; save the file "
            "as plain UTF-8 text"
        )

    def _documents(self) -> None:
        # event by event: the depth limit must come before the scanner's quadratic time
        self._events = yaml.parse(self.text, yaml.SafeLoader)
        n_documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                n_documents += 1
                if n_documents > 1:
                    self._add_problem(event, "a second document; only one is allowed")
                if event.version not in (None, (1, 2)):
                    self._add_problem(event, "only YAML 1.2 is supported; remove the directive")
            elif isinstance(event, yaml.NodeEvent):
                value = self._value(event, ())
                if n_documents == 1:
                    self.root = value

    def _add_problem(self, event: yaml.Event, message: str) -> None:
        self.problems.append(f"{self._place(_position(event.start_mark))}: {message}")

    def _value(self, event: Any, path: KeyPath) -> Any:
        self.positions.setdefault(path, _position(event.start_mark))
        if isinstance(event, yaml.AliasEvent):
            self._add_problem(
                event, f"the alias *{event.anchor} is not supported; write the value out"
            )
            return None
        if event.anchor:
            self._add_problem(
                event,
                f"the anchor &{event.anchor} is not supported; write the value out where it is used",
            )
        if event.tag:
            self._add_problem(event, f"the tag {event.tag} is not supported; use a plain value")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if len(path) >= _MAX_DEPTH:
            place = self._place(_position(event.start_mark))
            raise ConfigError(f"{place}: nested deeper than {_MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        return self._mapping(path)

    def _sequence(self, path: KeyPath) -> list[Any]:
        values: list[Any] = []
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            values.append(self._value(event, (*path, len(values))))
        return values

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for event in self._events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key = self._key(event, path)
            key_path = (*path, key)
            if key in values:
                first = self._place(self.key_positions[key_path])
                self._add_problem(event, f"duplicate key {key!r}; the first is at {first}")
            else:
                self.key_positions[key_path] = _position(event.start_mark)
            value = self._value(next(self._events), key_path)
            values.setdefault(key, value)
        return values

    def _key(self, event: yaml.Event, path: KeyPath) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            self._value(event, (*path, "?"))
            self._add_problem(event, "a key must be plain text")
            return "?"
        if event.anchor or event.tag:
            self._add_problem(event, "a key must not have an anchor or a tag")
        if event.value == "<<" and event.implicit[0]:
            self._add_problem(event, "the merge key << is not supported; write the keys out")
        return self._text(event)

    def _text(self, event: yaml.ScalarEvent) -> str:
        text: str = event.value
        if has_surrogate(text):
            start = f"{text[:24]!a}"
            self._add_problem(
                event, f"{start} contains half a character (a lone surrogate); write it whole"
            )
        return text

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text = self._text(event)
        is_quoted = not event.implicit[0]
        if is_quoted:
            return text
        try:
            value = _core_scalar(text)
        except ValueError:
            self._add_problem(event, f"a number with {len(text)} digits is too large")
            return 0
        if isinstance(value, int) and value.bit_length() > 64:
            self._add_problem(event, f"{text[:24]} is too large; a number has at most 64 bits")
            return 0
        if isinstance(value, float) and not math.isfinite(value):
            self._add_problem(event, f"{text} is not a finite number")
        return value


def _position(mark: Any) -> Position:
    return mark.line + 1, mark.column + 1


def _place(name: str, position: Position, n_skipped: int) -> str:
    line, column = position
    return f"{name}:{line + n_skipped}:{column}"


def _core_scalar(text: str) -> Any:
    """Return the value of an unquoted scalar in the core schema."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        bases = {"0o": 8, "0x": 16}
        return int(text, bases.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF_NAN.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes each string that `loads` would not read as the same string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {}
_RESOLVED = [
    ("merge", re.compile("<<")),
    ("null", _NULL),
    ("bool", _BOOL),
    ("int", _INT),
    ("float", _FLOAT),
    ("float", _INF_NAN),
]
for _tag, _pattern in _RESOLVED:
    _whole = re.compile(f"^(?:{_pattern.pattern})$")
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, None)


def dumps(value: dict[str, Any]) -> str:
    """Return plain values as YAML, which `loads` reads as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaf values by dotted key."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the keys, in order, whose values differ; an absent key counts as None."""
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def is_below(key: str, section: str) -> bool:
    """Return whether a dotted key is `section` itself or lies in it."""
    return f"{key}.".startswith(f"{section}.")
