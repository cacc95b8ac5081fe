"""`stepctl push`: mirror a run that no process trains."""

import click

from stepctl.cli.options import json_option, take_over_option
from stepctl.cli.output import echo_json
from stepctl.cli.parameter_types import Place, StoreURL
from stepctl.system.terminal import say


@click.command()
@click.argument("run_dir", type=Place(folder=True, run=True), metavar="RUN")
@click.argument("url", type=StoreURL(), metavar="URL")
@take_over_option
@click.option(
    "--all",
    "upload_all",
    is_flag=True,
    help="Upload all objects again, even those in the mirror; for use after verify has found damage.",
)
@json_option("the step")
def push(run_dir: str, url: str, take_over: bool, upload_all: bool, as_json: bool) -> None:
    """Mirror a run that no process trains.

    The newest good checkpoint of RUN, with config, ledger, metrics and series, is uploaded to URL,
    as far as it is not there. The config is not changed: give `--mirror URL` to train or resume.
    """
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.push import push as push_run

    pushed = push_run(RunDirectory(run_dir), url, say, take_over=take_over, upload_all=upload_all)
    if as_json:
        echo_json({"run": run_dir, "step": pushed.step, "url": url})
    say(f"{run_dir}: global step {pushed.step} is in {url}")
