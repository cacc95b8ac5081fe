"""The table of breaks in tests/README.md is current: its lines and tests exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.breaks import BREAKS, ROOT, Break, table

PAGE = Path(__file__).parents[1] / "README.md"


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text()
    assert len(BREAKS) == 31


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.effect)
def test_the_line_and_its_test_exist(broken: Break) -> None:
    text = (ROOT / "stepctl" / broken.file).read_text()
    assert text.count(broken.line) == 1
    file, _, test = broken.test.partition("::")
    assert re.search(rf"^def {test}", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_every_file_that_the_page_names_exists() -> None:
    folders = [PAGE.parent, PAGE.parent / "faults"]
    for name in re.findall(r"`([\w/]+\.py)`", PAGE.read_text().partition("## Breaks")[0]):
        assert any((folder / name).is_file() for folder in folders), name
