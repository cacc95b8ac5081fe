"""The records of a run, read once per command.

They decide the number of BLAS threads, so NumPy is not imported here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from stepctl.config.yaml import Document
from stepctl.errors import ConfigError
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger
from stepctl.runs.messages import Say
from stepctl.system import shell


class RunRecords(NamedTuple):
    """The ledger of a run, and its newest config, which is not checked yet."""

    directory: RunDirectory
    ledger: Ledger
    document: Document


def read_records(directory: RunDirectory) -> RunRecords:
    """Read the records; ConfigError if there is no run."""
    ledger = directory.read_ledger()
    return RunRecords(directory, ledger, directory.newest_config(ledger))


@contextlib.contextmanager
def lock_records(directory: RunDirectory, say: Say) -> Iterator[RunRecords]:
    """Lock a run, remove the temporary files of a killed process, and read the records."""
    directory.refuse_missing_run()
    with directory.lock(say):
        directory.remove_temporary_files()
        ledger = directory.repair_ledger(say)
        yield RunRecords(directory, ledger, directory.newest_config(ledger))


def is_script(records: RunRecords) -> bool:
    """Tell whether a script makes the steps of a run."""
    plain = records.document.value
    return isinstance(plain, dict) and "script" in plain


def script_command(records: RunRecords) -> str | None:
    """Return the command line of the newest segment of a script's run, if it is known."""
    starts = records.ledger.starts
    argv = starts[-1].get("argv") if starts else None
    if not isinstance(argv, list) or records.document.value["script"] == "notebook":
        return None
    return shell.options(*argv)


def refuse_script(records: RunRecords) -> None:
    """Raise ConfigError, with the command line, if a script makes the steps of a run."""
    if not is_script(records):
        return
    command = script_command(records)
    script = records.document.value["script"]
    how = f"run {script} again, with {records.directory.path} as its run directory"
    if command is not None:
        how = f"continue it with: {command}"
    raise ConfigError(f"{records.directory.path}: its steps are made by a script; {how}")
