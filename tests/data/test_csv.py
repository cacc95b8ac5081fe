"""CSV errors name the line of the file and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.data.base import Source
from stepctl.data.csv import csv
from stepctl.errors import DataError
from stepctl.state.arena import Array

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


Case = tuple[str | bytes, dict[str, Any]]
WITH_HEADER = {"header": True}
# a file, and options to read it with -> the start of the message, which names the place
AT_A_LINE: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "plain": (ROWS + "7,x,1\n", {}, "line 4: column 2: "),
    "header": ("a,b,c\n" + ROWS + "7,x,1\n", WITH_HEADER, "line 5: column 'b': "),
    "blank lines": ("1,2,0\n\n\n3,x,1\n", {}, "line 4: column 2: "),
    "newline in the header": ('"a\nb",b,c\n1,2,0\n3,x,1\n', WITH_HEADER, "line 4: column 'b': "),
    "newline in a row": ('1,"2\n",0\n3,x,1\n', {}, "line 3: column 2: "),
    "CRLF": ("1,2,0\r\n3,x,1\r\n", {}, "line 2: column 2: "),
    "CR": ("1,2,0\r3,x,1\r", {}, "line 2: column 2: "),
    "a row of another length": ("a,b,c\n" + ROWS + "\n7,8\n", WITH_HEADER, "line 6: "),
    "Latin-1": ("a,größe,c\n".encode("latin-1") + ROWS.encode(), WITH_HEADER, "line 1: "),
}


@pytest.mark.parametrize("case", AT_A_LINE)
def test_an_error_names_its_line_in_the_file(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    content, options, place = AT_A_LINE[case]
    message = refusal(tmp_path, content, **options)
    assert message.startswith(place)
    assert message == snapshot


REFUSED: dict[str, Case] = {
    "a header that is denied": ("a,b,label\n" + ROWS, {"header": False}),
    "UTF-16": (ROWS.encode("utf-16"), {}),
    "UTF-16, little-endian": (ROWS.encode("utf-16-le"), {}),
    "UTF-16, big-endian": (ROWS.encode("utf-16-be"), {}),
    "a column name that occurs twice": (
        "label,b, label\n" + ROWS,
        {"header": True, "target": "label"},
    ),
    "a header of another length than the rows": ("a,b\n" + ROWS, WITH_HEADER),
    "an empty file": ("", {}),
    "blank lines only": ("\n\n", {}),
    "a header without rows": ("a,b\n", WITH_HEADER),
    "a header without rows, CR": ("a,b\r", WITH_HEADER),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_with_a_remedy(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    content, options = REFUSED[case]
    assert refusal(tmp_path, content, **options) == snapshot


def test_data_with_one_bad_value_are_not_taken_for_a_header(tmp_path: Path) -> None:
    assert refusal(tmp_path, "a,b,label\n" + ROWS, header=False).endswith(HEADER_HINT)
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


@pytest.mark.parametrize(("delimiter", "spelled"), [(";", ";"), ("\t", "\\t"), ("|", "|")])
@pytest.mark.parametrize("header", ["", "a,b,c\n"])
def test_another_delimiter_is_found_or_suggested(
    delimiter: str, spelled: str, header: str, tmp_path: Path
) -> None:
    content = (header + ROWS).replace(",", delimiter)
    message = refusal(tmp_path, content, header=bool(header), delimiter=",")
    assert message.endswith(f'set data.delimiter: "{spelled}"')
    assert HEADER_HINT not in message
    for given in (delimiter, None):
        source = load(tmp_path, content, header=bool(header), delimiter=given)
        assert source.decided_config()["delimiter"] == delimiter
        _, y = values(source)
        np.testing.assert_array_equal(y, [0, 1, 0])


@pytest.mark.parametrize("last_row", ["3,-1", "inf,1"], ids=["label", "number"])
def test_a_bad_label_or_number_is_named_by_its_line(
    last_row: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"a,y\n1,0\n\n2,1\n{last_row}\n")
    with pytest.raises(DataError) as caught:
        csv(path=str(path), header=True, targets="classes", dtype="float32").train.check(2)
    message = str(caught.value)
    assert message.startswith(f"{path}: line 5: ")
    assert message.removeprefix(f"{path}: ") == snapshot
