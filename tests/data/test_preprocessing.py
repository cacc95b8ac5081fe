"""A checkpoint alone is enough to turn raw rows into the inputs of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint import codec
from stepctl.config import yaml
from stepctl.config.model import TaskConfig, parse_config
from stepctl.data.preprocessing import Preprocessing
from stepctl.errors import DataError
from stepctl.state.arena import Array
from stepctl.state.train_state import PREPROCESSING
from stepctl.training.assembly import TaskAssembly
from stepctl.training.build import prepare
from tests.data.test_tables import wide
from tests.support.runs import RUN_ID, file_bytes, make_config

TABLE = """width,color,fresh,weight,species
5.1,red,yes,1,setosa
4.9,blue,no,2,virginica
6.5,red,yes,,setosa
4.7,green,no,4,versicolor
5.5,blue,yes,3,virginica
5.9,green,no,1,setosa
"""
OPTIONS = {"target": "species", "missing": "mean", "standardize": True}


def assembled(path: Path, text: str = TABLE, **options: Any) -> TaskAssembly:
    path.write_text(text)
    data = {"name": "csv", "path": str(path), "batch_size": 2, **options}
    assembly = prepare(make_config(data=data, evaluate={}))
    assert isinstance(assembly, TaskAssembly)
    return assembly


def restored(assembly: TaskAssembly, folder: Path) -> Preprocessing:
    """Return the preprocessing of a checkpoint of an assembly: a file that is written and read."""
    image = codec.encode(
        assembly.state, run="r", run_id=RUN_ID, config=assembly.config.text, numerics="{}"
    )
    path = folder / "step-00000000.h5"
    path.write_bytes(file_bytes(image))
    arrays: dict[str, Array] = {}
    with codec.Reader(str(path)) as reader:
        config = parse_config(yaml.loads(reader.header.config, "config"))
        for name, (shape, dtype) in reader.array_shapes().items():
            if name.startswith(f"{PREPROCESSING}/"):
                array = np.empty(shape, dtype)
                reader.read_into(name, array)
                arrays[name.removeprefix(f"{PREPROCESSING}/")] = array
    assert isinstance(config, TaskConfig)
    return Preprocessing(config.data, arrays, dtype=config.dtype)


def training_rows(assembly: TaskAssembly) -> Array:
    return np.concatenate([x for source in assembly.sources for _, x, _ in source.slices()])


def test_the_training_file_is_read_as_in_training(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assembly = assembled(path, **OPTIONS)
    preprocessing = restored(assembly, tmp_path)
    rows = [*preprocessing.read(str(path))]
    x = training_rows(assembly)
    np.testing.assert_array_equal(np.concatenate([part.x for part in rows]), x)
    assert np.concatenate([part.lines for part in rows]).tolist() == [2, 3, 4, 5, 6, 7]
    assert preprocessing.columns == ["width", "color", "fresh", "weight"]
    assert preprocessing.class_names == ["setosa", "versicolor", "virginica"]
    assert preprocessing.feature_names == [
        "width",
        "color=blue",
        "color=green",
        "color=red",
        "fresh",
        "weight",
    ]


def test_columns_are_found_by_name_and_the_target_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assembly = assembled(path, **OPTIONS)
    preprocessing = restored(assembly, tmp_path)
    path.write_text("note,weight,fresh,width,color\nsome,1,yes,5.1,red\n,2,no,4.9,blue\n")
    (rows,) = preprocessing.read(str(path))
    np.testing.assert_array_equal(rows.x, training_rows(assembly)[:2])


def test_rows_of_values_are_those_of_their_texts(tmp_path: Path) -> None:
    assembly = assembled(tmp_path / "t.csv", **OPTIONS)
    preprocessing = restored(assembly, tmp_path)
    x = training_rows(assembly)
    given = [[5.1, "red", True, 1], ["4.9", "blue", "no", 2.0], [6.5, "red", "yes", None]]
    np.testing.assert_array_equal(preprocessing.transform(given), x[:3])


def test_features_are_filled_and_standardized_with_the_training_part(tmp_path: Path) -> None:
    """The mean of each feature replaces a missing value; then numbers have mean 0, deviation 1."""
    rows = "".join(
        f"{number},{'' if number % 5 else number * 2},{number % 2}\n" for number in range(40)
    )
    options = {"missing": "mean", "standardize": True, "validation_fraction": 0.25}
    assembly = assembled(tmp_path / "t.csv", rows, **options)
    subset = assembly.training.subset
    trained = subset.rows(np.arange(subset.n))
    x = training_rows(assembly)
    numbers = np.arange(40.0)
    second = np.where(numbers % 5, np.nan, numbers * 2)
    second = np.where(np.isnan(second), np.nanmean(second[trained]), second)
    expected = np.stack([numbers, second], axis=1)
    expected = (expected - expected[trained].mean(axis=0)) / expected[trained].std(axis=0)
    assert len(trained) == 30
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(x[trained].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(x[trained].std(axis=0), 1, rtol=1e-6)


def test_a_table_without_statistics_has_no_arrays_in_its_checkpoint(tmp_path: Path) -> None:
    assembly = assembled(tmp_path / "t.csv", TABLE.replace(",,", ",0,"), target="species")
    assert not any(path.startswith(PREPROCESSING) for path in assembly.state.arrays())
    x = training_rows(assembly)
    (rows,) = restored(assembly, tmp_path).read(str(tmp_path / "t.csv"))
    np.testing.assert_array_equal(rows.x, x)


@pytest.mark.parametrize("target", [0, 1, -1])
def test_a_file_without_header_may_lack_the_target_column(target: int, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [[0.5, 1.0, 0], [1.5, 2.0, 1], [2.5, 3.0, 0]]
    for row in rows:
        row.insert(target % 3, row.pop())
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    preprocessing = restored(assembled(path, text, target=target), tmp_path)
    (ignored,) = preprocessing.read(str(path))
    for row in rows:
        del row[target]
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    (without,) = preprocessing.read(str(path))
    np.testing.assert_array_equal(ignored.x, [[0.5, 1], [1.5, 2], [2.5, 3]])
    np.testing.assert_array_equal(without.x, ignored.x)


def test_a_table_with_very_many_columns_is_read_by_position(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    text = wide(600)
    options = {"target": "y", "standardize": True}
    assembly = assembled(path, text, **options)
    preprocessing = restored(assembly, tmp_path)
    x = training_rows(assembly)
    (rows,) = preprocessing.read(str(path))
    np.testing.assert_array_equal(rows.x, x)
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in text.splitlines()))
    (rows,) = preprocessing.read(str(path))
    np.testing.assert_array_equal(rows.x, x)
    assert preprocessing.columns is None
    assert preprocessing.class_names == ["s", "t"]


NEW: dict[str, str] = {
    "unseen category": "width,color,fresh,weight\n5.1,red,yes,1\n4.9,pink,no,2\n",
    "no number": "width,color,fresh,weight\n5.1,red,yes,heavy\n",
    "no boolean": "width,color,fresh,weight\n5.1,red,perhaps,2\n",
    "no such column": "width,colour,fresh,weight\n5.1,red,yes,1\n",
    "ragged": "width,color,fresh,weight\n5.1,red,yes,1\n5.1,red,yes\n",
    "no header": "5.1,red,yes,1\n4.9,blue,no,2\n",
}


@pytest.mark.parametrize("case", NEW)
def test_a_row_that_does_not_fit_is_named(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "t.csv"
    preprocessing = restored(assembled(path, **OPTIONS), tmp_path)
    path.write_text(NEW[case])
    with pytest.raises(DataError) as caught:
        [*preprocessing.read(str(path))]
    assert str(caught.value).removeprefix(f"{path}: cannot be read as CSV: ") == snapshot


@pytest.mark.parametrize("missing", ["error", "drop"])
def test_a_new_row_without_a_value_is_refused_where_no_mean_replaces_it(
    missing: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path = tmp_path / "t.csv"
    whole = TABLE.replace(",,", ",0,")
    preprocessing = restored(assembled(path, whole, target="species", missing=missing), tmp_path)
    path.write_text(TABLE)
    with pytest.raises(DataError) as caught:
        [*preprocessing.read(str(path))]
    assert str(caught.value).removeprefix(f"{path}: cannot be read as CSV: ") == snapshot
    with pytest.raises(DataError, match=r"^row 0: column 'weight' has no value"):
        preprocessing.transform([[1, "red", "yes", None]])


def test_samples_of_other_sources_are_scaled(tmp_path: Path) -> None:
    """A CSV file of their values may have a header, and the target as its last column."""
    config = make_config(data={"name": "arrays", "path": "a.npz", "scale": 0.5, "n_classes": 3})
    assert isinstance(config, TaskConfig)
    preprocessing = Preprocessing(config.data, dtype="float32", sample_shape=(2, 2))
    x = np.arange(8).reshape(2, 2, 2)
    np.testing.assert_array_equal(preprocessing.transform(x), x / 2)
    assert preprocessing.class_names == ["0", "1", "2"]
    assert preprocessing.columns is None
    path = tmp_path / "t.csv"
    for text in ("0,1,2,3\n4,5,6,7\n", "a,b,c,d,y\n0,1,2,3,1\n4,5,6,7,2\n"):
        path.write_text(text)
        (rows,) = preprocessing.read(str(path))
        np.testing.assert_array_equal(rows.x, x / 2)
    path.write_text("0,1,2\n")
    with pytest.raises(DataError, match=r"it has 3 columns, but a sample has 4 values$"):
        [*preprocessing.read(str(path))]
