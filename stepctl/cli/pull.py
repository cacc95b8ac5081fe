"""`stepctl pull`: fetch a run from its mirror."""

import click

from stepctl.cli.mirror_url import place_of
from stepctl.cli.options import json_option
from stepctl.cli.output import echo_json
from stepctl.cli.parameter_types import Place, StoreURL
from stepctl.system.shell import command
from stepctl.system.terminal import say


@click.command()
@click.argument("url", type=StoreURL(), metavar="URL")
@click.argument("run_dir", type=Place(folder=True), metavar="[DIR]", required=False)
@json_option("the directory and the step")
def pull(url: str, run_dir: str | None, as_json: bool) -> None:
    """Fetch a run from its mirror.

    The newest checkpoint of URL, with the run's config, ledger, metrics and series, is written to
    the new directory DIR (default: runs/<last part of the URL>). The mirror is not changed. Continue
    with `stepctl resume DIR`, which owns the mirror from then on.
    """
    from stepctl.mirror import fetch
    from stepctl.mirror.store import open_store
    from stepctl.rundir.directory import RunDirectory

    _, place = place_of(url, None, run_dir)
    directory = RunDirectory(place)
    directory.refuse_run()
    directory.refuse_foreign_files()
    fetched = fetch.pull_newest(open_store(url), directory, say)
    if fetched is None:
        raise fetch.no_run(url)
    if as_json:
        echo_json({"run": place, "step": fetched.step, "url": url})
    resume = command("resume", place)
    say(f"{place}: global step {fetched.step}, from {url}; continue with: {resume}")
