"""The run directory: its paths, its lock, its ledger, and metrics that never say a step twice."""

from __future__ import annotations

import codecs
import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stepctl import files, launcher, yamlio
from stepctl.errors import ConfigError, RunExistsError, RunInUseError, StepctlError
from stepctl.files import fsync, open_regular, remedy_of
from stepctl.shell import command

# Each event of the ledger, and what a line of it must hold.
_EVENTS: dict[str, dict[str, type]] = {
    "start": {"segment": int, "step": int, "target": int, "data": str},
    "checkpoint": {"step": int, "sha256": str},
    "end": {"segment": int, "step": int, "reason": str},
    "prune": {"steps": list},
    "fork": {"step": int, "sha256": str},  # and "parent" in the fork's own ledger, "child" in its parent's
}
_TEMPORARY = ".tmp-"  # ends in the writer's pid
_HELD: set[int] = set()  # descriptors of this process's locks; a forked child that kept one would hold the run
_LINE = 512  # bytes of the lock
# Beside a run: hidden files (a writer's temporary one too), a file system's own folder, logs, and what is kept aside.
_TOLERATED = re.compile(
    r"\..*|lost\+found|(.*\.)?(log|logs|out|err|stdout|stderr)(\.txt|\.gz|\.[0-9]+)?|.*\.aside-[0-9]+"
)
_LARGEST = 2**63 - 1  # a step beyond it is nobody's
_TRIES = 100  # at a lock whose holder has not written its name

Row = dict[str, Any]  # of the ledger, or of the metrics


class Holder(NamedTuple):
    """A process that holds a run, by the run's lock."""

    description: str
    other_host: str | None  # which alone could tell whether the process lives; None: it lives, on this host


class RunDirectory:
    """Paths of one run. `lock()` must be held by whoever writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.ledger = self.path / "ledger.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.csv = self.path / "metrics.csv"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.stop = self.path / "STOP"  # made by whoever wants the run to stop

    @property
    def name(self) -> str:
        """The run's name: the directory's."""
        return self.path.resolve().name

    def holds_run(self) -> bool:
        """Tell whether a run was ever started here: whether it published a checkpoint, be it gone now.

        UnreadableError if that cannot be told.
        """
        if any(row["event"] == "checkpoint" for row in self.read_ledger()):
            return True
        if not files.is_directory(self.checkpoints):
            return False
        return any(name.startswith("step-") for name in files.list_directory(self.checkpoints))

    def refuse_run(self) -> None:
        """Raise RunExistsError if a run is here, with the command that goes on with it."""
        if self.holds_run():
            raise RunExistsError(f"{self.path}: holds a run already; go on with: {command('resume', self.path)}")

    def newest_config(self) -> yamlio.Document:
        """Return the config that the newest segment ran with: the frozen one, or what the ledger changed it to."""
        if files.is_file(self.path):
            raise ConfigError(f"{self.path}: is a file; give the run's directory (and --from-step N to go back)")
        if not files.is_file(self.config):
            if self.holds_run():
                remedy = f"its checkpoints hold it ({command('inspect', self.path)}): put it back"
                raise ConfigError(f"{self.config}: is missing; {remedy}")
            raise ConfigError(f"{self.path}: no run is there (no config.yaml); start one with: stepctl train")
        changed = [row["config"] for row in self.read_ledger() if row["event"] == "start" and "config" in row]
        return yamlio.Document(changed[-1], {(): str(self.ledger)}) if changed else yamlio.load(str(self.config))

    def refuse_strangers(self) -> None:
        """Raise ConfigError if the directory holds what no run made."""
        made = (self.config, self.ledger, self.metrics, self.csv, self.checkpoints, self.tensorboard, self.samples)
        ours = {path.name for path in (*made, self.stop)} | {"lock"}
        try:
            names = sorted(files.list_directory(self.path))
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
        try:
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
            self.checkpoints.mkdir(exist_ok=True)
            for folder in (self.path, *(folder.parent for folder in missing)):
                sync_directory(folder)
        except OSError as error:
            remedy = "choose another --run-dir"
            raise ConfigError(f"{self.path}: cannot be made a run directory: {error.strerror}; {remedy}") from error

    @contextlib.contextmanager
    def lock(self, say: Callable[[str], None] = lambda message: None) -> Iterator[None]:
        """Hold the run; RunInUseError if another process does. The lock ends with its holder, however it ends.

        What a holder that was killed left in the file is told to `say`.
        """
        with writing(self.path / "lock"):
            # it is written and cut short: through a link, that would be somebody else's file
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.path / "lock", flags, 0o666)
        _HELD.add(descriptor)
        try:
            self._take(descriptor)
            dead = _parsed(os.pread(descriptor, _LINE, 0))
            mine = {"host": socket.gethostname(), "boot_id": _boot_id(), "pid": os.getpid()}
            try:
                self._sign(descriptor, mine)
                if dead:
                    say(f"{self.path}: {_described(dead)} ended without letting go; taking over")
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
        finally:
            _HELD.discard(descriptor)
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _sign(self, descriptor: int, holder: Mapping[str, Any]) -> None:
        """Write who holds the lock. A full disk has no room for it, and the run is held all the same."""
        try:
            with writing(self.path / "lock"):
                # one write of one length, so that a reader finds the old name or the new one
                write_all(descriptor, (json.dumps(holder) + "\n").ljust(_LINE).encode())
        except StepctlError as error:
            if not is_full(error):
                raise

    def holder(self) -> Holder | None:
        """Return who holds the run, by what the lock says alone: nothing is locked, so no trainer can fail by it."""
        found = _parsed(_content(self.path / "lock")) or {}
        on_this_host = found.get("host") == socket.gethostname()
        restarted = on_this_host and found.get("boot_id") != _boot_id()
        if not found or restarted or not _may_live(found):
            return None
        return Holder(_described(found), None if on_this_host else str(found.get("host")))

    def _take(self, descriptor: int) -> None:
        holder: dict[str, Any] | None = None
        for _ in range(_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = _parsed(os.pread(descriptor, _LINE, 0))
                if holder and _may_live(holder):
                    break
                time.sleep(0.01)  # it has just begun, or is just letting go
            except OSError as error:
                remedy = "keep runs on a file system that has flock"
                raise StepctlError(f"{self.path}: cannot be locked: {error.strerror}; {remedy}") from error
        remedy = f"wait for it, or stop it{launcher.remedy()}"
        if holder and holder.get("pid") == os.getpid() and _may_live(holder):
            remedy = "this program opened it before, and has to close it: run.close()"
        raise RunInUseError(f"{self.path}: in use by {_described(holder or {})}; {remedy}")

    def freeze_config(self, text: str) -> None:
        """Write the resolved config, once, at the start of the run."""
        header = "# The resolved config, frozen when the run started; later changes are in ledger.jsonl.\n"
        publish(self.config, [(header + text).encode()])

    def clear_stillborn(self) -> None:
        """Remove what a start left that never came to its first checkpoint."""
        events = self.tensorboard.glob("*tfevents*")
        for path in (self.config, self.ledger, self.metrics, self.csv, *events):
            path.unlink(missing_ok=True)

    def clear_temporaries(self) -> None:
        """Remove what a killed writer left unpublished. Only the holder of the lock may."""
        for folder in (self.path, self.checkpoints, self.samples):
            for name in files.list_directory(folder):
                if name.startswith(".") and _TEMPORARY in name:
                    (folder / name).unlink(missing_ok=True)

    def append_ledger(self, event: str, **facts: Any) -> None:
        """Add one durable line: {"event", "time", ...}."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"event": event, "time": now, **facts}).encode() + b"\n"
        if _content(self.ledger, last=1) not in (b"", b"\n"):
            self.mend_ledger()  # a full disk has cut the line before
        with writing(self.ledger), open(self.ledger, "ab") as file:
            file.write(line)
            file.flush()
            fsync(file.fileno())

    def read_ledger(self) -> list[dict[str, Any]]:
        """Return the ledger's lines; one that a kill cut short, or that no segment wrote, is passed over."""
        return [row for row in _rows(self.ledger) if _is_event(row)]

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; a line that a kill cut short is passed over."""
        return [row for row in _rows(self.metrics) if _has_step(row)]

    def acknowledged(self) -> dict[str, int]:
        """Return sha256 -> step of every checkpoint that the ledger acknowledges."""
        return {row["sha256"]: row["step"] for row in self.read_ledger() if row["event"] == "checkpoint"}

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
        content = _content(path)
        kept, unreadable = [], 0
        for line in content.splitlines(keepends=True):
            text = line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)
            row = _parsed(text)
            if row is not None and is_row(row):
                kept += [text + b"\n"] if keep(row) else []
            elif text.strip() and line.endswith((b"\r", b"\n")):
                unreadable += 1
        if unreadable:
            asides = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
            aside = next(free for free in asides if not files.is_there(free))
            publish(aside, [content])
            rows = "line cannot be read as a row" if unreadable == 1 else "lines cannot be read as rows"
            say(f"{path}: {unreadable:,} {rows}; the file as it was is kept as {aside.name}")
        if b"".join(kept) != content:
            publish(path, kept)


def refuse_nowhere(path: str) -> None:
    """Raise ConfigError if there is nothing at all where a run or a checkpoint is to be read."""
    files.refuse_broken_link(path)
    if not files.is_there(path):
        raise ConfigError(f"{path}: no run is there, and no checkpoint; list the runs with: stepctl runs")


def _described(holder: Mapping[str, Any]) -> str:
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


def _let_go() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


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


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[int]:
    """Yield a descriptor to write a file through that is then there whole, durably, or not at all.

    Temporary file in the same directory (O_EXCL), write, fsync, rename, fsync of the directory. On any error
    the temporary file is removed and the descriptor given up: a failed fsync is never tried again on it.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    with writing(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                yield descriptor
                fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def publish(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file of these chunks so that it is there whole, durably, or not at all."""
    with publishing(path) as descriptor:
        for chunk in chunks:
            write_all(descriptor, chunk)


class writing:
    """A context that turns the system's refusal to write `path` into a StepctlError that says how to go on."""

    __slots__ = ("_path",)  # entered at every row, where a generator takes three times as long

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StepctlError(f"{self._path}: cannot be written: {error.strerror}; {remedy_of(error)}") from error


def is_full(error: StepctlError) -> bool:
    """Tell whether there was no room for what could not be written."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    """Write all of a chunk, however little the system takes at a time."""
    left = memoryview(chunk).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in _content(path).splitlines():
        row = _parsed(line)
        if row is not None:
            yield row


def _content(path: Path, last: int | None = None) -> bytes:
    """Return what a file holds, or only so many of its last bytes; nothing if there is none."""
    try:
        with open_regular(str(path)) as file:
            if last is not None:
                file.seek(max(os.fstat(file.fileno()).st_size - last, 0))
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        files.refuse_broken_link(path)
        return b""
    except OSError as error:
        if files.is_unavailable(error):
            raise files.unreadable(path, error) from error
        raise StepctlError(f"{path}: cannot be read: {error.strerror}; {remedy_of(error)}") from error


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
