"""The arguments and options of the commands that use a trained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stepctl.cli.options import refuse_missing
from stepctl.cli.parameter_types import Place, WholeNumber
from stepctl.system import files

if TYPE_CHECKING:
    from stepctl.inference.load import Selection

F = TypeVar("F", bound=Callable[..., Any])


def model_options(function: F) -> F:
    """Add the argument RUN and the options that select its weights."""
    imports = click.option(
        "--import",
        "imports",
        multiple=True,
        metavar="NAME",
        help="Allow a checkpoint file to name this class or function of yours (module:Name).",
    )
    average = click.option(
        "--ema", "average", is_flag=True, help="Use the moving average of the weights."
    )
    best = click.option(
        "--best", is_flag=True, help="Use the best checkpoint that checkpoint.keep_best keeps."
    )
    step = click.option(
        "--step",
        type=WholeNumber(),
        metavar="N",
        help="Use the checkpoint of this step (default: the newest good one).",
    )
    run = click.argument("run", metavar="RUN", type=Place(run=True))
    return run(step(best(average(imports(function)))))


def select(
    run: str, *, step: int | None, best: bool, average: bool, imports: tuple[str, ...]
) -> Selection:
    """Load NumPy with a run's threads and kernel, and return the selection.

    ConfigError if there is no such run or file.
    """
    from stepctl.system import blas

    refuse_missing(run)
    if best and step is not None:
        raise click.UsageError("--best and --step: give one")
    if files.is_directory(run):
        from stepctl.rundir.directory import RunDirectory

        document = RunDirectory(run).newest_config()
        blas.set_environment(*blas.requested_numerics(document.value))
    blas.load_numpy()
    from stepctl.inference.load import Selection

    return Selection(step=step, best=best, average=average, imports=imports)
