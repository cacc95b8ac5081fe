"""Numbers in the format of a spreadsheet are refused, with their line and how to write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepctl.data.csv import csv
from stepctl.data.csv_file import CSVFile
from stepctl.data.number_formats import formatted_number
from stepctl.data.proposal import propose
from stepctl.errors import DataError

DECIMAL = "a decimal comma"
THOUSANDS = "a separator of thousands"
PERCENT = "a percent sign"
CURRENCY = "a currency"


@pytest.mark.parametrize(
    ("cell", "what", "plain"),
    [
        ("17,5", DECIMAL, ["17.5"]),
        (" -,5 ", DECIMAL, ["-.5"]),
        ("1,5E+03", DECIMAL, ["1.5E+03"]),
        ("0,125", DECIMAL, ["0.125"]),
        ("1234,125", DECIMAL, ["1234.125"]),
        ("1.234.567,5", DECIMAL, ["1234567.5"]),
        ("1.234,5", DECIMAL, ["1234.5"]),
        ("17,5 %", DECIMAL, ["17.5"]),
        ("1,234", "a comma", ["1234", "1.234"]),
        ("1,234,567", THOUSANDS, ["1234567"]),
        ("1,234.5", THOUSANDS, ["1234.5"]),
        ("1.234.567", THOUSANDS, ["1234567"]),
        ("1\u202f234", THOUSANDS, ["1234"]),
        ("1'234.5", THOUSANDS, ["1234.5"]),
        ("12%", PERCENT, ["12"]),
        ("1.234 %", PERCENT, ["1.234"]),
        ("$5", CURRENCY, ["5"]),
        ("-€ 12.5", CURRENCY, ["-12.5"]),
        ("12.50 EUR", CURRENCY, ["12.50"]),
        ("\u22125", "a minus sign that is not ASCII", ["-5"]),
    ],
)
def test_a_format_is_found(cell: str, what: str, plain: list[str]) -> None:
    found = formatted_number(cell)
    assert found is not None
    assert (found.what, [*found.plain]) == (what, plain)


@pytest.mark.parametrize(
    "cell",
    [
        "",
        "-",
        ",",
        "%",
        "$",
        "5",
        "1.5",
        "1e5",
        "nan",
        "1.2.3",
        "1,2,3",
        "31.12.2024",
        "12:30",
        "1.234.5",
        "a,b",
        "5 cm",
        "12 34",
        "EUR",
    ],
)
def test_other_cells_have_none(cell: str) -> None:
    assert formatted_number(cell) is None


ROWS = "17,5;80,2;rot;Eiche\n18,0;81,5;blau;Tanne\n" * 10
HEADER = "Breite;Hoehe;Farbe;Baum\n"
SED = "'17,5' has a decimal comma; write 17.5, for example with: sed 's/,/./g' FILE"


def both(tmp_path: Path, content: str, **options: Any) -> list[str]:
    """Return what `train` and `init` say of a file that both refuse."""
    path = tmp_path / "a.csv"
    path.write_text(content)
    messages = []
    with pytest.raises(DataError) as trained:
        csv(path=str(path), targets="classes", dtype="float32", **options)
    with pytest.raises(DataError) as proposed:
        propose(str(path))
    for error in (trained.value, proposed.value):
        messages.append(str(error).removeprefix(f"{path}: cannot be read as CSV: "))
    return messages


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
@pytest.mark.parametrize(
    ("header", "place"),
    [
        (HEADER, "line 2: column 'Breite': "),
        ("", "line 1: column 1: "),
        (HEADER.replace("Breite", "Breite, cm"), "line 2: column 'Breite, cm': "),
    ],
)
def test_decimal_commas_are_refused(
    delimiter: str, header: str, place: str, tmp_path: Path
) -> None:
    content = (header + ROWS).replace(";", delimiter)
    assert both(tmp_path, content) == [place + SED] * 2


@pytest.mark.parametrize("other", ["18", "n. d.", ""])
def test_a_column_need_not_consist_of_decimal_commas(other: str, tmp_path: Path) -> None:
    content = f"a;y\n17,5;u\n{other};v\n17,5;u\n" + "17,5;v\n" * 10
    for message in both(tmp_path, content):
        assert message.startswith("line 2: column ")
        assert message.endswith(SED)


def test_sed_is_no_remedy_where_it_gives_no_table(tmp_path: Path) -> None:
    for content in ('a,y\n"17,5",u\n' * 1 + '"18,5",v\n' * 12, "a;y\n" + "1.017,5;u\n1,5;v\n" * 8):
        for message in both(tmp_path, content):
            assert "has a decimal comma; write 1" in message
            assert "sed" not in message


def test_a_cell_with_one_meaning_is_named(tmp_path: Path) -> None:
    content = "a;y\n1,234;u\n1,25;v\n" + "2,345;u\n" * 10
    for message in both(tmp_path, content):
        assert message.startswith("line 3: column 'a': '1,25' has a decimal comma; write 1.25")
    for message in both(tmp_path, "a;y\n" + "1,234;u\n1,250;v\n" * 6):
        assert message.startswith("line 2: column 'a': '1,234' has a comma; write 1234 or 1.234")


def table(tmp_path: Path, cells: list[str]) -> str:
    path = tmp_path / "a.csv"
    rows = [f"{cell}\t{'uv'[row % 2]}" for row, cell in enumerate(cells * 6)]
    path.write_text("\n".join(["a\ty", *rows]))
    return str(path)


@pytest.mark.parametrize("cells", [["5%", "12.5 %"], ["$5", "$1,234.5"], ["1 234", "12"]])
def test_other_formats_are_no_words(cells: list[str], tmp_path: Path) -> None:
    path = table(tmp_path, cells)
    assert CSVFile(path).head.names == ("a", "y")
    with pytest.raises(DataError, match=r"line 2: column 'a': .* has a .*; write .*, or take all"):
        csv(path=path, targets="classes", dtype="float32")
    source = csv(path=path, targets="classes", dtype="float32", header=True, categorical=["a"])
    assert source.train.sample_shape == (2,)
    with pytest.raises(DataError, match=r"no column of features: line 2: column 'a': .* has a "):
        propose(path)


def test_names_with_percent_signs_are_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("25%,50%\n1,0\n2,1\n")
    assert CSVFile(str(path)).head.names == ("25%", "50%")
    path.write_text("25%,u\n26%,v\n")
    assert not CSVFile(str(path)).head.header


@pytest.mark.parametrize("content", ["3,5;6,u\n4,7;8,v\n", "1,a;b,0\n2,c;d,1\n", "1,2,0\n3,4,1\n"])
def test_a_comma_stays_the_delimiter(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert CSVFile(str(path)).head.delimiter == ","


def test_predicted_rows_are_told_how_to_write_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a;y\n1.5;0\n17,5;1\n")
    with pytest.raises(
        DataError, match=r"line 3: column 'a': '17,5' has a decimal comma; write 17\.5"
    ):
        csv(
            path=str(path),
            targets="classes",
            dtype="float32",
            header=True,
            delimiter=";",
            names=["a", "y"],
            n_columns=2,
            encodings=[],
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\x14\0", "a zip archive or an Excel file, not a CSV; save it as CSV"),
        (bytes(range(256)), "a binary file, not a CSV; save it as CSV"),
        (b"1,2\n" * 50 + b"\0", "a binary file, not a CSV; save it as CSV"),
        (b"PAR1\x15\x04", "a Parquet file, not a CSV; save it as CSV"),
        (b"BZh91AY&SY", "compressed, but not with gzip; unpack it"),
    ],
)
def test_a_file_that_is_no_text_is_named_as_what_it_is(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        propose(str(path))
    assert str(caught.value) == f"{path}: cannot be read as CSV: it is {message}"


def test_a_header_alone_holds_no_rows(tmp_path: Path) -> None:
    assert both(tmp_path, "a,b,y\n") == ["it holds no rows"] * 2


def test_another_delimiter_than_the_config_s_is_named(tmp_path: Path) -> None:
    path = tmp_path / "semicolons.csv"
    path.write_text("a;b\n1;2\n")
    with pytest.raises(ValueError, match="delimiter seems to be ';', not ',': write the file with"):
        CSVFile(str(path), delimiter=",")
