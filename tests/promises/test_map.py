"""stepctl/README.md, the map of the code: what it names exists, and it names every folder."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "stepctl"
PAGE = (PACKAGE / "README.md").read_text()
SYMBOLS = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE)))
PATHS = sorted(set(re.findall(r"`([\w/]+/(?:\w+\.py)?|\w+\.py)`", PAGE)))


def section(heading: str) -> str:
    """Return the text below a heading, up to the next one."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found is not None, heading
    return found[1]


def defined(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """Return name -> body of what some statements define; the body of a variable is empty."""
    names: dict[str, list[ast.stmt]] = {}
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names[statement.name] = statement.body
        elif isinstance(statement, ast.Assign):
            names |= {target.id: [] for target in statement.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize(("file", "symbol"), SYMBOLS)
def test_the_names_in_the_map_are_defined_in_their_files(file: str, symbol: str) -> None:
    body = ast.parse((PACKAGE / file).read_text()).body
    for name in symbol.split("."):
        names = defined(body)
        assert name in names
        body = names[name]


@pytest.mark.parametrize("path", PATHS)
def test_files_and_folders_of_the_map_exist(path: str) -> None:
    assert (PACKAGE / path).exists() or (PACKAGE.parent / path).exists()


def test_the_folders_are_in_import_order() -> None:
    contract = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    (layers,) = (each["layers"] for each in contract["tool"]["importlinter"]["contracts"])
    shown = re.findall(r"^(\w+)(?:/|\.py) ", section("Folders, in import order"), re.M)
    assert shown == layers
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(shown)


@pytest.mark.parametrize("heading", re.findall(r"^## (The path of .*)$", PAGE, re.M))
def test_a_path_has_five_to_ten_hops(heading: str) -> None:
    hops = re.findall(r"^(\d+)\. ", section(heading), re.M)
    assert hops == [str(number) for number in range(1, len(hops) + 1)]
    assert 5 <= len(hops) <= 10


def test_the_map_is_one_page() -> None:
    assert len(PAGE.splitlines()) <= 150
    assert len(re.findall(r"^\| ", section("Glossary"), re.M)) - 1 <= 20
    assert len(SYMBOLS) > 50
