"""What is wrong with a CSV file is said with its line in the file, and with a remedy that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.arena import Array
from stepctl.data.base import Source
from stepctl.data.csv import csv
from stepctl.errors import DataError

ROWS = "1,2,0\n3,4,1\n5,6,0\n"
HEADER_HINT = "set data.header: true"


def load(tmp_path: Path, content: str | bytes, **options: Any) -> Source:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return csv(path=str(path), targets="classes", dtype="float64", **options).train


def values(source: Source) -> tuple[Array, Array]:
    ((_, x, y),) = source.slices()
    return x, y


def refusal(tmp_path: Path, content: str | bytes, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(tmp_path, content, **options)
    return str(caught.value).removeprefix(f"{tmp_path / 'a.csv'}: cannot be read as CSV: ")


@pytest.mark.parametrize(
    ("content", "options", "line"),
    [
        (ROWS + "7,x,1\n", {}, 4),
        ("a,b,c\n" + ROWS + "7,x,1\n", {"header": True}, 5),
        ("1,2,0\n\n\n3,x,1\n", {}, 4),
        ('"a\nb",b,c\n1,2,0\n3,x,1\n', {"header": True}, 4),
        ('1,"2\n",0\n3,x,1\n', {}, 3),
        ("1,2,0\r\n3,x,1\r\n", {}, 2),
        ("1,2,0\r3,x,1\r", {}, 2),
    ],
    ids=["plain", "header", "blank lines", "newline in the header", "newline in a row", "CRLF", "CR"],
)
def test_a_value_that_is_no_number_is_found_by_its_line_in_the_file(
    content: str, options: dict[str, Any], line: int, tmp_path: Path
) -> None:
    assert refusal(tmp_path, content, **options) == f"line {line}: column 2: 'x' is not a number"


def test_a_row_of_another_length_is_found_by_its_line_in_the_file(tmp_path: Path) -> None:
    message = refusal(tmp_path, "a,b,c\n" + ROWS + "\n7,8\n", header=True)
    assert message == "line 6: 2 columns, but 3 in the rows before"


def test_only_a_first_line_of_names_is_taken_for_a_header(tmp_path: Path) -> None:
    assert refusal(tmp_path, "a,b,label\n" + ROWS).endswith(f"; if the first line holds names, {HEADER_HINT}")
    for content in ("1,?,0\n" + ROWS, "1,,0\n" + ROWS, ROWS + "a,b,c\n"):
        assert HEADER_HINT not in refusal(tmp_path, content)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("header", [True, False])
def test_every_end_of_a_line_is_read(end: str, header: bool, tmp_path: Path) -> None:
    content = ("a,b,c\n" * header + ROWS).replace("\n", end)
    x, y = values(load(tmp_path, content, header=header))
    assert x.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert y.tolist() == [0, 1, 0]


def test_a_header_with_quotes_and_newlines_is_read(tmp_path: Path) -> None:
    content = '\ufeff"width\n(cm)","a, b",label\n' + ROWS
    x, y = values(
        load(tmp_path, content, header=True, target="width\n(cm)"),
    )
    assert x.tolist() == [[2, 0], [4, 1], [6, 0]]
    assert y.tolist() == [1, 3, 5]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_a_remedy(encoding: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, ROWS.encode(encoding))
    assert message == "it is not UTF-8, but looks like UTF-16; convert it with: iconv -f UTF-16 -t UTF-8"


def test_latin_1_is_named_with_its_line_and_a_remedy(tmp_path: Path) -> None:
    message = refusal(tmp_path, "a,größe,c\n".encode("latin-1") + ROWS.encode(), header=True)
    assert message.startswith("line 1: it is not UTF-8 (byte 0xf6); if it is Latin-1, convert it with: iconv -f LATIN1")


def test_a_column_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "label,b, label\n" + ROWS, header=True, target="label")
    assert message.startswith("its header names 'label' more than once; rename one")


@pytest.mark.parametrize(("found", "spelled"), [(";", ";"), ("\t", "\\t"), ("|", "|")])
@pytest.mark.parametrize("header", ["", "a,b,c\n"])
def test_another_delimiter_is_suggested(found: str, spelled: str, header: str, tmp_path: Path) -> None:
    content = (header + ROWS).replace(",", found)
    message = refusal(tmp_path, content, header=bool(header))
    assert message.endswith(f'set data.delimiter: "{spelled}"')
    assert HEADER_HINT not in message
    np.testing.assert_array_equal(values(load(tmp_path, content, header=bool(header), delimiter=found))[1], [0, 1, 0])


def test_a_header_of_another_length_than_the_rows_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "a,b\n" + ROWS, header=True)
    assert message == "its header names 2 columns, but its rows have 3"


@pytest.mark.parametrize(("content", "header"), [("", False), ("\n\n", False), ("a,b\n", True), ("a,b\r", True)])
def test_a_file_without_rows_is_called_so(content: str, header: bool, tmp_path: Path) -> None:
    assert refusal(tmp_path, content, header=header) == "it holds no rows"


def test_a_bad_label_or_number_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    text = "a,y\n1,0\n\n2,1\n3,-1\n"
    path.write_text(text)
    with pytest.raises(DataError, match=r"a\.csv: line 5: label -1\.0 is not one of 0, 1, 2"):
        csv(path=str(path), header=True, targets="classes", dtype="float32")
    path.write_text(text.replace("3,-1", "inf,1"))
    source = csv(path=str(path), header=True, targets="classes", dtype="float32").train
    with pytest.raises(DataError, match=r"a\.csv: line 5: x holds a value that is not finite"):
        source.check(2)
