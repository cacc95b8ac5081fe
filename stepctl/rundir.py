"""The run directory: its paths, its lock, its ledger, and metrics that never say a step twice."""

from __future__ import annotations

import codecs
import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stepctl import files, launcher, yamlio
from stepctl.errors import ConfigError, RunExistsError, RunInUseError, RunMovedError, StepctlError, UnreadableError
from stepctl.files import fsync, remedy_of
from stepctl.folder import TEMPORARY, Descriptor, Folder, write_all, writing
from stepctl.shell import command

# Each event of the ledger, and what a line of it must hold.
_EVENTS: dict[str, dict[str, type]] = {
    "start": {"segment": int, "step": int, "target": int, "data": str},
    "checkpoint": {"step": int, "sha256": str},
    "end": {"segment": int, "step": int, "reason": str},
    "prune": {"steps": list},
    "fork": {"step": int, "sha256": str},  # and "parent" in the fork's own ledger, "child" in its parent's
}
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_LINE = 512  # bytes of the lock
# Beside a run: hidden files (a writer's temporary one too), a file system's own folder, logs, and what is kept aside.
_TOLERATED = re.compile(
    r"\..*|lost\+found|(.*\.)?(log|logs|out|err|stdout|stderr)(\.txt|\.gz|\.[0-9]+)?|.*\.aside-[0-9]+"
)
_LARGEST = 2**63 - 1  # a step beyond it is nobody's
_LARGEST_FILE = 1 << 30  # bytes of records: some ten million rows
_LONGEST_ROW = 1 << 24
_TRIES = 100  # at a lock whose holder has not written its name

Row = dict[str, Any]  # of the ledger, or of the metrics


class Holder(NamedTuple):
    """A process that holds a run, by the run's lock."""

    description: str
    other_host: str | None  # which alone could tell whether the process lives; None: it lives, on this host


class Records(NamedTuple):
    """What the ledger says of the run's checkpoints: the id of the run, and sha256 -> step of the acknowledged ones.

    The id is in the ledger's first line. A run that format version 1 began has none until it is resumed.
    """

    run_id: str | None
    acknowledged: dict[str, int]

    def owns(self, run_id: str | None, sha256: str) -> bool:
        """Tell whether a checkpoint is one of this run; of a run whose ledger is lost, every one is."""
        if self.run_id is None and not self.acknowledged:
            return True
        if run_id is None or self.run_id is None:
            return sha256 in self.acknowledged
        return run_id == self.run_id


class RunDirectory:
    """Paths of one run. `lock()` must be held by whoever writes: `folder` then works through one descriptor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)  # as it was given, for messages
        try:
            root = self.path.absolute()  # once: a user's own code may change the working directory
        except OSError as error:
            raise ConfigError(f"{path}: the working directory is gone ({error.strerror}); cd to one that is") from error
        self.config = root / "config.yaml"
        self.ledger = root / "ledger.jsonl"
        self.metrics = root / "metrics.jsonl"
        self.csv = root / "metrics.csv"
        self.tensorboard = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.samples = root / "samples"
        self.stop = root / "STOP"  # made by whoever wants the run to stop
        self.folder = Folder(root, self.path)

    @property
    def name(self) -> str:
        """The run's name: the directory's."""
        return self.folder.path.resolve().name

    @property
    def checkpoint_folder(self) -> Folder:
        """The folder of the checkpoints, held while the run is locked."""
        return self.folder.subfolder(self.checkpoints.name)

    def shown(self, path: Path) -> Path:
        """Return the path of one of the run's files as messages have it: as the user gave it."""
        return self.path / path.name

    def holds_run(self) -> bool:
        """Tell whether a run was ever started here: whether it published a checkpoint, be it gone now.

        UnreadableError if that cannot be told.
        """
        if any(row["event"] == "checkpoint" for row in self.read_ledger()):
            return True
        try:
            return any(name.startswith("step-") for name in self.checkpoint_folder.names())
        except NotADirectoryError:
            return False

    def refuse_run(self) -> None:
        """Raise RunExistsError if a run is here, with the command that goes on with it."""
        if self.holds_run():
            raise RunExistsError(f"{self.path}: holds a run already; go on with: {command('resume', self.path)}")

    def newest_config(self) -> yamlio.Document:
        """Return the config that the newest segment ran with: the frozen one, or what the ledger changed it to."""
        if files.is_file(self.folder.path):
            raise ConfigError(f"{self.path}: is a file; give the run's directory (and --from-step N to go back)")
        if not files.is_file(self.config):
            if self.holds_run():
                remedy = f"its checkpoints hold it ({command('inspect', self.path)}): put it back"
                raise ConfigError(f"{self.shown(self.config)}: is missing; {remedy}")
            raise ConfigError(f"{self.path}: no run is there (no config.yaml); start one with: stepctl train")
        changed = [row["config"] for row in self.read_ledger() if row["event"] == "start" and "config" in row]
        if changed:
            return yamlio.Document(changed[-1], {(): str(self.shown(self.ledger))})
        return yamlio.load(str(self.config), str(self.shown(self.config)))

    def refuse_strangers(self) -> None:
        """Raise ConfigError if the directory holds what no run made."""
        made = (self.config, self.ledger, self.metrics, self.csv, self.checkpoints, self.tensorboard, self.samples)
        ours = {path.name for path in (*made, self.stop)} | {"lock"}
        try:
            names = sorted(self.folder.names())
        except OSError as error:
            raise ConfigError(f"{self.path}: not a directory to keep a run in: {error.strerror}") from error
        # every run makes its lock first: without one, even a config.yaml is somebody's own
        ours = ours if "lock" in names else set()
        strangers = [name for name in names if name not in ours and not _TOLERATED.fullmatch(name)]
        if strangers:
            raise ConfigError(f"{self.path}: holds {strangers[0]!r}, which no run made; choose another --run-dir")

    def make(self) -> None:
        """Create the directory and its lock, durably; ConfigError if something that is not a run stands there."""
        self.refuse_strangers()
        root = self.folder.path
        try:
            missing = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(parents=True, exist_ok=True)
            (root / "lock").touch()
            self.checkpoints.mkdir(exist_ok=True)
            for folder in (root, *(folder.parent for folder in missing)):
                Folder(folder).sync()
        except OSError as error:
            remedy = "choose another --run-dir"
            raise ConfigError(f"{self.path}: cannot be made a run directory: {error.strerror}; {remedy}") from error

    @contextlib.contextmanager
    def lock(self, say: Callable[[str], None] = lambda message: None) -> Iterator[None]:
        """Hold the run; RunInUseError if another process does. The lock ends with its holder, however it ends.

        What a holder that was killed left in the file is told to `say`. From here to the end of the block, `folder`
        writes into the directory that was locked, and raises RunMovedError once `path` leads to another.
        """
        by_path = self.folder
        with contextlib.closing(_Lock(by_path.path, self.path)) as lock:
            dead = lock.holder()
            lock.sign()
            if dead:
                say(f"{self.path}: {_described(dead)} ended without letting go; taking over")
            self.folder = lock.folder
            try:
                yield
            finally:
                self.folder = by_path

    def holder(self) -> Holder | None:
        """Return who holds the run, by what the lock says alone: nothing is locked, so no trainer can fail by it."""
        found = _parsed(self._content("lock")) or {}
        on_this_host = found.get("host") == socket.gethostname()
        restarted = on_this_host and found.get("boot_id") != _boot_id()
        if not found or restarted or not _may_live(found):
            return None
        return Holder(_described(found), None if on_this_host else str(found.get("host")))

    def freeze_config(self, text: str) -> None:
        """Write the resolved config, once, at the start of the run."""
        header = "# The resolved config, frozen when the run started; later changes are in ledger.jsonl.\n"
        self.folder.publish(self.config.name, [(header + text).encode()])

    def clear_stillborn(self) -> None:
        """Remove what a start left that never came to its first checkpoint."""
        for path in (self.config, self.ledger, self.metrics, self.csv):
            with writing(self.shown(path)):
                self.folder.remove(path.name)
        events = self.folder.subfolder(self.tensorboard.name)
        _remove(events, lambda name: "tfevents" in name)

    def clear_temporaries(self) -> None:
        """Remove what a killed writer left unpublished. Only the holder of the lock may."""
        below = [self.folder.subfolder(path.name) for path in (self.checkpoints, self.samples)]
        for folder in (self.folder, *below):
            _remove(folder, lambda name: name.startswith(".") and TEMPORARY in name)

    def append_ledger(self, event: str, **facts: Any) -> None:
        """Add one durable line: {"event", "time", ...}."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"event": event, "time": now, **facts}).encode() + b"\n"
        if self._content(self.ledger.name, last=1) not in (b"", b"\n"):
            self.mend_ledger()  # a full disk has cut the line before
        with writing(self.shown(self.ledger)):
            descriptor = self.folder.open_to_append(self.ledger.name)
            try:
                write_all(descriptor, line)
                fsync(descriptor)
            finally:
                os.close(descriptor)

    def read_ledger(self) -> list[dict[str, Any]]:
        """Return the ledger's lines; one that a kill cut short, or that no segment wrote, is passed over."""
        return [row for row in self._rows(self.ledger) if _is_event(row)]

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; a line that a kill cut short is passed over."""
        return [row for row in self._rows(self.metrics) if _has_step(row)]

    def records(self) -> Records:
        """Return what the ledger says of the run's checkpoints."""
        ledger = self.read_ledger()
        ids = [row["run_id"] for row in ledger if _RUN_ID.fullmatch(str(row.get("run_id")))]
        acknowledged = {row["sha256"]: row["step"] for row in ledger if row["event"] == "checkpoint"}
        return Records(ids[0] if ids else None, acknowledged)

    def mend_ledger(self, say: Callable[[str], None] = lambda message: None) -> None:
        """Cut a line that was left unfinished, so that the next one begins a line of its own."""
        self._rewrite(self.ledger, lambda row: True, lambda row: True, say)

    def cut_metrics(self, step: int, say: Callable[[str], None] = lambda message: None) -> None:
        """Drop rows past `step`, rows marked extra and a torn last line, atomically."""
        self._rewrite(self.metrics, _has_step, lambda row: row["step"] <= step and not row.get("extra"), say)

    def _rewrite(
        self, path: Path, is_row: Callable[[Row], bool], keep: Callable[[Row], bool], say: Callable[[str], None]
    ) -> None:
        """Keep some rows of a file, each on a line of its own.

        A last line without an end was torn by a kill or a full disk, and is dropped. Before any other line is dropped
        that is no row, the file as it was is kept aside, and `say` reports it.
        """
        content = self._content(path.name)
        kept, unreadable = [], 0
        for line in content.splitlines(keepends=True):
            text = line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)
            row = _parsed(text)
            if row is not None and is_row(row):
                kept += [text + b"\n"] if keep(row) else []
            elif text.strip() and line.endswith((b"\r", b"\n")):
                unreadable += 1
        if unreadable:
            aside = self.folder.free_name(path.name)
            self.folder.publish(aside, [content])
            rows = "line cannot be read as a row" if unreadable == 1 else "lines cannot be read as rows"
            say(f"{self.shown(path)}: {unreadable:,} {rows}; the file as it was is kept as {aside}")
        if b"".join(kept) != content:
            self.folder.publish(path.name, kept)

    def _rows(self, path: Path) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._content(path.name).splitlines(), start=1):
            if len(line) > _LONGEST_ROW:
                what = f"line {number} has {len(line):,} bytes, and no row has more than {_LONGEST_ROW:,}"
                raise StepctlError(f"{self.shown(path)}: {what}; remove it, or move the file away")
            row = _parsed(line)
            if row is not None:
                yield row

    def _content(self, name: str, last: int | None = None) -> bytes:
        """Return what a file holds, or only so many of its last bytes; nothing if there is none."""
        try:
            with self.folder.open_regular(name) as file:
                size = os.fstat(file.fileno()).st_size
                if last is not None:
                    file.seek(max(size - last, 0))
                elif size > _LARGEST_FILE:
                    what = f"{size:,} bytes, and at most {_LARGEST_FILE:,} are read"
                    raise StepctlError(f"{self.path / name}: {what}; move the file away, or cut what is no row")
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            files.refuse_broken_link(self.folder.path / name)
            return b""
        except OSError as error:
            path = self.path / name
            if files.is_unavailable(error):
                raise files.unreadable(path, error) from error
            raise StepctlError(f"{path}: cannot be read: {error.strerror}; {remedy_of(error)}") from error


class _Lock:
    """The locks of one process on a run: on its directory, where the file system has such, and on its file `lock`.

    While the directory is locked, no other process gets in, even if `lock` is removed. Where only the file can be
    locked, whoever removes it lets another in: so the holder stops at its next write.
    """

    def __init__(self, root: Path, shown: Path) -> None:
        self._path, self._shown = shown / "lock", shown
        self._file: Descriptor | None = None
        with writing(self._path):
            self.folder = Folder.opened(root, shown, self._check)
        try:
            self._holds_directory = self._lock_directory()
            self._lock_file()
        except BaseException:
            self.close()
            raise

    def holder(self) -> dict[str, Any] | None:
        """Return who signed the file last."""
        with contextlib.suppress(OSError), self.folder.open_regular(self._path.name) as file:
            return _parsed(file.read(_LINE))
        return None

    def sign(self) -> None:
        """Write who holds the lock. A full disk has no room for it, and the run is held all the same."""
        assert self._file is not None
        holder = {"host": socket.gethostname(), "boot_id": _boot_id(), "pid": os.getpid()}
        try:
            with writing(self._path):
                # one write of one length, so that a reader finds the old name or the new one
                write_all(self._file.number, (json.dumps(holder) + "\n").ljust(_LINE).encode())
        except StepctlError as error:
            if not is_full(error):
                raise

    def close(self) -> None:
        """Let the run go; in a forked child, which holds nothing, do nothing."""
        if self._file is not None and not self._file.closed:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.number, 0)
            self._file.close()
        self.folder.close()

    def _lock_directory(self) -> bool:
        dir_fd = self.folder.dir_fd
        assert dir_fd is not None
        try:
            self._take(dir_fd)
        except OSError:  # not on this file system
            return False
        return True

    def _lock_file(self) -> None:
        while True:
            with writing(self._path):
                # it is written and cut short: through a link, that would be somebody else's file
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                file = Descriptor(self.folder.open(self._path.name, flags))
            try:
                if not stat.S_ISREG(os.fstat(file.number).st_mode):
                    raise StepctlError(f"{self._path}: is not a regular file; remove it, then run the command again")
                try:
                    self._take(file.number)
                except OSError as error:
                    remedy = "keep runs on a file system that has flock"
                    raise StepctlError(f"{self._shown}: cannot be locked: {error.strerror}; {remedy}") from error
                if self.folder.names_open_file(self._path.name, file.number):  # not removed since it was opened
                    self._file = file
                    return
            finally:
                if self._file is not file:
                    file.close()

    def _take(self, descriptor: int) -> None:
        """Lock what is open; OSError if the system cannot."""
        holder: dict[str, Any] | None = None
        for _ in range(_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = self.holder()
                if holder and _may_live(holder):
                    break
                time.sleep(0.01)  # it has just begun, or is just letting go
        remedy = f"wait for it, or stop it{launcher.remedy()}"
        if holder and holder.get("pid") == os.getpid() and _may_live(holder):
            remedy = "this program opened it before, and has to close it: run.close()"
        raise RunInUseError(f"{self._shown}: in use by {_described(holder or {})}; {remedy}")

    def _check(self) -> None:
        """Raise RunMovedError if another process may hold the run by now."""
        if self._file is None:
            return
        try:
            named = self.folder.stat(self._path.name)
        except UnreadableError:  # no answer is no sign of another process
            return
        if named is None and self._holds_directory:
            return
        if named is None or not os.path.samestat(os.fstat(self._file.number), named):
            raise RunMovedError(
                f"{self._path}: was removed or replaced, so that another process may hold the run; nothing more is "
                f"written (go on with: {command('resume', self._shown)})"
            )


def _remove(folder: Folder, wanted: Callable[[str], bool]) -> None:
    for name in filter(wanted, folder.names()):
        with writing(folder.shown / name):
            folder.remove(name)


def new_run_id() -> str:
    """Return the id of a run that begins: 32 hexadecimal digits that no other run has."""
    return secrets.token_hex(16)


def refuse_nowhere(path: str) -> None:
    """Raise ConfigError if there is nothing at all where a run or a checkpoint is to be read."""
    files.refuse_broken_link(path)
    if not files.is_there(path):
        raise ConfigError(f"{path}: no run is there, and no checkpoint; list the runs with: stepctl runs")


def _described(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _may_live(holder: Mapping[str, Any]) -> bool:
    if (holder.get("host"), holder.get("boot_id")) != (socket.gethostname(), _boot_id()):
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_event(row: dict[str, Any]) -> bool:
    facts = _EVENTS.get(str(row.get("event")))
    if facts is None or not isinstance(row.get("config", {}), dict):
        return False
    changes = row.get("changes", [])
    if not isinstance(changes, list) or not all(_holds_key(change) for change in changes):
        return False
    return all(_holds(row.get(name), kind) for name, kind in facts.items())


def _holds_key(change: object) -> bool:
    return isinstance(change, dict) and isinstance(change.get("key"), str)


def _holds(value: object, kind: type) -> bool:
    return isinstance(value, kind) and (not isinstance(value, int) or 0 <= value <= _LARGEST)


def _has_step(row: Row) -> bool:
    return isinstance(row.get("step"), int)


def newest_data(ledger: list[dict[str, Any]]) -> str | None:
    """Return the fingerprint of the data that the run was last trained on, or that its fork was made with."""
    found = [row["data"] for row in ledger if row["event"] in ("start", "fork") and isinstance(row.get("data"), str)]
    return found[-1] if found else None


def data_between(ledger: list[dict[str, Any]], first: int, last: int) -> set[str]:
    """Return the fingerprints of the data that the steps after `first` up to `last` were trained on."""
    starts = [row for row in ledger if row["event"] == "start"]
    found, end = set(), last
    for row in reversed(starts):  # a segment made the steps up to where the next one that counts began
        if row["step"] < end:
            found.add(row["data"])
            end = row["step"]
        if end <= first:
            break
    return found


def forks(ledger: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Return step -> the forks that began at that step of this run: checkpoints that must stay."""
    found: dict[int, list[str]] = {}
    for row in ledger:
        if row["event"] == "fork" and isinstance(row.get("child"), str):
            found.setdefault(row["step"], []).append(row["child"])
    return found


def newest_target(ledger: list[dict[str, Any]]) -> int | None:
    """Return the target that the newest segment recorded when it started."""
    targets = [row["target"] for row in ledger if row["event"] == "start"]
    return targets[-1] if targets else None


def is_full(error: StepctlError) -> bool:
    """Tell whether there was no room for what could not be written."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # of bytes, json would guess the encoding
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
