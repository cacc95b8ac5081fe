"""The JSON Schema of a config, for editors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stepctl import registry
from stepctl.config import FAMILIES, SEVERAL, Config


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a config, every built-in component with its arguments."""
    result = Config.model_json_schema()
    result["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for section, family in FAMILIES.items():
        shared = result["$defs"]["Data"]["properties"] if section == "data" else {}
        own = result["properties"][section]
        own.pop("$ref", None)
        own["oneOf"] = list(_component_schemas(family, shared))
        if section in SEVERAL:
            each = {"oneOf": list(_component_schemas(family, shared))}
            own["oneOf"].append({"type": "object", "additionalProperties": each})  # `name: text` is no component
    for name, own in result["properties"].items():
        if name not in result["required"] and "$ref" in own:  # such a section may be null
            section = result["$defs"][own["$ref"].rpartition("/")[2]]
            section["type"] = ["object", "null"]
    for unused in ("Data", "Named", "Components"):
        del result["$defs"][unused]
    return result


def _component_schemas(family: str, shared: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in registry.names(family):
        properties: dict[str, Any] = dict(shared) | {"name": {"const": name}}
        required = ["name"]
        for key, (parameter, hint) in registry.parameters(registry.resolve(family, name)).items():
            mark = registry.nested(hint)
            if mark is None:
                properties[key] = registry.json_schema(hint)
            else:
                number = registry.parameters(registry.resolve(mark.family, mark.number))["value"][1]
                properties[key] = {"anyOf": [registry.json_schema(number), *_component_schemas(mark.family, {})]}
            if parameter.default is parameter.empty:
                required.append(key)
            else:
                properties[key] = {**properties[key], "default": parameter.default}
        yield {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    yield {"type": "object", "properties": {"name": {"type": "string", "pattern": ":"}}, "required": ["name"]}
