"""Runs on tables: what they record, how they resume, and what plan and inspect show of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.data.statistics import Statistics
from stepctl.errors import ConfigError, StepctlError
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import resume_run
from stepctl.state.arena import Array
from stepctl.training.build import prepare
from tests.support.flowers import FLOWERS, PATH
from tests.support.messages import without_paths
from tests.support.runs import BASE, make_config, resume, train

LAST = 6
TEXT = PATH.read_text()


def config(path: Path, last: int = LAST) -> Any:
    return make_config(data=FLOWERS | {"path": str(path)}, stop={"last_step": last})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "flowers.csv"
    path.write_text(TEXT)
    return path


@pytest.fixture
def broken(table: Path, tmp_path: Path) -> Path:
    """Return a run that was stopped after three steps."""
    train(config(table, 3), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.training
def test_what_is_found_in_the_data_is_recorded(broken: Path) -> None:
    data = RunDirectory(broken).newest_config().value["data"]
    assert data["names"] == ["width", "color, main", "fresh", "weight", "species"]
    assert (data["n_columns"], data["header"], data["delimiter"]) == (5, True, ",")
    assert data["class_names"] == ["setosa", "versicolor", "virginica"]
    assert data["encodings"] == [
        {"column": "color, main", "kind": "category", "categories": ["blue", "green", "red"]},
        {"column": "fresh", "kind": "boolean", "categories": []},
        {"column": "species", "kind": "class", "categories": []},
    ]


@pytest.mark.training
def test_a_resume_takes_the_statistics_of_the_checkpoint(
    broken: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another NumPy may compute other last bits from the same data."""
    expected = train(config(table), tmp_path / "unbroken")
    real = Statistics.fit

    def fit(self: Statistics, slices: Callable[[], Iterable[Array]]) -> None:
        real(self, slices)
        for array in self.arrays.values():
            array *= 1.5

    monkeypatch.setattr(Statistics, "fit", fit)
    assert resume(broken, last_step=LAST).same_bits(expected)
    assert not train(config(table), tmp_path / "other").same_bits(expected)


@pytest.mark.training
def test_the_config_that_the_user_wrote_resumes(broken: Path, table: Path, tmp_path: Path) -> None:
    """What it leaves open is what the run decided."""
    document = yaml.Document(
        {**BASE, "data": FLOWERS | {"path": str(table)}, "stop": {"last_step": LAST}}
    )
    with resume_run(RunDirectory(broken), ResumeOptions(document=document)) as segment:
        segment.train()
        state = segment.state
    assert state.same_bits(train(config(table), tmp_path / "unbroken"))


def with_columns_reversed(text: str) -> str:
    lines = text.replace('"color, main"', "color; main").splitlines()
    turned = "".join(",".join(reversed(line.split(","))) + "\n" for line in lines)
    return turned.replace("color; main", '"color, main"')


@pytest.mark.training
def test_columns_in_another_order_are_the_same_data(
    broken: Path, table: Path, tmp_path: Path
) -> None:
    expected = train(config(table), tmp_path / "unbroken")
    table.write_text(with_columns_reversed(TEXT))
    assert resume(broken, last_step=LAST).same_bits(expected)


CHANGES: dict[str, tuple[str, str]] = {
    "a number": (",1,", ",2,"),
    "a word": ("red,", "blue,"),
    "a class": ("setosa\n", "virginica\n"),
    "a new word": ("red,", "pink,"),
    "a new class": ("setosa\n", "daisy\n"),
    "another name of a class": ("setosa", "setusa"),
    "a missing value": (",yes,", ",,"),
    "a row less": (TEXT[TEXT.rindex("\n", 0, -1) :], "\n"),
    "a column less": (",species", ""),
}


@pytest.mark.training
@pytest.mark.parametrize("case", CHANGES)
def test_changed_data_are_refused(
    case: str, broken: Path, table: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    old, new = CHANGES[case]
    if case == "a number":
        old, new = TEXT.splitlines()[1].split(",")[0] + ",", "9.99,"
    count = -1 if case == "another name of a class" else 1
    assert TEXT.count(old)
    table.write_text(TEXT.replace(old, new, count))
    with pytest.raises(StepctlError) as caught:
        resume(broken, last_step=LAST)
    assert without_paths(str(caught.value).replace(str(tmp_path), "HERE")) == snapshot


def test_another_number_of_classes_is_refused(table: Path, snapshot: SnapshotAssertion) -> None:
    given = make_config(data=FLOWERS | {"path": str(table), "n_classes": 4})
    with pytest.raises(ConfigError) as caught:
        prepare(given)
    assert str(caught.value).replace(str(table), "flowers.csv") == snapshot


WARNED: dict[str, tuple[str, dict[str, Any]]] = {
    "one class": ("x,y\n1,a\n2,a\n", {}),
    "a class without rows": ("x,y\n1,a\n2,b\n", {"class_names": ["a", "c", "b"]}),
}


@pytest.mark.parametrize("case", WARNED)
def test_suspect_classes_are_named_in_a_warning(
    case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    text, options = WARNED[case]
    (tmp_path / "a.csv").write_text(text)
    data = {"name": "csv", "path": str(tmp_path / "a.csv"), "batch_size": 2, **options}
    said: list[str] = []
    prepare(make_config(data=data, evaluate={}), say=said.append)
    assert [line.replace(f"{tmp_path}/", "") for line in said] == snapshot


@pytest.mark.training
def test_plan_and_inspect_show_the_columns(broken: Path) -> None:
    columns = "width, color, main (3 categories), fresh (boolean), weight, species (target)\n"
    for command in ("plan", "inspect"):
        printed = CliRunner().invoke(cli, [command, str(broken)]).stdout
        assert columns in printed
        assert "setosa, versicolor, virginica\n" in printed
        assert "preprocessing/deviation" in printed
    planned = CliRunner().invoke(cli, ["plan", str(broken), "--json"]).stdout
    assert '"class_names"' in planned


def test_statistics_are_computed_from_the_training_part_alone(table: Path) -> None:
    assembly: Any = prepare(config(table))
    subset = assembly.training.subset
    trained = {int(row) for row in subset.rows(np.arange(subset.n))}
    weights = np.array([float(line.split(",")[3]) for line in TEXT.splitlines()[1:]])
    mean = assembly.state.preprocessing["mean"][5]
    assert len(trained) == 72
    np.testing.assert_allclose(mean, weights[sorted(trained)].mean())
    assert abs(mean - weights.mean()) > 1e-6
