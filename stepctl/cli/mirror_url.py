"""The URL of a mirror in the place of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from stepctl.errors import ConfigError
from stepctl.system import store_url
from stepctl.system.terminal import say

if TYPE_CHECKING:
    from stepctl.mirror.claimed import ClaimedMirror
    from stepctl.rundir.directory import RunDirectory


def check_url(url: str) -> str:
    """Return the URL of a mirror; ConfigError if it is wrong."""
    problem = store_url.problem(url)
    if problem is not None:
        raise ConfigError(f"the URL of the mirror {problem}")
    return url


def place_of(url: str, mirror: str | None, run_dir: str | None) -> tuple[str, str]:
    """Return the checked URL and the directory of its run; UsageError if --mirror is another."""
    url = check_url(url)
    if mirror not in (None, url):
        raise click.UsageError(f"two mirrors: {url} and --mirror {mirror}; give one")
    return url, run_dir or os.path.join("runs", store_url.last_name(url))


@contextlib.contextmanager
def fetched_run(
    url: str, directory: RunDirectory, step: int | None, *, take_over: bool
) -> Iterator[ClaimedMirror | None]:
    """Fetch the run of a mirror, and own the mirror; do nothing if the directory holds the run.

    ConfigError if the mirror holds no run.
    """
    if directory.holds_run():
        yield None
        return
    from stepctl.mirror.claimed import pulled_run
    from stepctl.mirror.fetch import no_run

    with pulled_run(url, directory, say, take_over=take_over, step=step) as claimed:
        if claimed is None:
            raise no_run(url)
        yield claimed
