"""The JSON Schema of a config, for editors: every key of every section and built-in component."""

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

from stepctl.config import model, registry
from stepctl.config.model import (
    COMPONENT_SECTIONS,
    KEYS,
    PER_MODEL,
    DataConfig,
    ProgramConfig,
    TaskConfig,
)
from stepctl.config.registry import Argument, described_arguments

Schema = dict[str, Any]
_TASK_SECTIONS = ("data", "model", "task", "optimizer")


def schema() -> Schema:
    """Return the JSON Schema of a config."""
    result = _merged()
    definitions = result["$defs"]
    for unused in ("DataConfig", "ComponentConfig", "ComponentsConfig", "StopConfig"):
        del definitions[unused]
    for name, definition in definitions.items():
        _describe(definition, getattr(model, name))
    for section in COMPONENT_SECTIONS:
        own = result["properties"][section]
        own.pop("$ref", None)
        own["oneOf"] = list(_components(section))
        if section in PER_MODEL:
            by_model = {"oneOf": list(_components(section))}
            # no key `name`, whose text is not a component
            own["oneOf"].append({"type": "object", "additionalProperties": by_model})
    hooks = result["properties"]["hooks"]
    hooks["anyOf"] = [
        {"type": hooks.pop("type"), "items": next(_components("hook"))},
        {"type": "null"},
    ]
    del hooks["items"]
    required = {*result["required"], *_TASK_SECTIONS, "program"}
    for name, own in result["properties"].items():
        if name not in required and "$ref" in own:  # null means the defaults
            definition = definitions[own["$ref"].rpartition("/")[2]]
            definition["type"] = ["object", "null"]
    return result


def keys(schema: Schema) -> list[str]:
    """Return every dotted key of a config: those of the sections and of the built-in components."""
    return [*dict.fromkeys(_keys(schema, "", schema["$defs"]))]


def _keys(node: Schema, prefix: str, definitions: Schema) -> Iterator[str]:
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]]
    for alternative in (*node.get("oneOf", ()), *node.get("anyOf", ())):
        yield from _keys(alternative, prefix, definitions)
    for key, own in node.get("properties", {}).items():
        yield f"{prefix}{key}"
        yield from _keys(own, f"{prefix}{key}.", definitions)


def _merged() -> Schema:
    """Return the schema of all top-level keys: a config has either the sections of a task or `program`."""
    result = TaskConfig.model_json_schema()
    _describe(result, TaskConfig)
    of_program = ProgramConfig.model_json_schema()
    _describe(of_program, ProgramConfig)
    result["$defs"] |= of_program["$defs"]
    properties = result["properties"] | of_program["properties"]
    result |= {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Config",
        "description": _summary(model),
        "properties": {key: properties[key] for key in KEYS if key in properties},
        "required": ["stop"],
        "oneOf": [{"required": [*_TASK_SECTIONS]}, {"required": ["program"]}],
    }
    return result


def _describe(definition: Schema, documented: type[BaseModel]) -> None:
    """Add the descriptions of a section's docstring to its schema."""
    definition["description"] = _summary(documented)
    _describe_properties(definition["properties"], documented)


def _describe_properties(properties: Schema, documented: type | Callable[..., Any]) -> None:
    descriptions = described_arguments(documented)
    for key, own in properties.items():
        if key in descriptions:  # docstrings are absent under python -OO
            own["description"] = descriptions[key]


def _summary(documented: object) -> str:
    return (documented.__doc__ or "").partition("\n")[0]


def _components(family: str) -> Iterator[Schema]:
    """Yield the schema of each built-in component of a family, then one for a user's own."""
    for name in registry.names(family):
        factory = registry.resolve(family, name)
        properties: Schema = {"name": {"const": name, "description": _summary(factory)}}
        if family == "data":  # the properties that every source has
            definition = DataConfig.model_json_schema()
            _describe(definition, DataConfig)
            properties = definition["properties"] | properties
        properties |= _argument_properties(factory)
        required = [key for key, own in registry.arguments(factory).items() if own.required]
        yield {
            "type": "object",
            "properties": properties,
            "required": ["name", *required],
            "additionalProperties": False,
        }
    users_name = {
        "type": "string",
        "pattern": ":",
        "description": described_arguments(model.ComponentConfig).get("name", ""),
    }
    yield {"type": "object", "properties": {"name": users_name}, "required": ["name"]}


def _argument_properties(factory: Callable[..., Any]) -> Schema:
    properties = {}
    for key, argument in registry.arguments(factory).items():
        properties[key] = _argument_schema(argument)
        if not argument.required:
            properties[key]["default"] = argument.default
    _describe_properties(properties, factory)
    return properties


def _argument_schema(argument: Argument) -> Schema:
    if argument.component is None:
        return registry.json_schema(argument.hint)
    mark = argument.component
    # a bare number is short for {name: number, value: it}
    value = registry.arguments(registry.resolve(mark.family, mark.number))["value"]
    return {"anyOf": [registry.json_schema(value.hint), *_components(mark.family)]}
