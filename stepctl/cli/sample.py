"""`stepctl sample`: samples of a generative model."""

from __future__ import annotations

import click

from stepctl.cli.model_options import model_options, select
from stepctl.cli.options import json_option
from stepctl.cli.output import echo_json
from stepctl.cli.parameter_types import Place, WholeNumber
from stepctl.system.terminal import say
from stepctl.system.text import counted


@click.command()
@model_options
@click.option(
    "-n",
    "number",
    type=WholeNumber(min=1),
    default=64,
    metavar="N",
    show_default=True,
    help="Number of samples.",
)
@click.option(
    "--seed",
    type=WholeNumber(),
    metavar="N",
    help="Seed of the noise (default: the run's).",
)
@click.option(
    "-o",
    "--output",
    type=Place(),
    required=True,
    metavar="OUT",
    help="The .npz file to write, with the array x. It is replaced.",
)
@json_option("the step and the shape of the samples")
def sample(
    run: str,
    step: int | None,
    best: bool,
    average: bool,
    imports: tuple[str, ...],
    number: int,
    seed: int | None,
    output: str,
    as_json: bool,
) -> None:
    """Generate samples.

    RUN is a run of a generative task (wgan), or a checkpoint file of one. The samples depend on the
    weights and the seed alone.
    """
    from stepctl.inference.output_file import check_output

    check_output(output, (".npz",), inputs=(run,))
    selection = select(run, step=step, best=best, average=average, imports=imports)
    from stepctl.inference.load import load_model
    from stepctl.inference.output_file import new_file, write_arrays

    model = load_model(run, selection, say)
    samples = model.sample(number, seed=seed)
    with new_file(output) as file:
        write_arrays(file, {"x": samples})
    if as_json:
        shape = [*samples.shape]
        echo_json({"step": model.global_step, "output": output, "shape": shape})
    else:
        say(f"{output}: {counted(number, 'sample')} of global step {model.global_step}")
