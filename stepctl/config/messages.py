"""Messages about a config: one line for each place that has a problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from stepctl.system.text import config_text, did_you_mean

if TYPE_CHECKING:
    from pydantic import ValidationError

KeyPath = tuple[str | int, ...]
# names that other tools use for a key
_SYNONYMS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "batchsize": "batch_size",
    "steps": "num_steps",
    "max_steps": "last_step",
    "wd": "weight_decay",
}
_EPOCH_KEYS = ("epoch", "epochs", "num_epochs", "n_epochs", "max_epochs")
# pydantic's error types -> the requirement; other errors have a clear text of their own
_REQUIREMENTS = {
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "string_type": "should be text",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
}


class ConfigProblem(NamedTuple):
    """One problem at a path of keys."""

    path: KeyPath
    message: str

    def below(self, *keys: str | int) -> ConfigProblem:
        """Return the problem with its path below `keys`."""
        return ConfigProblem((*keys, *self.path), self.message)


def unknown_key(key: str, known: list[str]) -> str:
    """Return the message for a key that is not among the known ones."""
    synonym = _SYNONYMS.get(key.lower())
    if key.lower() in _EPOCH_KEYS:
        hint = " (set the number of steps instead: stop.num_steps or stop.last_step)"
    elif synonym in known:
        hint = f" (did you mean {synonym!r}?)"
    else:
        hint = did_you_mean(key, known)
    return f"unknown key{hint}; allowed: {', '.join(known) or 'none'}"


def problems_of(error: ValidationError, value: Any) -> list[ConfigProblem]:
    """Convert pydantic's report on `value`: one problem for each place and each missing key."""
    requirements: dict[KeyPath, list[str]] = {}  # several where the type is a union
    problems = []
    for item in error.errors():
        path, _ = _locate(item["loc"], value)
        if item["type"] == "missing":
            problems.append(ConfigProblem(path, f"{item['loc'][-1]} is missing"))
        elif item["type"] == "value_error":
            problems.append(ConfigProblem(path, item["msg"].removeprefix("Value error, ")))
        else:
            found = requirements.setdefault(path, [])
            if _requirement(item) not in found:
                found.append(_requirement(item))
    for path, found in requirements.items():
        _, wrong_value = _locate(path, value)
        alternatives = [found[0], *(text.removeprefix("should be ") for text in found[1:])]
        message = f"{' or '.join(alternatives)}, got {config_text(wrong_value)}"
        problems.append(ConfigProblem(path, message))
    return problems


def _locate(location: KeyPath, value: Any) -> tuple[KeyPath, Any]:
    """Return the part of pydantic's location that is in `value`, and the value there.

    The other keys of a location name the branches of unions.
    """
    path: KeyPath = ()
    for key in location:
        is_key = isinstance(value, Mapping) and key in value
        is_index = isinstance(value, list) and key in range(len(value))
        if is_key or is_index:
            path = (*path, key)
            value = value[key]
    return path, value


def _requirement(item: Mapping[str, Any]) -> str:
    text: str = _REQUIREMENTS.get(item["type"], item["msg"].removeprefix("Input "))
    return text[:1].lower() + text[1:]


def non_yaml_types(value: Any) -> Iterator[str]:
    """Yield the names of the types in `value` that a YAML file cannot hold."""
    if isinstance(value, dict):
        for item in value.values():
            yield from non_yaml_types(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from non_yaml_types(item)
    elif value is not None and type(value) not in (bool, int, float, str):
        yield type(value).__name__
