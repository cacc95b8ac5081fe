"""Models of tables with words: the preprocessing of training applies to new rows, from a checkpoint alone."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.inference.evaluate import evaluate
from stepctl.inference.export import export_model
from stepctl.state.arena import Array
from tests.support.messages import normalize
from tests.support.trained_runs import train_digits

HEADER = ["width", "color", "fresh", "height", "species"]
SPECIES = ["rose, red", "tulip", "violet"]


def rows(n: int, seed: int = 0) -> list[list[str]]:
    """Return rows of a table: numbers, some of them missing, words, truth values, and a class."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        label = int(generator.integers(3))
        width = "" if generator.random() < 0.1 else f"{generator.normal(label, 0.3):.3f}"
        color = ["red", "green", "blue"][int(generator.integers(3))]
        fresh = ["yes", "no"][int(generator.integers(2))]
        found.append([width, color, fresh, f"{generator.normal(1e4, 3):.2f}", SPECIES[label]])
    return found


def write(path: Path, header: list[str], cells: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *cells])
    return path


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table that is gone."""
    folder = tmp_path_factory.mktemp("table")
    path = write(folder / "flowers.csv", HEADER, rows(120))
    data = {"name": "csv", "path": str(path), "target": "species", "validation_fraction": 0.25}
    data |= {"missing": "mean", "standardize": True, "batch_size": 16}
    run = train_digits(folder / "run", data=data, stop={"last_step": 60})
    (folder / "moved.csv").write_bytes(path.read_bytes())
    path.unlink()
    return run


def call(*arguments: object, expect: int = 0) -> str:
    """Run a command in this process; return stdout, or stderr after an error."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exit_code == expect, result.output
    return result.stderr if expect else result.stdout


def predicted(text: str) -> tuple[list[str], list[str], Array]:
    """Return the header, the predictions and the probabilities of a CSV text."""
    header, *lines = csv.reader(io.StringIO(text))
    return header, [line[0] for line in lines], np.array([line[1:] for line in lines], np.float32)


def test_predictions_are_the_names_of_classes(table_run: Path, tmp_path: Path) -> None:
    new = rows(1500, seed=1)
    path = write(tmp_path / "new.csv", HEADER, new)
    header, names, probabilities = predicted(call("predict", table_run, path, "-o", "-"))
    assert header == ["prediction", *(f"probability_{name}" for name in SPECIES)]
    assert np.mean([name == row[4] for name, row in zip(names, new, strict=True)]) > 0.6
    model = stepctl.load_model(table_run)
    cells: list[list[object]] = [
        [float(width) if width else None, color, fresh, float(height)]
        for width, color, fresh, height, _ in new
    ]
    assert np.array_equal(model.predict_proba(cells), probabilities)
    assert model.predict(cells).tolist() == names
    assert model.predict(np.array(cells, object)).tolist() == names
    assert model.class_names == SPECIES
    assert model.inputs.columns == HEADER[:4]


def test_columns_are_found_by_name_and_the_target_may_be_missing(
    table_run: Path, tmp_path: Path
) -> None:
    new = rows(50, seed=2)
    order = [3, 1, 0, 2]
    with_target = call("predict", table_run, write(tmp_path / "a.csv", HEADER, new), "-o", "-")
    header = [HEADER[number] for number in order]
    cells = [[row[number] for number in order] for row in new]
    path = write(tmp_path / "b.csv", [*header, "other"], [[*row, "x"] for row in cells])
    assert call("predict", table_run, path, "-o", "-") == with_target
    call("predict", table_run, path, "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as archive:
        _, names, probabilities = predicted(with_target)
        assert archive["prediction"].tolist() == names
        assert np.array_equal(archive["probability"], probabilities)
        assert archive["class_names"].tolist() == SPECIES


@pytest.mark.process
def test_a_file_alone_predicts_and_evaluates(table_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights.h5"
    copy.write_bytes((table_run / "checkpoints" / "step-00000060.h5").read_bytes())
    new = rows(200, seed=3)
    path = write(tmp_path / "new.csv", HEADER, new)
    expected = call("predict", table_run, path, "-o", "-")
    assert call("predict", copy, path, "-o", "-") == expected
    found = evaluate(str(copy), data=[f"path={path}"])
    _, names, _ = predicted(expected)
    right = [name == row[4] for name, row in zip(names, new, strict=True)]
    assert found["metrics"]["accuracy"] == np.mean(right)
    assert found["class_names"] == SPECIES
    assert [*found["per_class"]] == SPECIES
    support = [found["per_class"][name]["support"] for name in SPECIES]
    assert support == [sum(row[4] == name for row in new) for name in SPECIES]


def test_the_validation_part_has_the_bits_of_the_row(table_run: Path) -> None:
    table_run.parent.joinpath("flowers.csv").symlink_to(table_run.parent / "moved.csv")
    lines = (table_run / "metrics.jsonl").read_text().splitlines()
    row = [each for each in map(json.loads, lines) if each["kind"] == "eval"][-1]
    found = evaluate(str(table_run))
    table_run.parent.joinpath("flowers.csv").unlink()
    assert found["metrics"] == {"loss": row["loss"], "accuracy": row["accuracy"]}


def test_an_onnx_model_standardizes(table_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = stepctl.load_model(table_run)
    export_model(model, str(tmp_path / "model.onnx"))
    export_model(model, str(tmp_path / "model.npz"))
    with np.load(tmp_path / "model.npz") as archive:
        facts = json.loads(str(archive["__metadata__"]))
    features = ["width", "color=blue", "color=green", "color=red", "fresh", "height"]
    assert facts["preprocessing"]["features"] == features
    assert facts["class_names"] == SPECIES
    new = rows(40, seed=4)
    x = np.array(
        [
            [
                float(width) if width else np.nan,
                *(color == name for name in ("blue", "green", "red")),
                fresh == "yes",
                float(height),
            ]
            for width, color, fresh, height, _ in new
        ]
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    labels, probabilities = session.run(None, {"x": x})
    cells = [[None if cell == "" else cell for cell in row[:4]] for row in new]
    np.testing.assert_allclose(probabilities, model.predict_proba(cells), rtol=1e-5)
    assert [SPECIES[label] for label in labels] == model.predict(cells).tolist()


@pytest.mark.training
def test_a_numeric_table_takes_arrays(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(1200, 3)).round(3)
    y = (x[:, 0] > 0).astype(int)
    np.savetxt(tmp_path / "t.csv", np.column_stack([x, y]), "%g", delimiter=",")
    np.savetxt(tmp_path / "x.csv", x, "%g", delimiter=",")
    np.save(tmp_path / "x.npy", x)
    data: dict[str, Any] = {"name": "csv", "path": str(tmp_path / "t.csv"), "scale": 0.5}
    run = train_digits(tmp_path / "run", data=data | {"batch_size": 8}, evaluate={})
    outputs = [call("predict", run, tmp_path / name, "-o", "-") for name in ("t.csv", "x.csv")]
    assert outputs[0] == outputs[1] == call("predict", run, tmp_path / "x.npy", "-o", "-")
    _, names, probabilities = predicted(outputs[0])
    model = stepctl.load_model(run)
    assert np.array_equal(model.predict_proba(x), probabilities)
    assert np.array_equal(model.predict_proba(x.astype(object)), probabilities)
    assert np.array_equal(model.predict(x), [int(name) for name in names])


@pytest.mark.parametrize(
    ("number", "cells", "header"),
    [
        (0, ["1", "pink", "yes", "2", "tulip"], HEADER),
        (1, ["one", "red", "yes", "2", "tulip"], HEADER),
        (2, ["1", "", "yes", "2", "tulip"], HEADER),
        (3, ["1", "red", "yes", "2"], ["width", "colour", "fresh", "height"]),
        (4, ["1", "red", "yes", "2", "tulip", "3"], HEADER),
        (5, ["inf", "red", "yes", "2", "tulip"], HEADER),
    ],
)
def test_rows_that_do_not_fit(
    number: int,
    cells: list[str],
    header: list[str],
    table_run: Path,
    tmp_path: Path,
    snapshot: SnapshotAssertion,
) -> None:
    path = write(
        tmp_path / "new.csv", header, [["1", "red", "no", "2", "violet"][: len(header)], cells]
    )
    if number == 2:  # a category that is missing is filled with its mean
        assert len(call("predict", table_run, path, "-o", "-").splitlines()) == 3
        return
    message = call("predict", table_run, path, "-o", tmp_path / "out.csv", expect=2)
    assert normalize(message, HERE=tmp_path) == snapshot
    assert [*tmp_path.iterdir()] == [path]
