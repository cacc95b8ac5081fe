"""Tables of words, truth values and numbers: what the columns become, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.data.base import Source, Targets
from stepctl.data.columns import MAX_CATEGORIES
from stepctl.data.csv import csv
from stepctl.errors import DataError
from stepctl.state.arena import Array

NUMBERS = "".join(f"{n * 0.37:.3f},{n * 7919 % 101},{-n / 3!r},{n % 3}\n" for n in range(50))
INTEGERS = "".join(f"{n},{n * n},{n % 3}\n" for n in range(50))
QUOTED = '"a","b c",y\n' + "".join(f'"{n}",{n * n / 7!r},{n % 3}\n' for n in range(50))


def load(tmp_path: Path, text: str, *, targets: Targets = "classes", **options: Any) -> Source:
    path = tmp_path / "a.csv"
    path.write_text(text, newline="")
    options = {"dtype": "float64", **options}
    return csv(path=str(path), targets=targets, **options).train


def arrays(source: Source) -> tuple[Array, Array]:
    ((_, x, y),) = source.slices()
    return x, y


def refusal(tmp_path: Path, text: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(tmp_path, text, **options)
    return str(caught.value).removeprefix(f"{tmp_path / 'a.csv'}: cannot be read as CSV: ")


# the digests that version 0.2 recorded: first characters of the fingerprint
RECORDED: list[tuple[str, dict[str, Any], str]] = [
    (NUMBERS, {"dtype": "float32"}, "f1228b4b2df60b84"),
    (NUMBERS, {"dtype": "float32", "scale": 0.5}, "83be03ba6e2a8696"),
    (NUMBERS, {"dtype": "float32", "targets": "values"}, "9a3664a49e50dc1c"),
    (NUMBERS, {"dtype": "float32", "targets": "values", "target": 1}, "cea963b726eb3da2"),
    (NUMBERS, {"dtype": "float32", "targets": "any", "target": 1}, "0e1525ef0cf972a3"),
    (NUMBERS, {"scale": 0.5}, "0db2dad289c1894d"),
    (NUMBERS, {"targets": "values"}, "08cd8a318596876c"),
    (INTEGERS, {"dtype": "float32", "integer_inputs": True}, "9a1803b6b4fca7b5"),
    (
        INTEGERS,
        {"dtype": "float32", "integer_inputs": True, "targets": "values"},
        "ad23537a9ec3817e",
    ),
    (QUOTED, {"dtype": "float32", "target": "y"}, "eb6bfa4726a5db35"),
]


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_numbers_have_the_bits_and_the_fingerprint_of_earlier_versions(
    number: int, tmp_path: Path
) -> None:
    text, options, recorded = RECORDED[number]
    assert load(tmp_path, text, **options).fingerprint().startswith(recorded)


TABLE = (
    "\ufeffwidth;color;fresh;species\r\n"
    '5.1;red;Yes;"setosa"\r\n'
    ' 4.9 ;"blue; dark\r\nand more";no;virginica\r\n'
    "\r\n"
    "6.5;red;TRUE; setosa\r\n"
)


def test_words_become_features_and_classes(tmp_path: Path) -> None:
    """With a byte order mark, CRLF, semicolons, quotes, a newline in a cell, and a blank line."""
    source = load(tmp_path, TABLE)
    x, y = arrays(source)
    assert x.tolist() == [[5.1, 0, 1, 1], [4.9, 1, 0, 0], [6.5, 0, 1, 1]]
    assert y.tolist() == [0, 1, 0]
    assert source.decided_config() == {
        "header": True,
        "delimiter": ";",
        "names": ["width", "color", "fresh", "species"],
        "n_columns": 4,
        "class_names": ["setosa", "virginica"],
        "encodings": [
            {"column": "color", "kind": "category", "categories": ["blue; dark\nand more", "red"]},
            {"column": "fresh", "kind": "boolean", "categories": []},
            {"column": "species", "kind": "class", "categories": []},
        ],
    }
    assert [source.place(row) for row in range(3)] == ["line 2", "line 3", "line 6"]


def test_what_was_decided_reads_the_same_again(tmp_path: Path) -> None:
    source = load(tmp_path, TABLE)
    again = load(tmp_path, TABLE, **source.decided_config())
    assert again.fingerprint() == source.fingerprint()
    assert again.decided_config() == source.decided_config()


def test_columns_that_moved_are_found_by_their_names(tmp_path: Path) -> None:
    source = load(tmp_path, "a,b,y\n1,u,0\n2,v,1\n", target="y")
    moved = load(tmp_path, "y,b,new,a\n0,u,7,1\n1,v,8,2\n", target="y", **source.decided_config())
    assert moved.fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[1, 2, 3], [5, 6, 7]]),
        ({"columns": ["c", "a"]}, [[3, 1], [7, 5]]),
        ({"columns": [2, "a"]}, [[3, 1], [7, 5]]),
        ({"exclude": ["b"]}, [[1, 3], [5, 7]]),
        ({"exclude": [-2, 0]}, [[2], [6]]),
        ({"target": "a"}, [[2, 3, 0], [6, 7, 1]]),
    ],
)
def test_columns_are_chosen(options: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    x, _ = arrays(load(tmp_path, "a,b,c,y\n1,2,3,0\n5,6,7,1\n", **{"targets": "values", **options}))
    assert x.tolist() == expected


def test_an_excluded_column_may_hold_anything(tmp_path: Path) -> None:
    text = "id,born,x,y\nu,2001-02-03,1,0\n7,,2,1\n"
    source = load(tmp_path, text, exclude=["id", "born"])
    assert arrays(source)[0].tolist() == [[1], [2]]
    assert arrays(load(tmp_path, text, columns=["x"], **source.decided_config()))[0].tolist() == [
        [1],
        [2],
    ]


def test_listed_columns_are_categories(tmp_path: Path) -> None:
    """Codes, dates and labels that are numbers; they are sorted by their values."""
    text = "code,day,y\n10,2024-01-02,7\n9,2024-01-01,30\n10,2024-01-01,7\n"
    source = load(tmp_path, text, categorical=["code", "day", "y"])
    x, y = arrays(source)
    assert x.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]]
    assert y.tolist() == [0, 1, 0]
    assert source.decided_config()["class_names"] == ["7", "30"]


def test_the_config_may_give_the_order_of_the_classes(tmp_path: Path) -> None:
    text = "x,y\n1,low\n2,high\n"
    names = ["low", "middle", "high"]
    source = load(tmp_path, text, class_names=names)
    assert arrays(source)[1].tolist() == [0, 2]
    assert source.decided_config()["class_names"] == names
    assert "'low' is a class that the run does not have" in refusal(
        tmp_path, text, class_names=["middle", "high"]
    )


def test_truth_values_are_numbers_of_a_regression(tmp_path: Path) -> None:
    x, y = arrays(load(tmp_path, "x,y\nno,true\nyes,false\n", target="y", targets="values"))
    assert (x.tolist(), y.tolist()) == ([[0], [1]], [[1], [0]])


def test_the_scale_is_that_of_the_numbers(tmp_path: Path) -> None:
    x, _ = arrays(load(tmp_path, "a,b,y\n4,u,0\n6,v,1\n", scale=0.5))
    assert x.tolist() == [[2, 1, 0], [3, 0, 1]]


@pytest.mark.parametrize("hole", ["", " ", "NA", "n/a", "NaN", "null", "?"])
def test_rows_with_missing_values_are_dropped(hole: str, tmp_path: Path) -> None:
    text = f"a,b,y\n1,u,s\n{hole},u,s\n2,{hole},t\n3,v,{hole}\n4,v,t\n"
    source = load(tmp_path, text, missing="drop")
    x, y = arrays(source)
    assert x.tolist() == [[1, 1, 0], [4, 0, 1]]
    assert y.tolist() == [0, 1]
    assert source.place(1) == "line 6"


def test_a_validation_file_shares_the_categories(tmp_path: Path) -> None:
    train, validation = tmp_path / "t.csv", tmp_path / "v.csv"
    train.write_text("b,y\nu,s\nw,r\n")
    validation.write_text("y,b\ns,v\n")
    sources = csv(
        path=str(train),
        validation_path=str(validation),
        target="y",
        targets="classes",
        dtype="float64",
    )
    assert sources.validation is not None
    assert arrays(sources.train)[0].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert arrays(sources.validation)[0].tolist() == [[0, 1, 0]]
    assert arrays(sources.validation)[1].tolist() == [1]


@pytest.mark.parametrize("characters", [1, 20, 100])
@pytest.mark.parametrize("text", [NUMBERS, INTEGERS, QUOTED, TABLE], ids=["n", "i", "q", "t"])
def test_a_file_is_the_same_in_small_blocks(
    text: str, characters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(tmp_path, text)
    monkeypatch.setattr("stepctl.data.csv_file._BLOCK_CHARACTERS", characters)
    monkeypatch.setattr("stepctl.data.csv_file._BLOCK_ROWS", 2)
    parts = load(tmp_path, text)
    assert parts.fingerprint() == whole.fingerprint()
    rows = range(whole.n)
    assert [parts.place(row) for row in rows] == [whole.place(row) for row in rows]


def test_a_gzipped_file_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(tmp_path, NUMBERS)
    monkeypatch.setattr("stepctl.data.csv_file._BLOCK_CHARACTERS", 50)
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(NUMBERS.encode()))
    packed = csv(path=str(path), targets="classes", dtype="float64").train
    assert packed.fingerprint() == whole.fingerprint()


def wide(n: int) -> str:
    """Return a table of n columns with long names, the last two of words."""
    names = [f"a column of numbers {number}" for number in range(n - 2)]
    first = [str(number % 7) for number in range(n - 2)]
    second = [str(number % 5) for number in range(n - 2)]
    rows = [[*first, "u", "s"], [*second, "v", "t"]]
    return "".join(",".join(row) + "\n" for row in [[*names, "word", "y"], *rows])


def test_names_that_are_too_long_for_a_config_are_not_recorded(tmp_path: Path) -> None:
    """Then they are read in the file again."""
    source = load(tmp_path, wide(600), target="y")
    decided = source.decided_config()
    assert (decided["names"], decided["n_columns"]) == (None, 600)
    again = load(tmp_path, wide(600), target="y", **decided)
    assert again.fingerprint() == source.fingerprint()
    assert load(tmp_path, wide(100), target="y").decided_config()["names"] is not None


MANY = "".join(f"w{number},{number % 2}\n" for number in range(MAX_CATEGORIES + 1))
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "an unknown target": ("width,specie\n1,0\n", {"target": "species"}),
    "an unknown column": ("width,y\n1,0\n", {"columns": ["widht"]}),
    "an unknown excluded column": ("width,y\n1,0\n", {"exclude": ["id"]}),
    "an unknown categorical column": ("width,y\n1,0\n", {"categorical": [5]}),
    "the target among the columns": ("width,y\n1,0\n", {"columns": ["width", "y"]}),
    "no column left": ("width,y\n1,0\n", {"exclude": ["width"]}),
    "a word among numbers": ("a,y\n1,0\n2,1\nx,0\n3,1\n", {}),
    "a number among words": ("a,y\nu,0\nv,1\n7,0\nu,1\n", {"header": True}),
    "a word among the labels": ("a,y\n1,0\n2,1\n2,one\n", {}),
    "a date": ("day,y\n2024-01-31,0\n2024-02-01,1\n", {"header": True}),
    "a time": ("day,y\n31.1.2024 12:30,0\n1.2.2024 09:15,1\n", {"header": True}),
    "too many categories": ("a,y\n" + MANY, {"header": True}),
    "too many classes": (MANY, {"target": 0}),
    "words of a regression": ("a,y\n1,low\n2,high\n", {"targets": "values"}),
    "a missing value": ("a,b,y\n1,2,0\n3,,1\n", {}),
    "a missing word": ("a,b,y\n1,u,0\n3,,1\n", {}),
    "a missing target": ("a,b,y\n1,2,0\n3,4,NA\n", {"missing": "mean"}),
    "no whole row": ("a,b,y\n1,,0\n,3,1\n", {"missing": "drop"}),
    "a ragged row": ("a,b,y\n1,u,0\n3,v\n", {}),
    "a ragged row behind an excluded column": ("a,b,y\n1,u,0\n3,1\n", {"exclude": ["b"]}),
    "a quote without an end": ('a,b,y\n1,2,0\n3,"4,1\n', {}),
    "only a header": ("a,b,y\n", {"target": "y"}),
    "a header of other words": ("1,2,3\n4,5,6\n", {"names": ["a", "b", "y"], "n_columns": 3}),
    "another number of columns": (
        "1,2,3\n4,5,6\n",
        {"header": False, "delimiter": ",", "n_columns": 4},
    ),
    "wrong encodings": (
        "a,y\nu,0\n",
        {"header": True, "delimiter": ",", "n_columns": 2, "encodings": [{}]},
    ),
    "a column named twice": ("a,b,a\n1,2,0\n", {"header": True}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_is_refused_with_its_line_and_a_remedy(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    text, options = REFUSED[case]
    message = refusal(tmp_path, text, **options)
    assert "\n" not in message
    assert message == snapshot


def test_more_categories_are_allowed_where_they_are_listed(tmp_path: Path) -> None:
    x, _ = arrays(load(tmp_path, MANY, categorical=[0]))
    assert x.shape == (MAX_CATEGORIES + 1, MAX_CATEGORIES + 1)
    assert np.array_equal(x.sum(axis=1), np.ones(len(x)))


def test_constant_numbers_are_named_in_a_warning(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    source = load(tmp_path, "a,b,c,y\n1,0.1,u,0\n2,0.1,u,1\n4,0.1,u,0\n", standardize=True)
    source.fit_preprocessing(np.arange(3))
    x, _ = arrays(source)
    assert x[:, 1].tolist() == [0, 0, 0]
    assert x[:, 2].tolist() == [1, 1, 1]
    (warning,) = source.warnings()
    assert warning.removeprefix(f"{tmp_path}/") == snapshot


@pytest.mark.parametrize("value", ["inf", "1e308"])
def test_numbers_without_a_deviation_are_refused(
    value: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    source = load(tmp_path, f"a,b,y\n1,2,0\n2,{value},1\n", standardize=True)
    with pytest.raises(DataError) as caught:
        source.fit_preprocessing(np.arange(2))
    assert str(caught.value).removeprefix(f"{tmp_path}/") == snapshot


def test_a_feature_without_values_in_the_training_part_is_refused(tmp_path: Path) -> None:
    source = load(tmp_path, "a,b,y\n1,,0\n2,,1\n3,4,0\n", missing="mean")
    with pytest.raises(DataError, match=r"feature 'b' has no value in the training rows"):
        source.fit_preprocessing(np.arange(2))
