"""`stepctl plot` draws the points of metrics.jsonl, in a file, in the terminal and as JSON."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from syrupy.assertion import SnapshotAssertion

from stepctl.cli.main import cli
from stepctl.errors import ConfigError
from stepctl.reports.curves import (
    RunCurves,
    Style,
    read_curves,
    render_image,
    render_text,
    smoothed,
    whole_ticks,
)
from tests.support.messages import without_paths
from tests.support.runs import make_config, resume, rows, train

pytestmark = pytest.mark.training


MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["plot", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three segments."""
    path = tmp_path_factory.mktemp("runs") / "first"
    train(make_config(stop={"last_step": 20}, log={"every": 4}, evaluate={"every": 5}), path)
    resume(path, last_step=30)
    resume(path, last_step=40)
    return path


def test_the_points_are_the_rows_and_the_boundaries_where_segments_began(run: Path) -> None:
    (found,) = read_curves([str(run)], "accuracy")
    for points, kind in ((found.training, "train"), (found.validation, "eval")):
        assert points == [
            (row["step"], row["accuracy"]) for row in rows(run) if row["kind"] == kind
        ]
    assert [step for step, _ in found.training] == [1, *range(4, 41, 4)]
    assert [step for step, _ in found.validation] == list(range(5, 41, 5))
    assert (found.run, found.boundaries) == ("first", [20, 30])
    (plain,) = json.loads(call(run, "--metric", "accuracy", "--json").stdout)
    assert plain == json.loads(json.dumps({"metric": "accuracy", **found._asdict()}))


@pytest.mark.parametrize("kind", MAGIC)
def test_a_file_has_the_layout_that_its_name_says(kind: str, run: Path, tmp_path: Path) -> None:
    file = tmp_path / f"curves.{kind}"
    done = call(run, "-o", file)
    assert (done.exit_code, done.stdout) == (0, ""), done.output
    assert file.read_bytes().startswith(MAGIC[kind])


def test_a_picture_that_finds_no_room_leaves_the_one_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "curves.png"
    file.write_text("the one before")
    monkeypatch.setattr(os, "fsync", full)
    done = call(run, "-o", file)
    assert (done.exit_code, done.output) == (
        1,
        f"stepctl: {file}: cannot be written: No space left on device; "
        "free some space or repair the disk, then run the command again\n",
    )
    assert file.read_text() == "the one before"
    assert os.listdir(tmp_path) == [file.name]


def test_an_image_names_each_run_and_draws_each_point_and_boundary(run: Path) -> None:
    names = ["first", "_hidden", "a$\\frac$", "\x1b[31m"]
    found = [read_curves([str(run)], "loss")[0]._replace(run=name) for name in names]
    lines = shapes(render_image({"loss": found[:1]}, "svg"))
    training, validation, *boundaries = [
        each for each in lines if len(each) in (11, 8) or is_upright(each)
    ]
    assert (len(training), len(validation), len(boundaries)) == (11, 8, 2)
    left, right = (points[0][0] for points in boundaries)
    assert training[5][0] == pytest.approx(left)  # step 20
    assert validation[5][0] == pytest.approx(right)  # step 30
    image = render_image({"loss": found}, "svg")
    for name in (
        "first",
        "_hidden",
        "a$\\frac$",
        "\\x1b[31m",
        "training",
        "validation",
        "segment boundary",
    ):
        assert f"<!-- {name} -->".encode() in image


def shapes(svg: bytes) -> list[list[tuple[float, float]]]:
    """Return the points of each path that is clipped to the axes, without the grid's."""
    paths = re.findall(r'<path d="([ML\d. \n]+)" clip-path="[^"]*" style="([^"]*)"', svg.decode())
    points = [
        re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)
        for path, style in paths
        if "opacity" not in style
    ]
    return [[(float(x), float(y)) for x, y in each] for each in points]


def is_upright(points: list[tuple[float, float]]) -> bool:
    return len(points) == 2 and points[0][0] == points[1][0]


def test_the_terminal_shows_each_point_at_its_place() -> None:
    found = [
        RunCurves("low", [(0, 0.0), (100, 0.0)], [(50, 1.0)], [25]),
        RunCurves("high", [(0, 2.0), (100, 2.0)], [], []),
    ]
    text = render_text(found, "loss", width=60, height=15, color=False)
    assert re.search(r"^2\.00┤[b│]{50,}│$", text, re.M)
    assert re.search(r"^0\.00┤[a│]{50,}│$", text, re.M)
    assert len(re.findall("A", text)) == 2  # the point, and in the legend
    assert text.endswith("low  a training  A validation  │ segments from 25\nhigh  b training")
    assert "\x1b" not in text
    assert "\x1b[" in render_text(found, "loss", width=60, height=15, color=True)
    lines = text.splitlines()
    assert len(lines) == 15 + 2
    assert max(map(len, lines)) <= 60


def test_values_that_are_no_numbers_and_names_that_a_terminal_obeys_do_no_harm() -> None:
    values = [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)]
    found = [RunCurves("\x1b[2J", values, [(1, float("nan"))], []), RunCurves("empty", [], [], [])]
    for metric in ("loss", "\x1b[2J"):
        text = render_text(found, metric, width=50, height=12, color=False)
        assert text.replace("\n", "").isprintable()
        assert "\x1b[2J" not in render_text(found, metric, width=50, height=12, color=True)
        assert render_image({metric: found}, "png").startswith(MAGIC["png"])


def test_a_metric_that_no_run_has_is_refused_and_the_existing_ones_are_listed(run: Path) -> None:
    done = call(run, "--metric", "acuracy")
    assert (done.exit_code, done.stdout) == (2, "")
    assert (
        "(did you mean 'accuracy'?); there are: accuracy, epoch, learning_rate, loss, samples_per_second"
        in done.stderr
    )


def test_runs_of_one_name_are_labelled_by_their_paths(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "first"
    train(make_config(stop={"last_step": 5}), other)
    assert [each.run for each in read_curves([str(run), str(other)], "loss")] == [
        str(run),
        str(other),
    ]


def test_several_metrics_have_a_panel_each_and_the_title_is_shown(
    run: Path, tmp_path: Path
) -> None:
    options = ["--metric", "loss", "--metric", "accuracy", "--title", "a $title$", "--log-y"]
    file = tmp_path / "curves.svg"
    done = call(run, *options, "--smooth", "0.9", "-o", file)
    assert (done.exit_code, done.stderr) == (0, f"{file}: loss, accuracy of first\n")
    image = file.read_text()
    for text in ("a $title$", "loss", "accuracy", "global step"):
        assert f"<!-- {text} -->" in image
    assert "<!-- $\\mathdefault{10^{" in image
    assert "<!-- first -->" in image
    assert {each["metric"] for each in json.loads(call(run, *options, "--json").stdout)} == {
        "loss", "accuracy",
    }  # fmt: skip
    text = call(run, *options).stdout
    assert "a $title$: loss" in text
    assert "a $title$: accuracy" in text


def test_an_average_is_corrected_for_its_start_and_leaves_out_what_is_not_finite() -> None:
    curve = [(1, 4.0), (2, float("nan")), (3, 1.0), (4, 1.0)]
    found = smoothed(curve, 0.5)
    assert found == [(1, 4.0), (3, pytest.approx(2.0)), (4, pytest.approx(10 / 7))]
    assert smoothed(curve, 0.0) == [(1, 4.0), (3, 1.0), (4, 1.0)]


@pytest.mark.parametrize(
    ("first", "last", "ticks"),
    [
        (0, 3, [0, 1, 2, 3]),
        (7, 7, [7]),
        (1, 100, [20, 40, 60, 80, 100]),
        (0, 10**9, [0, 2 * 10**8, 4 * 10**8, 6 * 10**8, 8 * 10**8, 10**9]),
    ],
)
def test_ticks_are_round_whole_steps(first: int, last: int, ticks: list[int]) -> None:
    assert whole_ticks(first, last) == ticks
    found = [RunCurves("run", [(first, 1.0), (last, 2.0)], [], [])]
    text = render_text(found, "loss", width=90, height=12, color=False)
    axis = text.splitlines()[-3]
    assert [int(word) for word in axis.split()] == ticks


def test_a_logarithmic_axis_leaves_out_values_up_to_0(run: Path, tmp_path: Path) -> None:
    found = [RunCurves("run", [(1, 1.0), (2, 0.0), (3, -1.0), (4, 0.001)], [], [])]
    text = render_text(found, "loss", width=60, height=12, color=False, style=Style(log_y=True))
    assert "run  \u2824 training" in text
    assert render_image({"loss": found}, "png", Style(log_y=True)).startswith(MAGIC["png"])
    path = tmp_path / "other"
    train(make_config(stop={"last_step": 4}, log={"every": 2}), path)
    metrics = path / "metrics.jsonl"
    metrics.write_text(re.sub(r'"loss": [\d.]+', '"loss": -1.0', metrics.read_text()))
    done = call(path, "--log-y", "--json")
    assert done.stderr == "other: loss has no value above 0, so nothing is drawn\n"
    assert call(run, "--smooth", "1").exit_code == 2


MISTAKES: list[tuple[list[str], str]] = [
    (["-o", "curves.gif"], "-o curves.gif: the name must end in one of .png, .svg, .pdf"),
    (["-o", "curves"], "-o curves: the name must end in one of"),
    (["nowhere"], "nowhere: no run is there; list them with: stepctl runs"),
]


def test_a_folder_of_runs_is_told_how_to_be_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "my rates"
    for name in ("a", "b"):
        (folder / name / "checkpoints").mkdir(parents=True)
        (folder / name / "checkpoints" / "step-00000001.h5").touch()
    done = call(folder)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.endswith(f"no run is there; for the runs in it: stepctl plot '{folder}'/*\n")
    (folder / "notes.txt").touch()
    assert call(folder).stderr.endswith(f"for the runs in it: stepctl runs '{folder}'\n")


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_reported(arguments: list[str], message: str, run: Path) -> None:
    done = call(run, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize("module", ["matplotlib.figure", "plotext"])
def test_a_missing_package_is_reported_with_the_command_that_installs_it(
    module: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    options: list[Any] = ["-o", tmp_path / "x.png"] if module != "plotext" else []
    done = call(run, *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.endswith("install it with: pip install 'stepctl[plot]'\n")
    assert not (tmp_path / "x.png").exists()


def test_a_run_without_rows_has_no_metric(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    train(make_config(stop={"last_step": 0}), tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        read_curves([str(tmp_path / "run")], "loss")
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


def other_metric(folder: Path) -> Path:
    """Make a run whose rows have no loss."""
    train(make_config(stop={"last_step": 20}, evaluate={"every": 5}), folder / "other")
    path = folder / "other" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss"', '"wasserstein"'))
    return folder / "other"


def test_a_run_without_loss_is_drawn_by_its_other_metrics(tmp_path: Path) -> None:
    done = call(other_metric(tmp_path), "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)[0]["validation"]


def test_a_run_that_lacks_the_metric_is_named(run: Path, tmp_path: Path) -> None:
    done = call(run, other_metric(tmp_path), "--json")
    assert (done.exit_code, done.stderr) == (
        0,
        "other: no row has loss, so nothing is drawn\n",
    )
