"""The JSON Schema describes every key, and configs/README.md shows what the schema has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import stepctl.config.keys
from stepctl.config import model, registry
from stepctl.config.json_schema import keys, schema
from stepctl.config.registry import described_arguments
from tests.support.config_page import PAGE, updated

COMPONENTS = [(family, name) for family in registry.FAMILIES for name in registry.names(family)]
SECTIONS = [
    found
    for found in vars(model).values()
    if isinstance(found, type) and issubclass(found, model.Section)
]


def properties(within: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and the schema of every property."""
    if isinstance(within, list):
        for number, item in enumerate(within):
            yield from properties(item, f"{path}[{number}]")
    if isinstance(within, dict):
        for key, own in within.get("properties", {}).items():
            yield f"{path}.{key}", own
        for key, item in within.items():
            yield from properties(item, f"{path}.{key}")


def test_every_property_has_a_description() -> None:
    every = dict(properties(schema()))
    assert len(every) > 500
    assert [
        path for path, own in every.items() if not own.get("description", "").endswith((".", ")"))
    ] == []


@pytest.mark.parametrize(("family", "name"), COMPONENTS)
def test_a_docstring_describes_no_argument_that_the_component_lacks(family: str, name: str) -> None:
    factory = registry.resolve(family, name)
    assert described_arguments(factory).keys() == registry.arguments(factory).keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_docstring_describes_no_key_that_the_section_lacks(section: type[model.Section]) -> None:
    assert described_arguments(section).keys() <= section.model_fields.keys()


def test_a_description_may_have_several_lines() -> None:
    def component() -> None:
        """A component.

        Args:
            a: First line
                and second line: with a colon.
            b: Another.

        Text that is not part of the block: b is not described twice.
        """

    assert described_arguments(component) == {
        "a": "First line and second line: with a colon.",
        "b": "Another.",
    }


def test_the_page_has_every_key() -> None:
    """Update the page with `UPDATE_PAGES=1 pytest tests/config/test_json_schema.py`."""
    page = PAGE.read_text()
    if os.environ.get("UPDATE_PAGES"):
        PAGE.write_text(updated(page))
    assert page == updated(page), "configs/README.md is out of date"


KEYS_HEAD = """\"\"\"Every key of a config, for commands that cannot wait for the schema.

Generated from the schema: UPDATE_PAGES=1 pytest tests/config/test_json_schema.py
\"\"\"
"""


def tuple_text(name: str, keys: Iterable[str], comment: str = "") -> str:
    lines = [f'    "{key}",\n' for key in keys]
    return f"\n{comment}{name} = (\n{''.join(lines)})\n"


def decided_keys() -> list[str]:
    """Return the keys that a run decides from the data, of the section and of every data source."""
    arguments = [
        name
        for source in registry.names("data")
        for name, argument in registry.arguments(registry.resolve("data", source)).items()
        if argument.is_decided
    ]
    return [f"data.{name}" for name in dict.fromkeys([*model.DECIDED_DATA_KEYS, *arguments])]


def test_the_keys_in_the_module_are_those_of_the_schema() -> None:
    """Update the module with `UPDATE_PAGES=1 pytest tests/config/test_json_schema.py`."""
    path = Path(stepctl.config.keys.__file__)
    expected = KEYS_HEAD + tuple_text("CONFIG_KEYS", keys(schema()))
    expected += tuple_text(
        "DECIDED_KEYS", decided_keys(), "# null in most configs: the data decide\n"
    )
    if os.environ.get("UPDATE_PAGES"):
        path.write_text(expected)
    assert path.read_text() == expected, "stepctl/config/keys.py is out of date"
