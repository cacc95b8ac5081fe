"""Runs, checkpoints and metrics in a notebook: well-formed HTML with the step, the config and the curve."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

import stepctl
from stepctl.reports.curves import RunCurves
from stepctl.reports.html import curve_svg, table
from tests.support.runs import make_config, rows, silent


def parsed(html: object) -> ElementTree.Element:
    assert isinstance(html, str)
    return ElementTree.fromstring(html)


def text_of(element: ElementTree.Element) -> str:
    return " ".join(element.itertext())


SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.training
def test_a_run_its_metrics_and_its_checkpoint(tmp_path: Path) -> None:
    config = make_config(stop={"last_step": 8}, log={"every": 2}, evaluate={"every": 4})
    with stepctl.create(config.plain(), tmp_path / "a<b", say=silent) as run:
        html = parsed(run._repr_html_())
        assert "0 of 8" in text_of(html)
        assert html.find(f".//{SVG}svg") is None
        metrics = run.step(6)
        assert metrics is not None
        shown = parsed(metrics._repr_html_())  # type: ignore[attr-defined]
        assert [cell.text for cell in shown.iter("th")] == list(metrics)
        assert f"{metrics['loss']:.6g}" in text_of(shown)
        html = parsed(run._repr_html_())
        assert "6 of 8" in text_of(html)
        assert "batch_size: " in text_of(html)
        assert "a<b" in text_of(html)
        line = html.find(f".//{SVG}polyline")
        assert line is not None
        n_rows = len([row for row in rows(run.path) if row["kind"] == "train"])
        assert len(line.attrib["points"].split()) == n_rows
        assert len([*html.iter(f"{SVG}circle")]) == 1
        evaluated = parsed(run.evaluate()._repr_html_())  # type: ignore[attr-defined]
        assert "accuracy" in text_of(evaluated)
        run.train()
        assert "last_step 8" in text_of(parsed(run._repr_html_()))
    assert "closed" in text_of(parsed(run._repr_html_()))
    checkpoint = parsed(stepctl.load_checkpoint(run.path)._repr_html_())
    assert "Checkpoint of global step 8" in text_of(checkpoint)
    assert "params/dense0/weight" in text_of(checkpoint)
    assert "batch_size: " in text_of(checkpoint)


def points_of(svg: str) -> list[tuple[float, float]]:
    (line,) = parsed(svg).iter(f"{SVG}polyline")
    pairs = [point.split(",") for point in line.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_a_curve_fills_its_frame() -> None:
    curve = [(0, 1.0), (5, math.nan), (10, 3.0), (20, 2.0)]
    svg = curve_svg(RunCurves("run", curve, [(20, 2.0)], [10, 99]), "<loss>")
    assert points_of(svg) == [(60, 160), (260, 10), (460, 85)]
    root = parsed(svg)
    assert [each.attrib["x1"] for each in root.iter(f"{SVG}line")] == ["260.0"]
    labels = [each.text for each in root.iter(f"{SVG}text")]
    assert labels == ["3", "1", "0", "20", "<loss>, global step"]


def test_a_long_curve_is_thinned_and_a_constant_or_huge_one_is_drawn() -> None:
    long = points_of(
        curve_svg(RunCurves("run", [(n, float(n)) for n in range(12345)], [], []), "m")
    )
    assert len(long) <= 402
    assert long[-1] == (460, 10)
    assert points_of(curve_svg(RunCurves("run", [(1, 2.0), (2, 2.0)], [], []), "m")) == [
        (60, 85),
        (460, 85),
    ]
    huge = [(1, -1.7e308), (2, 1.7e308)]
    assert points_of(curve_svg(RunCurves("run", huge, [], []), "m")) == [(60, 160), (460, 10)]
    assert curve_svg(RunCurves("run", [(1, math.inf)], [], []), "m") == ""


def test_names_are_escaped() -> None:
    assert parsed(table([("<script>", "a & b")])).find(".//script") is None
