"""Components by name: "adam", or a user's own class or function as "package.module:Name".

Each family (data, model, task, program, hook, optimizer, schedule) has a module with a dict `NAMES`,
name -> "module:attribute", so that listing its components imports none of them. A component's parameters
are keyword-only. The ones in CONTEXT are passed by the run and cannot be set in a config; all
others are the component's arguments.
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
from typing import Annotated, Any, NamedTuple, cast, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

import stepctl
from stepctl.config.messages import ConfigProblem, non_yaml_types, problems_of, unknown_key
from stepctl.errors import ConfigError
from stepctl.system import optional
from stepctl.system.files import expand_path
from stepctl.system.text import a_or_an, config_text, did_you_mean, has_surrogate
from stepctl.system.user_code import defined_at, describe_error

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1, lt=1 << 31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=1 << 62)]
PositiveStep = Annotated[int, Field(ge=1, lt=1 << 62)]


def _absolute(path: str) -> str:
    absolute = os.path.abspath(expand_path(path))
    if "\0" in absolute or has_surrogate(absolute):
        raise ValueError(f"the path {absolute!a} is not valid UTF-8 text; rename the file")
    return absolute


File = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]

CONTEXT = frozenset(
    {
        "input_shape",
        "n_outputs",
        "input_gradient",
        "dtype",
        "targets",
        "integer_inputs",
        "class_names",
        "needs_targets",
        "seed",
        "shards",
    }
)
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
USER_CODE_ERRORS = (Exception, SystemExit)  # but not KeyboardInterrupt, which ends the command


class Family(NamedTuple):
    """A kind of component: the module with its NAMES, and the base class ("module:class")."""

    module: str
    base_class: str


FAMILIES = {
    "data": Family("stepctl.data", "stepctl.data.base:Sources"),
    "model": Family("stepctl.models", "stepctl.models.base:Model"),
    "task": Family("stepctl.programs", "stepctl.programs.base:Task"),
    "program": Family("stepctl.programs.program", "stepctl.programs.program:Program"),
    "hook": Family("stepctl.hooks", "stepctl.hooks.base:Hook"),
    "optimizer": Family("stepctl.optimizers", "stepctl.optimizers.base:Optimizer"),
    "schedule": Family("stepctl.optimizers.schedules", "stepctl.optimizers.schedules:Schedule"),
}
_BUILT_ONCE = ("program", "hook")  # which may acquire resources, so a check does not build them
_user_components: dict[str, Callable[..., Any]] = {}  # resolved in this process, by name


@dataclass(frozen=True)
class Component:
    """Marks a parameter that is a component; a bare number means {name: number, value: it}."""

    family: str
    number: str


class _Decided:
    """See DECIDED."""


# Marks an argument that a run decides if the config leaves it null. A resume keeps the value.
DECIDED = _Decided()


def _contains_file(hint: Any) -> bool:
    return bool(hint == File) or any(_contains_file(part) for part in get_args(hint))


class Argument(NamedTuple):
    """An argument of a component that a config can set."""

    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty

    @property
    def is_file(self) -> bool:
        """Whether the value is the path of a data file, or a list of such paths."""
        return _contains_file(self.hint)

    @property
    def is_decided(self) -> bool:
        """Whether the run decides the value if it is null."""
        return DECIDED in get_args(self.hint)[1:]

    @property
    def component(self) -> Component | None:
        """The Component mark, if the value is itself a component."""
        return next((mark for mark in get_args(self.hint)[1:] if isinstance(mark, Component)), None)


# --- look-up


def names(family: str) -> dict[str, str]:
    """Return the family's built-in components: name -> "module:attribute"."""
    return cast(dict[str, str], importlib.import_module(FAMILIES[family].module).NAMES)


def resolve(family: str, name: str) -> Callable[..., Any]:
    """Import and return a component's class or function; ConfigError if there is none."""
    known = names(family)
    target = known.get(name, name)
    if ":" not in target:
        allowed = "your own as 'package.module:Name'"
        if known:
            allowed = f"{', '.join(known)}, or {allowed}"
        raise ConfigError(
            f"unknown {family} {name!r}{did_you_mean(name, list(known))}; allowed: {allowed}"
        )
    if name not in known and "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory = _import(target)
        inspect.signature(factory)
        if name not in known:
            _check_kind(family, factory)
            arguments(factory)
            _refuse_reserved_arguments(family, factory)
            _user_components[name] = factory
    except USER_CODE_ERRORS as error:
        hint = optional.remedy(error)
        if not hint and isinstance(error, ImportError | AttributeError):
            hint = " (looked in the current folder too)"
        raise ConfigError(f"cannot use {name!r}: {describe_error(error)}{hint}") from error
    return cast(Callable[..., Any], factory)


def _import(target: str) -> Any:
    """Import "module:attribute"."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def has_user_components() -> bool:
    """Tell whether this process resolved components of the user."""
    return bool(_user_components)


def user_components() -> str:
    """Return "name (file:line), ..." of the user's components that this process resolved."""
    return ", ".join(
        f"{name} ({defined_at(factory) or 'of unknown origin'})"
        for name, factory in _user_components.items()
    )


def is_builtin(component: object) -> bool:
    """Return whether a component's class is defined in stepctl."""
    return _is_in_stepctl(type(component).__module__)


@functools.cache
def _is_in_stepctl(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def overrides(family: str, name: str, method: str) -> bool:
    """Tell whether a component has a method of its own; true if that cannot be told."""
    try:
        factory = resolve(family, name)
    except ConfigError:
        return True
    base_class = _import(FAMILIES[family].base_class)
    built = built_class(factory)
    if built in (Any, base_class):  # a function that does not say which class it returns
        return True
    return getattr(built, method, None) is not getattr(base_class, method)


def _check_kind(family: str, factory: object) -> None:
    """Raise TypeError if a call of `factory` cannot return a component of the family."""
    base_class = _import(FAMILIES[family].base_class)
    returned: object = factory
    if family != "task":
        returned = built_class(factory)
        if returned is Any:
            returned = base_class
    is_related = isinstance(returned, type) and (
        issubclass(returned, base_class) or issubclass(base_class, returned)
    )
    if not is_related:
        raise TypeError(f"it is {_not_a(base_class)}")


def built_class(factory: object) -> object:
    """Return the class of the components that a class or function builds; Any if it is unknown."""
    if not inspect.isfunction(factory):
        return factory
    annotation = get_type_hints(factory).get("return", Any)
    return get_origin(annotation) or annotation


def _refuse_reserved_arguments(family: str, factory: Callable[..., Any]) -> None:
    """Raise TypeError if an argument has the name of a key or value that is not the user's."""
    names = [*inspect.signature(factory).parameters]
    if family == "hook" and "name" in names:  # others have always received the import path
        raise TypeError("its argument 'name' has the key of the import path; rename it")
    if family not in _BUILT_ONCE:
        return
    reserved = [name for name in names if name in CONTEXT and name != "seed"]
    if reserved:
        raise TypeError(
            f"its argument {reserved[0]!r} has a name that the run passes to models and tasks; "
            "rename it"
        )


@functools.cache
def arguments(factory: Callable[..., Any]) -> dict[str, Argument]:
    """Return the arguments of a component that a config can set, by name."""
    is_plain_class = isinstance(factory, type) and not is_dataclass(factory)
    hints = get_type_hints(factory.__init__ if is_plain_class else factory, include_extras=True)
    return {
        name: Argument(hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in CONTEXT and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


# --- checking and building


def check(
    family: str, spec: Mapping[str, Any], shared: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[ConfigProblem]]:
    """Check `{name: ..., argument: ...}` against the component's signature.

    Returns the spec with all defaults filled in, and the problems, each with its path below the
    spec. `shared` names further keys that are allowed in the same section.
    """
    name = spec["name"]
    try:
        factory = resolve(family, name)
        known = arguments(factory)
    except ConfigError as error:
        return dict(spec), [ConfigProblem(("name",), str(error))]
    full: dict[str, Any] = {"name": name}
    problems = [
        ConfigProblem((key,), unknown_key(key, [*known, *shared]))
        for key in spec
        if key != "name" and key not in known
    ]
    for key, argument in known.items():
        if key not in spec and argument.required:
            problems.append(ConfigProblem((), f"{key} is missing; {name} needs it"))
            continue
        full[key], found = _check_value(argument, spec.get(key, argument.default))
        problems += [problem.below(key) for problem in found]
    is_in_context = bool(CONTEXT & inspect.signature(factory).parameters.keys())
    if not problems and not is_in_context and family not in _BUILT_ONCE:
        problems += _try_build(family, full)
    return full, problems


def _try_build(family: str, spec: Mapping[str, Any]) -> list[ConfigProblem]:
    try:
        build(family, spec)
    except ConfigError as error:
        return [ConfigProblem((), str(error))]
    except USER_CODE_ERRORS as error:
        return [ConfigProblem((), f"{spec['name']}: {describe_error(error)}")]
    return []


def _check_value(argument: Argument, value: Any) -> tuple[Any, list[ConfigProblem]]:
    """Return a value as it is written to YAML, and the problems with it."""
    if argument.component is not None:
        return _check_component(argument.component, value)
    for type_name in non_yaml_types(value):
        message = f"the default {value!r} has type {type_name}, which YAML cannot hold; set a value"
        return value, [ConfigProblem((), message)]
    try:
        validated = _validate(argument.hint, value)
    except ValidationError as error:
        return value, problems_of(error, value)
    return _adapter(argument.hint).dump_python(validated, mode="json"), []


def _check_component(mark: Component, value: Any) -> tuple[Any, list[ConfigProblem]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        full, problems = check(mark.family, {"name": mark.number, "value": value})
        return full, [ConfigProblem(problem.path[1:], problem.message) for problem in problems]
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return check(mark.family, value)
    known = ", ".join(names(mark.family))
    expected = f"a number or {{name: ...}} with one of {known}"
    message = f"should be {expected}, got {config_text(value)}"
    return value, [ConfigProblem((), message)]


def build(family: str, spec: Mapping[str, Any], **context: Any) -> Any:
    """Build a component from a checked spec, and from the values of the context that it accepts."""
    factory = resolve(family, spec["name"])
    values: dict[str, Any] = {}
    for name, argument in arguments(factory).items():
        mark = argument.component
        if mark is None:
            values[name] = _validate(argument.hint, spec[name])
        else:
            values[name] = build(mark.family, spec[name])
    parameters = inspect.signature(factory).parameters
    values |= {name: value for name, value in context.items() if name in parameters}
    component = factory(**values)
    base_class = _import(FAMILIES[family].base_class)
    if not isinstance(component, base_class):
        raise ConfigError(f"{spec['name']} is {_not_a(base_class)}")
    return component


def _not_a(base_class: type) -> str:
    name = base_class.__name__
    module = "stepctl" if name in stepctl.__all__ else base_class.__module__
    return f"not {a_or_an(name)}; subclass {module}.{name}"


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=STRICT)


def _validate(hint: Any, value: Any) -> Any:
    # JSON has the rules of YAML: a list may become a tuple, but "1" is no number
    return _adapter(hint).validate_json(json.dumps(value))


# --- description


def json_schema(hint: Any) -> dict[str, Any]:
    """Return the JSON Schema of an argument's type."""
    return _adapter(hint).json_schema()


def described_arguments(documented: type | Callable[..., Any]) -> dict[str, str]:
    """Return the descriptions in the "Args:" blocks of a function, or of a class and its bases."""
    classes = reversed(documented.__mro__) if isinstance(documented, type) else [documented]
    descriptions: dict[str, str] = {}
    for owner in classes:
        descriptions |= _args_block(owner.__doc__ or "")
    return descriptions


def _args_block(docstring: str) -> dict[str, str]:
    """Parse "name: text" lines below "Args:"; a deeper indented line continues the text."""
    _, _, block = inspect.cleandoc(docstring).partition("Args:\n")
    descriptions: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        if not line.startswith("    "):
            break
        if line.startswith("     "):
            descriptions[name] += f" {line.strip()}"
        else:
            name, _, text = line.strip().partition(": ")
            descriptions[name] = text
    return descriptions
