"""Parameter groups: settings of an optimizer that differ between parameters, by their paths.

A pattern is matched as in a shell: `*` stands for any text, `/` included, `?` for one character,
and `[ab]` for one of these.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, NamedTuple, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag

from stepctl.config.registry import NonNegative
from stepctl.errors import ConfigError
from stepctl.state.arena import Arena
from stepctl.system.text import did_you_mean, in_one_line

DEFAULT = "default"  # the key of the value for all parameters that no pattern matches
_MAX_PATHS = 600  # characters of the parameters' paths in a message
Value = TypeVar("Value")


def _check_patterns(values: dict[str, float]) -> dict[str, float]:
    if "" in values:
        raise ValueError("there is an empty pattern; write the path of a parameter, or a pattern")
    return values


def _check_default(values: dict[str, float]) -> dict[str, float]:
    if DEFAULT not in values:
        raise ValueError(
            "default is missing; give the weight decay of all other parameters, such as "
            "default: 0.01"
        )
    return values


def _check_listed(patterns: tuple[str, ...]) -> tuple[str, ...]:
    _check_patterns(dict.fromkeys(patterns, 0.0))
    return patterns


_ByPattern = Annotated[dict[str, NonNegative], AfterValidator(_check_patterns)]
_WithDefault = Annotated[
    _ByPattern, AfterValidator(_check_default), Field(json_schema_extra={"required": [DEFAULT]})
]
# The tags only decide by which branch a value is checked, so that a message names one type.
WeightDecay = Annotated[
    Annotated[NonNegative, Tag("number")] | Annotated[_WithDefault, Tag("patterns")],
    Discriminator(lambda value: "patterns" if isinstance(value, dict) else "number"),
]
LearningRateMultipliers = _ByPattern
Frozen = Annotated[tuple[str, ...], AfterValidator(_check_listed)]


class Setting(NamedTuple):
    """How an optimizer updates a parameter; a frozen one keeps its bits, and so do its slots."""

    weight_decay: float
    learning_rate_multiplier: float
    frozen: bool


class GroupSlice(NamedTuple):
    """A range of the arenas, whose parameters have the same setting."""

    start: int
    stop: int
    setting: Setting


def settings_by_path(
    paths: Collection[str],
    weight_decay: float | Mapping[str, float],
    learning_rate_multipliers: Mapping[str, float] | None,
    frozen: Iterable[str],
) -> dict[str, Setting]:
    """Return the setting of each parameter.

    ConfigError, which begins with the key, if a pattern matches no parameter, two patterns give one
    parameter different values, or every parameter is frozen.
    """
    if not isinstance(weight_decay, Mapping):
        weight_decay = {DEFAULT: weight_decay}
    default = weight_decay[DEFAULT]
    decays = {pattern: value for pattern, value in weight_decay.items() if pattern != DEFAULT}
    decay_of = _matched("weight_decay", paths, decays)
    multiplier_of = _matched("learning_rate_multipliers", paths, learning_rate_multipliers or {})
    is_frozen = _matched("frozen", paths, dict.fromkeys(frozen, True))
    if paths and len(is_frozen) == len(paths):
        raise ConfigError("frozen: matches every parameter, so nothing is trained; leave some out")
    return {
        path: Setting(
            decay_of.get(path, default), multiplier_of.get(path, 1.0), is_frozen.get(path, False)
        )
        for path in paths
    }


def _matched(key: str, paths: Collection[str], values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the value of each path that a pattern matches."""
    found: dict[str, Value] = {}
    pattern_of: dict[str, str] = {}
    for pattern, value in values.items():
        matching = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        if not matching:
            hint = did_you_mean(pattern, [*paths])
            known = in_one_line(", ".join(paths), _MAX_PATHS)
            raise ConfigError(f"{key}: {pattern!r} matches no parameter{hint}; there are: {known}")
        for path in matching:
            if path in found and found[path] != value:
                raise ConfigError(
                    f"{key}: {pattern_of[path]!r} and {pattern!r} both match {path}, with "
                    f"different values ({found[path]} and {value}); let one pattern match it"
                )
            found[path] = value
            pattern_of[path] = pattern
    return found


def group_slices(spans: Mapping[str, slice], settings: Mapping[str, Setting]) -> list[GroupSlice]:
    """Return the fewest slices that cover an arena, in order.

    `spans` are the slices of its arrays, in order, each with the gap after it.
    """
    found: list[GroupSlice] = []
    for path, span in spans.items():
        setting = settings[path]
        if found and found[-1].setting == setting:
            found[-1] = found[-1]._replace(stop=span.stop)
        else:
            found.append(GroupSlice(span.start, span.stop, setting))
    return found


def owned_parts(arena: Arena, groups: Iterable[GroupSlice], *, frozen: bool) -> Iterator[slice]:
    """Yield this process's part of each frozen slice, or of each that is trained."""
    owned = arena.owned_slice
    for start, stop, setting in groups:
        if setting.frozen == frozen:
            first = max(start, owned.start)
            yield slice(first, max(first, min(stop, owned.stop)))
