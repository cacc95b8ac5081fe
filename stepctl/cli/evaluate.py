"""`stepctl evaluate`: the metrics of a trained model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from stepctl.cli.model_options import model_options, select
from stepctl.cli.options import json_option
from stepctl.cli.output import echo, echo_json
from stepctl.errors import printable
from stepctl.system.shell import options
from stepctl.system.terminal import say
from stepctl.system.text import align_columns

if TYPE_CHECKING:
    from stepctl.inference.evaluate import ClassScores, Evaluation


@click.command(context_settings={"allow_extra_args": True})  # for a message that helps
@model_options
@click.option(
    "--data",
    multiple=True,
    metavar="KEY=VALUE",
    help="Evaluate on other data: set a key of the data section, such as path=test.csv.",
)
@json_option("the metrics, the scores of each class and the confusion matrix")
@click.option(
    "-v", "--verbose", is_flag=True, help="Also show the scores of each class and the confusions."
)
def evaluate(
    run: str,
    step: int | None,
    best: bool,
    average: bool,
    imports: tuple[str, ...],
    data: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    """Evaluate a trained model.

    RUN is a run, or a checkpoint file. The metrics are those of its validation part, with the same
    bits as in metrics.jsonl, or of other data of the same kind. With --data, the config's files are
    not used: all rows of the named file count, or its validation part if it brings one.
    """
    extra = click.get_current_context().args
    if extra:
        words = " ".join(extra)
        raise click.UsageError(f"Got unexpected extra argument ({words}); {_remedy(extra[0])}")
    selection = select(run, step=step, best=best, average=average, imports=imports)
    from stepctl.inference.evaluate import evaluate as evaluate_run
    from stepctl.writers.jsonl import json_value

    found = evaluate_run(run, selection, data, say)
    if as_json:
        metrics = {name: json_value(value) for name, value in found["metrics"].items()}
        echo_json({**found, "metrics": metrics})
        return
    echo(printable(f"{run}: global step {found['step']}, {found['split']}"))
    rows = [[name, f"{value:.4g}"] for name, value in found["metrics"].items()]
    for line in align_columns(rows, left=(0,)):
        echo(line)
    if verbose and "per_class" in found:
        _print_classes(found)


def _remedy(word: str) -> str:
    """Return the hint for an unexpected argument, which is probably a data file."""
    if os.path.isdir(word):
        return "give one run"
    setting = word if "=" in word else f"path={word}"
    return f"to evaluate on other data: {options('--data', setting)}"


def _print_classes(found: Evaluation) -> None:
    echo()
    rows = [["class", "precision", "recall", "f1", "support"]]
    for name, scores in found["per_class"].items():
        rows.append([printable(name), *_cells(scores)])
    for line in align_columns(rows, left=(0,)):
        echo(line)
    echo("\nconfusion (rows: class, columns: prediction)")
    names = [printable(name) for name in found["class_names"]]
    counts = [[*map(str, row)] for row in found["confusion"]]
    table = [["", *names], *([name, *row] for name, row in zip(names, counts, strict=True))]
    for line in align_columns(table, left=(0,)):
        echo(line)


def _cells(scores: ClassScores) -> list[str]:
    shares = [scores["precision"], scores["recall"], scores["f1"]]
    cells = ["-" if share is None else f"{share:.4f}" for share in shares]
    return [*cells, str(scores["support"])]
