"""The run directory: paths, lock, config, and the repairs when a run continues."""

import contextlib
import datetime
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepctl.config import yaml
from stepctl.errors import ConfigError, RunExistsError
from stepctl.rundir import json_lines, mirror_status
from stepctl.rundir.json_lines import JSONRow, Tail
from stepctl.rundir.ledger import MAX_STEP, Ledger
from stepctl.rundir.lock import N_BYTES, Holder, Lock
from stepctl.system import files
from stepctl.system.files import write_errors
from stepctl.system.folder import TEMPORARY, Folder
from stepctl.system.shell import command

# Files that may lie in a run directory beside the run's: hidden ones, logs, files set aside.
_TOLERATED = re.compile(
    r"\..*|lost\+found|(.*\.)?(log|logs|out|err|stdout|stderr)(\.txt|\.gz|\.[0-9]+)?|.*\.aside-[0-9]+"
)
_MAX_URL = 1024  # bytes
_CONFIG_HEADER = (
    "# The resolved config, frozen when the run started; later changes are in ledger.jsonl.\n"
)


class RunDirectory:
    """The files of one run. Writing requires `lock()`: `folder` is then held by a descriptor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)  # as the user gave it, for messages
        try:
            root = self.path.absolute()  # now: user code may change the working directory
        except OSError as error:
            raise ConfigError(
                f"{path}: the working directory no longer exists ({error.strerror}); "
                "cd to an existing one"
            ) from error
        self.config = root / "config.yaml"
        self.ledger = root / "ledger.jsonl"
        self.metrics = root / "metrics.jsonl"
        self.csv = root / "metrics.csv"
        self.tensorboard = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.samples = root / "samples"
        self.series = root / "series"
        self.mirror = root / mirror_status.NAME
        self.pull = root / "pull-unfinished"  # holds the URL while the files are fetched
        self.stop = root / "STOP"  # created by the user to stop the run
        self.folder = Folder(root, self.path)
        self._ledger_lock = threading.Lock()  # background threads append too

    @property
    def name(self) -> str:
        """The name of the run: the directory's."""
        return self.folder.path.resolve().name

    @property
    def checkpoint_folder(self) -> Folder:
        """The folder of the checkpoints, held while the run is locked."""
        return self.folder.subfolder(self.checkpoints.name)

    def display_path(self, path: Path) -> Path:
        """Return the path of a file of the run as messages show it."""
        return self.path / path.name

    # --- creating

    def holds_run(self, ledger: Ledger | None = None) -> bool:
        """Tell whether a run published a checkpoint here, even if it is missing now.

        What an unfinished pull has fetched is no run. The ledger is read if it is not given.
        UnreadableError if the files cannot be read now.
        """
        if files.exists(self.pull):
            return False
        if ledger is None:
            ledger = self.read_ledger()
        if ledger.acknowledged:
            return True
        try:
            return any(name.startswith("step-") for name in self.checkpoint_folder.names())
        except NotADirectoryError:
            return False

    def refuse_run(self) -> None:
        """Raise RunExistsError if the directory holds a run."""
        if self.holds_run():
            raise RunExistsError(
                f"{self.path}: already contains a run; continue with: {command('resume', self.path)}"
            )

    def refuse_foreign_files(self) -> None:
        """Raise ConfigError if the directory holds files that stepctl did not write."""
        try:
            names = sorted(self.folder.names())
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be used as a run directory: {error.strerror}; "
                "choose another --run-dir"
            ) from error
        expected: set[str] = set()
        if "lock" in names:  # every run creates it first; without it, a config.yaml is the user's
            expected = {
                "lock",
                self.config.name,
                self.ledger.name,
                self.metrics.name,
                self.csv.name,
                self.tensorboard.name,
                self.checkpoints.name,
                self.samples.name,
                self.series.name,
                self.mirror.name,
                self.pull.name,
                self.stop.name,
            }
        for name in names:
            if name not in expected and not _TOLERATED.fullmatch(name):
                raise ConfigError(
                    f"{self.path}: contains {name!r}, which is not part of a run; "
                    "choose another --run-dir"
                )

    def create(self) -> None:
        """Create the directory and its lock file durably; ConfigError if it holds foreign files."""
        self.refuse_foreign_files()
        root = self.folder.path
        try:
            missing = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(parents=True, exist_ok=True)
            (root / "lock").touch()
            self.checkpoints.mkdir(exist_ok=True)
            for folder in (root, *(folder.parent for folder in missing)):
                Folder(folder).sync()
        except OSError as error:
            reason = f"cannot be created: {error.strerror}; choose another --run-dir"
            raise ConfigError(f"{self.path}: {reason}") from error

    def write_config(self, text: str) -> None:
        """Write config.yaml, once, when the run starts."""
        self.folder.publish(self.config.name, [(_CONFIG_HEADER + text).encode()])

    def remove_unfinished_start(self) -> None:
        """Remove the files of a run that ended before its first checkpoint, or of a pull."""
        if self.folder.stat(self.pull.name) is not None:
            _remove(self.checkpoint_folder, lambda name: name.startswith("step-"))
            self.checkpoint_folder.sync()
        for path in (self.config, self.ledger, self.metrics, self.csv, self.mirror):
            with write_errors(self.display_path(path)):
                self.folder.remove(path.name)
        event_files = self.folder.subfolder(self.tensorboard.name)
        _remove(event_files, lambda name: "tfevents" in name)
        series = self.folder.subfolder(self.series.name)
        _remove(series, lambda name: name.endswith((".bin", ".json")))
        with write_errors(self.display_path(self.pull)):
            self.folder.remove(self.pull.name)  # last: without it, a checkpoint is that of a run

    @contextlib.contextmanager
    def pulling(self, url: str) -> Iterator[None]:
        """Mark the directory as incomplete while the block fetches a run into it."""
        self.folder.publish(self.pull.name, [f"{url}\n".encode()])
        yield
        with write_errors(self.display_path(self.pull)):
            self.folder.remove(self.pull.name)
            self.folder.sync()

    # --- the lock

    @contextlib.contextmanager
    def lock(self, say: Callable[[str], None] = lambda message: None) -> Iterator[None]:
        """Hold the run; RunInUseError if another process does.

        `say` gets a message if a killed process left its name in the lock file. Inside the block,
        `folder` writes into the directory that was locked, and raises RunMovedError once `path`
        leads to another one.
        """
        by_path = self.folder
        with contextlib.closing(Lock(by_path.path, self.path)) as lock:
            killed = lock.read_holder()
            lock.write_holder()
            if killed:
                say(f"{self.path}: removed a stale lock left by {killed}")
            self.folder = lock.folder
            try:
                yield
            finally:
                self.folder = by_path

    def holder(self) -> Holder | None:
        """Return the process in the lock file, unless it has ended. Nothing is locked."""
        holder = Holder.parse(json_lines.read_start(self.folder, "lock", N_BYTES))
        if holder is None or holder.ended_with_its_boot or not holder.may_be_alive():
            return None
        return holder

    def remove_temporary_files(self) -> None:
        """Remove the unpublished files of a killed process. The run must be locked."""
        subfolders = [
            self.folder.subfolder(path.name)
            for path in (self.checkpoints, self.samples, self.series)
        ]
        for folder in (self.folder, *subfolders):
            _remove(folder, lambda name: name.startswith(".") and TEMPORARY in name)

    # --- config, ledger and metrics

    def refuse_missing_run(self) -> None:
        """Raise ConfigError if the directory has no config.yaml, or only a part of a mirror."""
        if files.is_file(self.folder.path):
            raise ConfigError(
                f"{self.path}: is a file; give the run's directory "
                "(with --from-step N for an older checkpoint)"
            )
        if files.exists(self.pull):
            url = json_lines.read_start(self.folder, self.pull.name, _MAX_URL).decode(
                "utf-8", "replace"
            )
            raise ConfigError(
                f"{self.path}: was not fetched to the end; complete it with: "
                f"{command('pull', url.strip(), self.path)}"
            )
        if not files.is_file(self.config):
            if self.holds_run():
                raise ConfigError(
                    f"{self.display_path(self.config)}: is missing; restore it from a checkpoint, "
                    f"which contains it: {command('inspect', self.path)}"
                )
            raise ConfigError(
                f"{self.path}: no run found (no config.yaml); start one with: stepctl train"
            )

    def newest_config(self, ledger: Ledger | None = None) -> yaml.Document:
        """Return the config of the newest segment: the newest change in the ledger, or config.yaml.

        The ledger is read if it is not given.
        """
        self.refuse_missing_run()
        if ledger is None:
            ledger = self.read_ledger()
        if ledger.config is not None:
            return yaml.Document(ledger.config, {(): str(self.display_path(self.ledger))})
        return yaml.load(str(self.config), str(self.display_path(self.config)))

    def read_ledger(self) -> Ledger:
        """Read the ledger; a line that a kill cut short is skipped."""
        return Ledger(json_lines.read_rows(self.folder, self.ledger.name))

    def append_ledger(self, event: str, **facts: Any) -> None:
        """Append an event durably: {"event", "time", ...}."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        row = {"event": event, "time": now, **facts}
        with self._ledger_lock:
            if not json_lines.append_row(self.folder, self.ledger.name, row):
                self.repair_ledger()  # a full disk has cut the last line short
                json_lines.append_row(self.folder, self.ledger.name, row)

    def repair_ledger(self, say: Callable[[str], None] = lambda message: None) -> Ledger:
        """Read the ledger; remove a last line that was cut short, and lines that are not objects."""
        lines = Tail(self.folder, self.ledger.name)
        lines.cut(say)
        return Ledger(lines.rows)

    def read_metrics(
        self, kind: str | None = None, report: Callable[[int], None] = lambda number: None
    ) -> Iterator[JSONRow]:
        """Yield the rows of metrics.jsonl, or those of one kind, in order.

        They are read one by one. A line that a kill cut short is skipped; `report` gets the numbers
        of other lines that are no JSON objects.
        """
        containing = b"" if kind is None else kind.encode()
        rows = json_lines.read_rows(
            self.folder, self.metrics.name, containing=containing, report=report
        )
        for row in rows:
            if _has_step(row) and (kind is None or row.get("kind") == kind):
                yield row

    def metrics_after(self, step: int) -> Tail:
        """Find the rows that a resume from `step` removes: later ones, and those marked extra.

        The file is read from the end, to a row of an earlier step: rows are in the order of their
        steps, and every resume removes the extra ones, so that all rows before it stay.
        StepctlError if the rows cannot be read.
        """

        def keep(row: JSONRow) -> bool:
            return row["step"] <= step and not row.get("extra")

        return Tail(
            self.folder,
            self.metrics.name,
            is_row=_has_step,
            keep=keep,
            is_settled=lambda row: row["step"] < step,
        )

    def newest_metrics(self) -> Tail:
        """Return the last rows of metrics.jsonl: a thousand or more, if there are as many."""
        return Tail(self.folder, self.metrics.name, is_row=_has_step, is_settled=lambda row: True)


def _remove(folder: Folder, is_wanted: Callable[[str], bool]) -> None:
    for name in folder.names():
        if is_wanted(name):
            with write_errors(folder.display_path / name):
                folder.remove(name)


def _has_step(row: JSONRow) -> bool:
    step = row.get("step")
    return isinstance(step, int) and 0 <= step <= MAX_STEP
