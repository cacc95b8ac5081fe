"""`stepctl init`: the configs that it writes train as they are, and it overwrites nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import parse_config
from stepctl.runs.starter import EXAMPLES
from tests.support.messages import normalize

ROOT = Path(stepctl.__file__).parents[1]
TEMPLATES = ROOT / "stepctl" / "config" / "examples"
NEED_OTHER_FILES = {
    "fashion-mnist.yaml",
    "kmeans.yaml",
    "kmeans.py",
}  # data of Debian, of the clone

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def call(*arguments: object, expect: int = 0) -> str:
    """Run a command in this process; return its messages."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exit_code == expect, result.output
    return result.stdout if "--json" in arguments else result.stderr


def data_of(config: str) -> dict[str, Any]:
    """Return the data section of a config."""
    section: dict[str, Any] = yaml.load(config).value["data"]
    return section


def write_table(name: str, header: str, rows: Sequence[Sequence[object]]) -> None:
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    Path(name).write_text("\n".join(lines) + "\n")


def numbers(n: int, *, seed: int = 0) -> list[float]:
    return [*np.random.default_rng(seed).normal(size=n).round(3).tolist()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_valid_config(name: str) -> None:
    message = call("init", "--example", name)
    assert message.endswith(f"train it with: stepctl train configs/{name}.yaml\n")
    parse_config(yaml.load(f"configs/{name}.yaml"), unchecked=("program",))


def test_examples_are_the_configs_of_the_repository() -> None:
    templates = {path.name: path.read_bytes() for path in TEMPLATES.iterdir() if path.is_file()}
    configs = {
        path.name: path.read_bytes()
        for path in (ROOT / "configs").iterdir()
        if path.suffix in (".yaml", ".py") and path.name not in NEED_OTHER_FILES
    }
    assert templates == configs
    assert {file for files in EXAMPLES.values() for file in files} == {*configs}


@pytest.mark.training
def test_without_an_option_it_learns_the_digits() -> None:
    call("init", "new", "--json")
    text = Path("new/config.yaml").read_text()
    assert text.startswith("# stepctl train config.yaml\n")
    config = parse_config(yaml.load("new/config.yaml"))
    with stepctl.create(config.plain(), "run", say=lambda line: None) as run:
        run.step()
        assert run.evaluate()["loss"] > 0


@pytest.mark.training
def test_a_table_of_words(snapshot: SnapshotAssertion) -> None:
    widths: list[object] = [*numbers(60)]
    widths[7] = ""
    rows = [
        [number + 1, width, ["red", "blue"][number % 2], "2024-01-31", "x", f"kind {number % 3}"]
        for number, width in enumerate(widths)
    ]
    write_table("flowers.csv", "id,width,color,day,same,kind", rows)
    message = call("init", "--from", "flowers.csv")
    assert normalize(message) == snapshot(name="message")
    assert Path("flowers.yaml").read_text() == snapshot(name="config")
    assert json.loads(call("init", "d", "--from", "flowers.csv", "--json")) == {
        "config": "d/flowers.yaml",
        "files": ["d/flowers.yaml"],
    }
    assert data_of("d/flowers.yaml")["path"] == str(Path("flowers.csv").resolve())
    config = parse_config(yaml.load("flowers.yaml"))
    with stepctl.create(config.plain(), "run", say=lambda line: None) as run:
        run.step()
        assert {*run.evaluate()} == {"loss", "accuracy"}
    model = stepctl.load_model("run")
    assert model.class_names == ["kind 0", "kind 1", "kind 2"]
    assert model.inputs.columns == ["width", "color"]


@pytest.mark.parametrize(
    ("header", "targets", "expected"),
    [
        ("x,price", [number / 7 for number in range(60)], ("price", "regression")),
        ("x,grade", [number % 4 for number in range(60)], ("grade", "classification")),
        ("Label,x", [number % 4 for number in range(60)], ("Label", "regression")),
        ("x,many", [number * number for number in range(60)], ("many", "regression")),
        ("x,word", [f"w{number % 2}" for number in range(60)], ("word", "classification")),
    ],
)
def test_the_proposed_target_and_task(
    header: str, targets: list[object], expected: tuple[str, str]
) -> None:
    write_table("t.csv", header, [*zip(numbers(60), targets, strict=True)])
    call("init", "--from", "t.csv")
    plain = yaml.load("t.yaml").value
    assert (plain["data"]["target"], plain["task"]["name"]) == expected
    parse_config(yaml.load("t.yaml"))


@pytest.mark.training
def test_labels_that_do_not_count_from_zero_are_names() -> None:
    write_table(
        "t.csv", "x,grade", [*zip(numbers(40), [3 + i % 3 for i in range(40)], strict=True)]
    )
    call("init", "--from", "t.csv")
    assert data_of("t.yaml")["categorical"] == ["grade"]
    config = parse_config(yaml.load("t.yaml")).plain()
    with stepctl.create(config, "run", say=lambda line: None) as run:
        assert set(run.predict([[0.5], [1.5]])) <= {"3", "4", "5"}


def test_a_target_with_missing_values_drops_their_rows() -> None:
    words = [["a", "b", ""][number % 3] for number in range(60)]
    write_table("t.csv", "x,kind", [*zip(numbers(60), words, strict=True)])
    call("init", "--from", "t.csv")
    section = data_of("t.yaml")
    assert section["missing"] == "drop"
    assert section["stratify"] is True


def test_a_file_without_a_header() -> None:
    columns = zip(numbers(30), numbers(30, seed=1), ["a", "b"] * 15, strict=True)
    write_table("t.csv", "1.5,2.5,a", [*columns])
    call("init", "--from", "t.csv")
    assert data_of("t.yaml")["target"] == 2
    parse_config(yaml.load("t.yaml"))


def test_the_number_of_the_row_is_no_target() -> None:
    columns = zip(numbers(30), numbers(30, seed=1), range(100, 130), strict=True)
    write_table("t.csv", "x,y2,count", [*columns])
    call("init", "--from", "t.csv")
    assert data_of("t.yaml")["target"] == "y2"
    assert data_of("t.yaml")["exclude"] == ["count"]


# --- bad input


def test_nothing_is_overwritten() -> None:
    Path("configs").mkdir()
    Path("configs/ising.py").write_text("mine")
    message = call("init", "--example", "ising", expect=2)
    assert message == (
        "stepctl: configs/ising.py: exists, and is never overwritten; choose another folder\n"
    )
    assert [*Path().rglob("*.*")] == [Path("configs/ising.py")]
    assert Path("configs/ising.py").read_text() == "mine"


def test_bad_input(snapshot: SnapshotAssertion) -> None:
    write_table("short.csv", "x,y", [[1.5, 2], [3, 4]])
    write_table("constant.csv", "x,y", [[1, 2]] * 30)
    write_table("days.csv", "day,y", [[f"2024-01-{i:02}", i % 2] for i in range(1, 31)])
    Path("binary.csv").write_bytes(b"\xff\xfe\0\0")
    Path("file").write_text("")
    tries: list[list[object]] = [
        ["--from", "missing.csv"],
        ["--from", "short.csv"],
        ["--from", "constant.csv"],
        ["--from", "days.csv"],
        ["--from", "binary.csv"],
        ["--example", "quikstart"],
        ["--example", "digits", "--from", "days.csv"],
    ]
    before = sorted(Path().rglob("*"))
    found = [normalize(call("init", *arguments, expect=2)) for arguments in tries]
    assert found == snapshot
    assert sorted(Path().rglob("*")) == before
    assert "cannot be written" in call("init", "file", expect=1)
