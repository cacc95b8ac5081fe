"""The section "Keys" of configs/README.md, written from the JSON Schema of a config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepctl.config.json_schema import schema
from stepctl.config.model import COMPONENT_SECTIONS

Schema = dict[str, Any]

PAGE = Path(__file__).parents[2] / "configs" / "README.md"
START = "<!-- generated from the JSON Schema: UPDATE_PAGES=1 pytest tests/config/test_json_schema.py -->\n"
END = "<!-- end of the generated part -->\n"
_HIDDEN_LIMITS = (1 << 31, 1 << 62, 1 << 63)  # that only keep a number in its machine type
_TITLES = {
    "data": "data source",
    "model": "model",
    "task": "task",
    "optimizer": "optimizer",
    "learning_rate": "schedule",
}


def updated(page: str) -> str:
    """Return the page with its generated part written again."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    keys = "\n".join(_lines())
    return f"{before}{START}\n{keys}\n\n{END}{after}"


def _lines() -> Iterator[str]:
    whole = schema()
    properties = whole["properties"]
    yield "| key | resume | type | default | description |"
    yield "|---|---|---|---|---|"
    required = {*whole["required"]}
    for alternative in whole["oneOf"]:
        required |= {*alternative["required"]}
    for key, own in properties.items():
        kind = _kind(own)
        default = _default(own, key in required)
        yield f"| `{key}` | {own['resume']} | {kind} | {default} | {own['description']} |"
    for key, own in properties.items():
        section = _section(whole, own)
        if section is not None:
            yield f"\n### {key} ({own['resume']})\n"
            yield f"{section['description']}\n"
            yield from _table(section, prefix=f"{key}.")
            yield from _subsections(whole, section, f"{key}.")
    for key in COMPONENT_SECTIONS:
        own = properties[key]
        yield f"\n### {key} ({own['resume']})\n"
        yield f"{own['description']}"
        yield from _family(key, _components(own["oneOf"]))
        if key == "optimizer":
            yield "\n### learning_rate (locked)\n"
            yield "A number, or a schedule: a function of the step N before the update."
            rate = _components(own["oneOf"])[0]["properties"]["learning_rate"]
            yield from _family("learning_rate", _components(rate["anyOf"]))


def _components(branches: list[Schema]) -> list[Schema]:
    """Return the schemas of built-in components."""
    return [each for each in branches if "const" in each.get("properties", {}).get("name", {})]


def _family(key: str, components: list[Schema]) -> Iterator[str]:
    """Yield the arguments that all components share, then those of each."""
    if not components:  # every program is a user's own
        return
    first = components[0]["properties"]
    shared = {
        name: own
        for name, own in first.items()
        if name != "name" and all(name in each["properties"] for each in components)
    }
    if shared:
        yield f"\nKeys of every {_TITLES[key]}:\n"
        yield from _table({"properties": shared, "required": components[0]["required"]})
    for component in components:
        properties = dict(component["properties"])
        name = properties.pop("name")
        own = {name: each for name, each in properties.items() if shared.get(name) != each}
        yield f"\n`{name['const']}`: {name['description']}"
        if own:
            yield ""
            yield from _table({"properties": own, "required": component["required"]})


def _table(section: Schema, prefix: str = "") -> Iterator[str]:
    yield "| key | type | default | description |"
    yield "|---|---|---|---|"
    for key, own in section["properties"].items():
        default = _default(own, key in section.get("required", ()))
        yield f"| `{prefix}{key}` | {_kind(own)} | {default} | {own['description']} |"


def _subsections(whole: Schema, section: Schema, prefix: str) -> Iterator[str]:
    for key, own in section["properties"].items():
        below = _section(whole, own)
        if below is not None:
            yield f"\n`{prefix}{key}`: {below['description']}\n"
            yield from _table(below, prefix=f"{prefix}{key}.")


def _section(whole: Schema, own: Schema) -> Schema | None:
    """Return the definition that a property refers to, if it is a section."""
    for branch in (own, *own.get("anyOf", ())):
        if "$ref" in branch:
            found: Schema = whole["$defs"][branch["$ref"].rpartition("/")[2]]
            return found
    return None


def _default(own: Schema, required: bool) -> str:
    if required:
        return "required"
    if "default" not in own:
        return "defaults"
    default = own["default"]
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _kind(own: Schema) -> str:
    branches = own.get("anyOf", [])
    if "resume" not in own:  # no section of components
        branches = branches or own.get("oneOf", [])
    if branches:
        if _components(branches):
            return f"{_kind(branches[0])} or {{name: ...}}"
        return " or ".join(dict.fromkeys(_kind(branch) for branch in branches))
    if "$ref" in own or ("resume" in own and "type" not in own):
        return "mapping"
    if "enum" in own:
        return ", ".join(f"`{value}`" for value in own["enum"])
    if "const" in own:
        return f"`{own['const']}`"
    if own["type"] == "object":
        return f"mapping to {_kind(own['additionalProperties'])}"
    if own["type"] == "array" and own["items"].get("type") == "object":
        return "list of mappings"
    if own["type"] == "array":
        return f"list of {_kind(own['items'])}"
    return f"{own['type']}{_bounds(own)}"


def _bounds(own: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [
        f"{sign} {own[name]:g}"
        for name, sign in signs.items()
        if name in own and own[name] not in _HIDDEN_LIMITS
    ]
    return f" {', '.join(found)}" if found else ""
