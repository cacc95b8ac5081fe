"""Components by name: "adam", or a user's own "package.module:Name"; arguments checked against the signature.

Each family (`stepctl.models`, `stepctl.schedules`, ...) lists its components in a dict `NAMES`, name ->
"module:attribute", so that listing them imports none of them. A component's parameters are keyword-only; the
ones in CONTEXT come from the run and cannot be set in a config, all others are the component's arguments.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from stepctl.errors import ConfigError
from stepctl.files import expanded
from stepctl.problems import Problem, defined_at, did_you_mean, not_plain, problems_of, reason, shown, unknown_key

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1, lt=1 << 31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=1 << 62)]
PositiveStep = Annotated[int, Field(ge=1, lt=1 << 62)]


def _absolute(path: str) -> str:
    whole = os.path.abspath(expanded(path))
    if "\0" in whole or (not whole.isascii() and any("\ud800" <= letter <= "\udfff" for letter in whole)):
        raise ValueError(f"{whole!a} is no path of UTF-8 text; rename it")
    return whole


File = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]

CONTEXT = frozenset({"input_shape", "n_outputs", "input_gradient", "dtype", "targets", "seed", "shards"})
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
# What a component of each family is a subclass of, or a function that returns.
PROTOCOLS = {
    "data": "stepctl.data.base:Sources",
    "models": "stepctl.models.base:Model",
    "tasks": "stepctl.tasks.base:Task",
    "optimizers": "stepctl.optimizers.base:Optimizer",
    "schedules": "stepctl.schedules:Schedule",
}
_own: dict[str, Callable[..., Any]] = {}  # what configs of this process named "package.module:Name"
FOREIGN = (Exception, SystemExit)  # what a user's own module may raise; Ctrl-C still ends the command


@dataclass(frozen=True)
class Component:
    """Marks a parameter that is itself a component; a bare number means `{name: number, value: it}`."""

    family: str
    number: str


def names(family: str) -> dict[str, str]:
    """Return the family's own components: name -> "module:attribute"."""
    return cast(dict[str, str], importlib.import_module(f"stepctl.{family}").NAMES)


def resolve(family: str, name: str) -> Callable[..., Any]:
    """Return the component's class or function; ConfigError if there is none."""
    known = names(family)
    target = known.get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not colon:
        raise ConfigError(
            f"no {family} component is called {name!r}{did_you_mean(name, list(known))}; "
            f"allowed: {', '.join(known)}, or your own as 'package.module:Name'"
        )
    if name not in known and "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
        inspect.signature(found)
        if name not in known:
            _check_kind(family, found)
            parameters(found)
            _own[name] = found
    except FOREIGN as error:
        looked = " (looked in the current folder too)" if isinstance(error, ImportError | AttributeError) else ""
        raise ConfigError(f"cannot use {name!r}: {reason(error)}{looked}") from error
    return cast(Callable[..., Any], found)


def own_components() -> str:
    """Return "name (file:line)" of each component of the user's own that this process has resolved; or nothing."""
    return ", ".join(f"{name} ({defined_at(found) or 'of unknown origin'})" for name, found in _own.items())


def is_builtin(component: object) -> bool:
    """Tell whether a component's class is one of stepctl's own, and no user's."""
    return _is_of_stepctl(type(component).__module__)


@functools.cache
def _is_of_stepctl(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def _check_kind(family: str, found: object) -> None:
    """Raise TypeError if calling this could not give a component of the family, before it is called."""
    needed, gives = _protocol(family), found
    if inspect.isfunction(found) and family != "tasks":
        annotated = get_type_hints(found).get("return", Any)
        gives = needed if annotated is Any else get_origin(annotated) or annotated
    if not (isinstance(gives, type) and (issubclass(gives, needed) or issubclass(needed, gives))):
        raise TypeError(f"it is no {needed.__name__}; subclass {PROTOCOLS[family]}")


def _protocol(family: str) -> type:
    module_name, _, attribute = PROTOCOLS[family].partition(":")
    return cast(type, getattr(importlib.import_module(module_name), attribute))


@functools.cache
def parameters(factory: Callable[..., Any]) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Return the component's own arguments: name -> (parameter, type hint)."""
    plain_class = isinstance(factory, type) and not is_dataclass(factory)
    hints = get_type_hints(factory.__init__ if plain_class else factory, include_extras=True)
    return {
        name: (parameter, hints.get(name, Any))
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in CONTEXT and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def is_file(hint: Any) -> bool:
    """Tell whether a type hint is that of a data file's path, or of several."""
    return bool(hint == File or File in get_args(hint))


def nested(hint: Any) -> Component | None:
    """Return the Component mark of a type hint, if it has one."""
    return next((mark for mark in get_args(hint)[1:] if isinstance(mark, Component)), None)


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=STRICT)


def _validated(hint: Any, value: Any) -> Any:
    return _adapter(hint).validate_json(json.dumps(value))


def json_schema(hint: Any) -> dict[str, Any]:
    """Return the JSON Schema of one argument."""
    return _adapter(hint).json_schema()


def check(family: str, spec: Mapping[str, Any], shared: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[Problem]]:
    """Check `{name: ..., argument: ...}` against the component's signature, without building it.

    Returns the spec with every default written out, and all problems, each at its path below the spec. `shared`
    names keys that may stand in the same section, but are not the component's.
    """
    try:
        factory = resolve(family, spec["name"])
        known = parameters(factory)
    except ConfigError as error:
        return dict(spec), [Problem(("name",), str(error))]
    full: dict[str, Any] = {"name": spec["name"]}
    problems = [
        Problem((key,), unknown_key(key, [*known, *shared])) for key in spec if key != "name" and key not in known
    ]
    for name, (parameter, hint) in known.items():
        if name not in spec and parameter.default is inspect.Parameter.empty:
            problems.append(Problem((), f"{name} is missing; {spec['name']} needs it"))
            continue
        value, found = _check_value(hint, spec.get(name, parameter.default))
        full[name] = value
        problems += [Problem((name, *problem.path), problem.message) for problem in found]
    if not problems and not CONTEXT & inspect.signature(factory).parameters.keys():
        try:
            build(family, full)
        except ConfigError as error:
            problems.append(Problem((), str(error)))
        except FOREIGN as error:
            problems.append(Problem((), f"{spec['name']}: {reason(error)}"))
    return full, problems


def _check_value(hint: Any, value: Any) -> tuple[Any, list[Problem]]:
    mark = nested(hint)
    if mark is not None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            full, problems = check(mark.family, {"name": mark.number, "value": value})
            return full, [Problem(problem.path[1:], problem.message) for problem in problems]
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            return check(mark.family, value)
        known = ", ".join(names(mark.family))
        return value, [Problem((), f"{shown(value)} is wrong; give a number, or {{name: ...}} with one of {known}")]
    for kind in not_plain(value):
        return value, [Problem((), f"{value!r} is of type {kind}, which no config can hold; give it")]
    try:
        # JSON's rules are YAML's: a list may become a tuple, but "1" no number. What comes back is plain again.
        return _adapter(hint).dump_python(_validated(hint, value), mode="json"), []
    except ValidationError as error:
        return value, problems_of(error, value)


def build(family: str, spec: Mapping[str, Any], **context: Any) -> Any:
    """Build a component from a checked spec; it is handed those parts of the context that it asks for."""
    factory = resolve(family, spec["name"])
    arguments: dict[str, Any] = {}
    for name, (_, hint) in parameters(factory).items():
        mark = nested(hint)
        arguments[name] = _validated(hint, spec[name]) if mark is None else build(mark.family, spec[name])
    wanted = inspect.signature(factory).parameters
    built = factory(**arguments, **{name: value for name, value in context.items() if name in wanted})
    if not isinstance(built, _protocol(family)):
        raise ConfigError(f"{spec['name']} is no {_protocol(family).__name__}; subclass {PROTOCOLS[family]}")
    return built
