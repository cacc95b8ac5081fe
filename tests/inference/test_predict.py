"""`stepctl predict`: one row for each row of the input, in order, in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.inference import row_files
from stepctl.inference.predict import predict_chunks
from stepctl.state.arena import Array
from tests.support.messages import normalize
from tests.support.trained_runs import WGAN, digits, train_digits

X, Y = digits()


def call(*arguments: object, expect: int = 0) -> str:
    """Run a command in this process; return stdout, or stderr after an error."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exit_code == expect, result.output
    return result.stderr if expect else result.stdout


def table(text: str) -> tuple[list[str], Array]:
    """Return the header and the numbers of a CSV text."""
    header, *rows = csv.reader(io.StringIO(text))
    return header, np.array(rows, float)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every format."""
    folder = tmp_path_factory.mktemp("inputs")
    np.savez(folder / "x.npz", y=Y, x=X)
    np.savez_compressed(folder / "test.npz", x_test=X, x_train=X[:3])
    np.save(folder / "x.npy", X)
    np.save(folder / "fortran.npy", np.asfortranarray(X))
    np.save(folder / "image.npy", X.reshape(-1, 8, 8).astype(np.float64))
    np.savetxt(folder / "x.csv", X, "%d", delimiter=",")
    return folder


@pytest.mark.parametrize("name", ["x.npz", "test.npz", "x.npy", "fortran.npy", "x.csv"])
def test_every_format_gives_the_predictions_of_the_model(
    name: str, digits_run: Path, inputs: Path, tmp_path: Path
) -> None:
    model = stepctl.load_model(digits_run)
    expected = model.predict_proba(X)
    call("predict", digits_run, inputs / name, "-o", tmp_path / "out.csv")
    header, rows = table((tmp_path / "out.csv").read_text())
    assert header == ["prediction", *(f"probability_{number}" for number in range(10))]
    assert np.array_equal(rows[:, 0], model.predict(X))
    assert np.array_equal(rows[:, 1:].astype(np.float32), expected)  # to the bit
    call("predict", digits_run, inputs / name, "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["prediction"], model.predict(X))
        assert np.array_equal(found["probability"], expected)
        assert found["class_names"].tolist() == model.class_names


def test_standard_output_gets_the_same_csv(digits_run: Path, inputs: Path, tmp_path: Path) -> None:
    printed = call("predict", digits_run, inputs / "x.npy", "-o", "-")
    call("predict", digits_run, inputs / "x.npy", "-o", tmp_path / "out.csv")
    assert printed == (tmp_path / "out.csv").read_text()


def test_a_selected_step(digits_run: Path, inputs: Path) -> None:
    printed = call("predict", digits_run, inputs / "x.npy", "-o", "-", "--step", 10, "--ema")
    _, rows = table(printed)
    expected = stepctl.load_model(digits_run, step=10, ema=True).predict_proba(X)
    assert np.array_equal(rows[:, 1:].astype(np.float32), expected)


def test_a_file_is_read_in_chunks(
    digits_run: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "_CHUNK_BYTES", 1)
    model = stepctl.load_model(digits_run)
    for name in ("x.npz", "test.npz", "x.npy"):
        shares: list[float] = []
        chunks = [*predict_chunks(model, str(inputs / name), shares.append)]
        assert [len(chunk.values) for chunk in chunks] == [1024, 1797 - 1024]
        assert shares == [1024 / 1797, 1]


@pytest.mark.training
def test_values_of_a_regression(tmp_path: Path) -> None:
    targets = np.stack([Y, Y**2, -Y], axis=1)
    np.savez(tmp_path / "a.npz", x=X, y=targets)
    data = {"name": "arrays", "path": str(tmp_path / "a.npz"), "batch_size": 32, "scale": 1 / 16}
    sections: dict[str, Any] = {"model": {"name": "linear"}, "task": {"name": "regression"}}
    run = train_digits(tmp_path / "run", data=data, evaluate={}, dtype="float64", **sections)
    header, rows = table(call("predict", run, tmp_path / "a.npz", "-o", "-"))
    assert header == ["prediction_0", "prediction_1", "prediction_2"]
    assert np.array_equal(rows, stepctl.load_model(run).predict(X))
    single = train_digits(tmp_path / "single", **sections)
    header, rows = table(call("predict", single, tmp_path / "a.npz", "-o", "-"))
    assert header == ["prediction"]
    assert np.array_equal(rows[:, 0].astype(np.float32), stepctl.load_model(single).predict(X))


def test_json_and_messages(digits_run: Path, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    printed = call("predict", digits_run, inputs / "x.npy", "-o", output, "--json")
    assert json.loads(printed) == {"step": 30, "rows": 1797, "output": str(output)}


# --- bad input


@pytest.fixture
def bad(tmp_path: Path) -> Iterator[Path]:
    """A folder of files that cannot be predicted; nothing may be added to it."""
    np.save(tmp_path / "narrow.npy", X[:, :63])
    np.save(tmp_path / "text.npy", np.array([["a"] * 64]))
    np.save(tmp_path / "objects.npy", np.array([[None] * 64]), allow_pickle=True)
    np.save(tmp_path / "empty.npy", X[:0])
    infinite = X.astype(float)
    infinite[1500, 3] = np.inf
    np.save(tmp_path / "infinite.npy", infinite)
    np.savez(tmp_path / "names.npz", images=X)
    (tmp_path / "damaged.npz").write_bytes(b"PK no archive")
    cut = (tmp_path / "infinite.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(cut[:-1000])
    (tmp_path / "folder.npy").mkdir()
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "narrow.npy",
        "text.npy",
        "objects.npy",
        "empty.npy",
        "infinite.npy",
        "cut.npy",
        "names.npz",
        "damaged.npz",
        "missing.csv",
        "folder.npy",
    ],
)
def test_a_file_that_cannot_be_predicted(
    name: str, bad: Path, digits_run: Path, snapshot: SnapshotAssertion
) -> None:
    for output in ("out.csv", "out.npz"):
        message = call("predict", digits_run, bad / name, "-o", bad / output, expect=2)
        assert normalize(message, HERE=bad) == snapshot(name=name)


@pytest.mark.parametrize(
    "output", ["out.txt", "out", "narrow.npy", "no/out.csv", "folder.npy/.csv"]
)
def test_outputs_that_cannot_be_written(
    output: str, bad: Path, digits_run: Path, snapshot: SnapshotAssertion
) -> None:
    message = call("predict", digits_run, bad / "narrow.npy", "-o", bad / output, expect=2)
    assert normalize(message, HERE=bad) == snapshot


def test_the_input_is_never_the_output(digits_run: Path, inputs: Path) -> None:
    before = (inputs / "x.csv").read_bytes()
    message = call("predict", digits_run, inputs / "x.csv", "-o", inputs / "x.csv", expect=2)
    assert message == f"stepctl: {inputs / 'x.csv'}: is the input too; write to another file\n"
    assert (inputs / "x.csv").read_bytes() == before


def test_an_existing_output_is_replaced_only_by_a_complete_one(
    digits_run: Path, bad: Path, inputs: Path
) -> None:
    output = bad.parent / "out.csv"
    output.write_text("before")
    call("predict", digits_run, bad / "infinite.npy", "-o", output, expect=2)
    assert output.read_text() == "before"
    call("predict", digits_run, inputs / "x.npy", "-o", output)
    assert len(output.read_text().splitlines()) == 1798
    output.unlink()


@pytest.mark.training
def test_tasks_without_predictions(
    tmp_path: Path, inputs: Path, snapshot: SnapshotAssertion
) -> None:
    each: dict[str, dict[str, Any]] = {
        "wgan": WGAN,
        "loss": {"model": {"name": "tests.support.loss_models:ByHand"}, "task": {"name": "loss"}},
    }
    found = []
    for name, sections in each.items():
        run = train_digits(tmp_path / name, stop={"last_step": 1}, **sections)
        message = call("predict", run, inputs / "x.npy", "-o", tmp_path / "o.csv", expect=2)
        found.append(normalize(message, HERE=tmp_path))
    assert found == snapshot
