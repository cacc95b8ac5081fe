"""Runs, checkpoints and metrics as HTML, for the output cells of notebooks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from stepctl.config import yaml
from stepctl.errors import StepctlError
from stepctl.reports.curves import Curve, RunCurves, default_metric, read_curves
from stepctl.system.text import config_text

_WIDTH = 460  # of a picture, in pixels
_HEIGHT = 180
_LEFT = 60  # margins, which have the labels
_BOTTOM = 20
_TOP = 10
_MAX_POINTS = 400  # of a line
_MAX_ARRAYS = 50  # rows of a table


def run_html(path: str, title: str, facts: Mapping[str, object], config: dict[str, Any]) -> str:
    """Return a run: its facts, the curve of its main metric, and its config, folded."""
    return _block(title, table(facts.items()), _main_curve(path), _folded_config(config))


def checkpoint_html(
    title: str,
    facts: Mapping[str, object],
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    config: dict[str, Any],
) -> str:
    """Return a checkpoint: its facts, the (shape, dtype) of its arrays, and its config, folded."""
    rows = [(path, f"{shape} {dtype}") for path, (shape, dtype) in arrays.items()]
    listed = table(rows[:_MAX_ARRAYS])
    if len(rows) > _MAX_ARRAYS:
        listed += f"<p>... and {len(rows) - _MAX_ARRAYS} more</p>"
    n_arrays = _folded(f"{len(rows)} arrays", listed)
    return _block(title, table(facts.items()), n_arrays, _folded_config(config))


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Return names and values, one pair a row; floats have 6 digits."""
    cells = [
        f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>" for name, value in rows
    ]
    return f"<table>{''.join(cells)}</table>"


def curve_svg(curves: RunCurves, metric: str) -> str:
    """Return a picture of a metric over the global step: a line for training, dots for evaluations."""
    training = _finite(curves.training)
    validation = _finite(curves.validation)
    points = [*training, *validation]
    if not points:
        return ""
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    frame = _Frame((min(steps), max(steps)), (min(values), max(values)))
    shapes = [
        f'<line x1="{frame.x(step)}" x2="{frame.x(step)}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" '
        'stroke="currentColor" stroke-opacity="0.3" stroke-dasharray="2 3"/>'
        for step in curves.boundaries
        if frame.steps[0] <= step <= frame.steps[1]
    ]
    if training:
        line = " ".join(f"{frame.x(step)},{frame.y(value)}" for step, value in _thinned(training))
        shapes.append(
            f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>'
        )
    shapes += [
        f'<circle cx="{frame.x(step)}" cy="{frame.y(value)}" r="2.5" fill="#ff7f0e"/>'
        for step, value in _thinned(validation)
    ]
    labels = [
        _label(0, _TOP + 8, f"{frame.values[1]:.4g}"),
        _label(0, _HEIGHT - _BOTTOM, f"{frame.values[0]:.4g}"),
        _label(_LEFT, _HEIGHT - 4, str(frame.steps[0])),
        _label(_WIDTH, _HEIGHT - 4, str(frame.steps[1]), anchor="end"),
        _label((_LEFT + _WIDTH) // 2, _HEIGHT - 4, f"{metric}, global step", anchor="middle"),
    ]
    axes = (
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH}" fill="none" '
        'stroke="currentColor" stroke-opacity="0.5"/>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + 6}" height="{_HEIGHT}" '
        f'style="color: inherit">{axes}{"".join(shapes)}{"".join(labels)}</svg>'
    )


class _Frame:
    """The scales of a picture: from steps and values to pixels."""

    def __init__(self, steps: tuple[int, int], values: tuple[float, float]) -> None:
        self.steps = steps
        self.values = values

    def x(self, step: int) -> float:
        first, last = self.steps
        part = (step - first) / max(last - first, 1)
        return round(_LEFT + part * (_WIDTH - _LEFT), 1)

    def y(self, value: float) -> float:
        lowest, highest = self.values
        part = 0.5
        if highest > lowest:
            part = (value / 2 - lowest / 2) / (highest / 2 - lowest / 2)  # without an overflow
        return round(_HEIGHT - _BOTTOM - part * (_HEIGHT - _BOTTOM - _TOP), 1)


def _main_curve(path: str) -> str:
    try:
        metric = default_metric([path])
        (curves,) = read_curves([path], metric)
    except (StepctlError, OSError):  # there are no rows yet
        return ""
    return curve_svg(curves, metric)


def _finite(curve: Curve) -> Curve:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _thinned(curve: Curve) -> Sequence[tuple[int, float]]:
    """Return at most about 400 points, evenly chosen, with the last one."""
    stride = -(-len(curve) // _MAX_POINTS) or 1
    return [*curve[:-1:stride], *curve[-1:]]


def _label(x: int, y: int, text: str, *, anchor: str = "start") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" '
        f'fill="currentColor">{escape(text)}</text>'
    )


def _block(title: str, *parts: str) -> str:
    return f"<div><p><b>{escape(title)}</b></p>{''.join(parts)}</div>"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _folded_config(config: dict[str, Any]) -> str:
    return _folded("config", f"<pre>{escape(yaml.dumps(config))}</pre>")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else config_text(value)
