"""Repeating the steps of a script between two checkpoints, on a copy, to compare the results."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepctl.errors import ConfigError, StepctlError
from stepctl.reports import diff
from stepctl.reports.replay import compare_replayed
from stepctl.rundir import series
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.series import RecordType, series_folder
from stepctl.runs.at_step import open_at_step, read_run
from stepctl.runs.fork import copy_at
from stepctl.runs.loop import REPLAY_VARIABLE
from stepctl.runs.messages import Say
from stepctl.runs.records import RunRecords, is_script, read_records
from stepctl.state.arena import Array
from stepctl.system import shell
from stepctl.training.build import assemble

_STDERR = 2


def replay_script(
    records: RunRecords, first: int, last: int, command: Sequence[str], say: Say
) -> diff.Replayed:
    """Yield each saved step after `first`, up to `last`, with the differences from its checkpoint.

    The command, which starts the script, continues a copy of the checkpoint of `first` and is ended
    at `last`; the run is only read. StepctlError if the script fails, or makes no step of the run.
    """
    directory = records.directory
    if not is_script(records):
        raise ConfigError(
            f"{directory.path}: its config makes its steps, so a replay needs no command; leave it out"
        )
    run = read_run(records)
    run.store.open(last).close()  # an unusable one is refused before the training
    with tempfile.TemporaryDirectory(prefix="stepctl-replay-") as folder:
        copy = RunDirectory(Path(folder) / directory.name)
        copy_at(run, copy, first)
        replay = {
            "run": os.path.realpath(directory.folder.path),
            "directory": str(copy.folder.path),
            "last_step": last,
        }
        environment = {**os.environ, REPLAY_VARIABLE: json.dumps(replay)}
        _run(command, environment)
        repeated = read_run(read_records(copy))
        steps = set(repeated.store.steps())
        if last not in steps:
            raise StepctlError(
                f"{directory.path}: the command made no step up to {last}; it must call stepctl.loop "
                "with this run directory"
            )
        copied = series_folder(copy)

        def copied_rows(name: str, kind: RecordType) -> Array:
            if name not in series.names(copied):
                return np.empty(0, kind.record)
            return series.read(copied, name)

        for step in sorted(steps & {*run.store.steps()}):
            if step == first:
                continue
            at = open_at_step(
                repeated,
                lambda step: assemble(repeated.config),
                step=step,
                say=say,
                may_differ=(),
            )
            with run.store.open(step) as reader:
                differences = compare_replayed(reader, at.assembly.state)
            differences += diff.compare_series(
                series_folder(directory), copied_rows, series.names(copied), after=first, last=step
            )
            yield step, differences


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run the command; its output goes to stderr."""
    words = shell.options(*command)
    try:
        status = subprocess.run(command, env=environment, stdout=_STDERR, check=False).returncode
    except OSError as error:
        raise ConfigError(f"{words}: cannot be started: {error.strerror}") from error
    if status != 0:
        raise StepctlError(f"{words}: exited with {status}, so the replay is incomplete")
