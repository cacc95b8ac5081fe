"""`stepctl predict`: predictions for the rows of a file."""

from __future__ import annotations

import sys

import click

from stepctl.cli.model_options import model_options, select
from stepctl.cli.options import json_option
from stepctl.cli.output import echo_json
from stepctl.cli.parameter_types import Place
from stepctl.cli.progress import progress_bar
from stepctl.system.terminal import say
from stepctl.system.text import counted

_STDOUT = "-"
_FORMATS = (".csv", ".npz")


@click.command()
@model_options
@click.argument("input_file", metavar="INPUT", type=Place())
@click.option(
    "-o",
    "--output",
    type=Place(),
    required=True,
    metavar="OUT",
    help="The file to write: .csv, .npz, or - for CSV on standard output. It is replaced.",
)
@json_option("the step and the number of rows")
def predict(
    run: str,
    step: int | None,
    best: bool,
    average: bool,
    imports: tuple[str, ...],
    input_file: str,
    output: str,
    as_json: bool,
) -> None:
    """Predict the rows of a file.

    RUN is a run, or a checkpoint file. INPUT is .csv, .npz (its array x, or x_test) or .npy, and may
    be larger than memory; the target column may be missing. Each row gives one row of OUT, in the
    same order: `prediction`, the class or the value, and `probability_<class>` of each class.
    """
    if output == _STDOUT and as_json:
        raise click.UsageError("--json prints to standard output, as -o - does: give one")
    if output != _STDOUT:
        from stepctl.inference.output_file import check_output

        extension = check_output(output, _FORMATS, inputs=(input_file, run))
    selection = select(run, step=step, best=best, average=average, imports=imports)
    from stepctl.inference.load import load_model
    from stepctl.inference.output_file import new_file
    from stepctl.inference.predict import predict_to_csv, predict_to_npz

    model = load_model(run, selection, say)
    with progress_bar("predict") as report:
        if output == _STDOUT:
            predict_to_csv(model, input_file, sys.stdout.buffer, report)
            return
        if extension == ".npz":
            n_rows = predict_to_npz(model, input_file, output, report)
        else:
            with new_file(output) as file:
                n_rows = predict_to_csv(model, input_file, file, report)
    if as_json:
        echo_json({"step": model.global_step, "rows": n_rows, "output": output})
    else:
        say(f"{output}: {counted(n_rows, 'row')} predicted at global step {model.global_step}")
