"""`stepctl export`: the weights of a trained model in a file for other programs."""

from __future__ import annotations

import click

from stepctl.cli.model_options import model_options, select
from stepctl.cli.options import json_option
from stepctl.cli.output import echo_json
from stepctl.cli.parameter_types import Place
from stepctl.system.terminal import say
from stepctl.system.text import counted


@click.command()
@model_options
@click.option(
    "-o",
    "--output",
    type=Place(),
    required=True,
    metavar="OUT",
    help="The file to write: .npz, .safetensors or .onnx. It is replaced.",
)
@json_option("the step and the names of the arrays")
def export(
    run: str,
    step: int | None,
    best: bool,
    average: bool,
    imports: tuple[str, ...],
    output: str,
    as_json: bool,
) -> None:
    """Export the weights of a trained model.

    RUN is a run, or a checkpoint file. An .npz or .safetensors file has the arrays by their path,
    such as dense0/weight, and as metadata the config, the names of the classes, the preprocessing
    and the layers. An .onnx file is the whole model, from raw samples to predictions.
    """
    selection = select(run, step=step, best=best, average=average, imports=imports)
    from stepctl.inference.export import export_model
    from stepctl.inference.load import load_model

    model = load_model(run, selection, say)
    arrays = export_model(model, output)
    if as_json:
        echo_json({"step": model.global_step, "output": output, "arrays": arrays})
    else:
        say(f"{output}: {counted(len(arrays), 'array')} of global step {model.global_step}")
