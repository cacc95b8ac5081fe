"""Tests of the system calls that a run depends on, each performed in a temporary folder."""

import contextlib
import errno
import fcntl
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stepctl.doctor.child import Facts
from stepctl.system.files import fsync

_MOUNTS = "/proc/self/mountinfo"
_OTHER_FILE_SYSTEM = "keep runs on another file system (--run-dir)"
_NO_SPACE = "free some space there"
_NO_PERMISSION = "give a folder that you can write to (--run-dir)"
_REMEDIES = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: _NO_PERMISSION,
}
_ANSWER_SECONDS = 5.0  # timeout of the second process
_RELEASE_SECONDS = 0.5  # within which the lock of a process that ended must be free
_RENAMES = 5
# takes the lock if it is free, prints the outcome, and waits to be killed
_SECOND_PROCESS = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("taken", flush=True)
except BlockingIOError:
    print("held", flush=True)
sys.stdin.read()
"""


class FileSystemError(Exception):
    """The file system breaks the guarantee of a system call."""


class Check(NamedTuple):
    """A system call, the function that makes it and times it, and the effect of a failure."""

    name: str
    attempt: Callable[[Path], float]
    consequence: str


def examine(path: str) -> Facts:
    """Return the file system that holds `path`, and the outcome of the checks."""
    wanted = Path(os.path.abspath(path))
    existing = next(place for place in (wanted, *wanted.parents) if os.path.lexists(place))
    folder = existing if existing.is_dir() else existing.parent
    trials: list[Facts] = []
    if folder != existing:
        remedy = "move it away, or give another folder (--run-dir)"
        problems = [f"{existing}: is not a folder, so no run can be kept in it; {remedy}"]
    else:
        try:
            trials = _run_checks(folder)
            problems = _problems(folder, trials)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, _OTHER_FILE_SYSTEM)
            reason = f"cannot create a folder in it ({error.strerror}), so no run can be kept there"
            problems = [f"{folder}: {reason}; {remedy}"]
    return {
        "path": str(wanted),
        "folder": str(folder),  # the path, or its nearest parent that exists
        **mount_of(folder),
        "free": _free_bytes(folder),
        "trials": trials,
        "problems": problems,
    }


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def mount_of(folder: Path) -> Facts:
    """Return the mount that holds a folder."""
    try:
        text = os.fsdecode(Path(_MOUNTS).read_bytes())
    except OSError:
        text = ""
    return find_mount(text, os.path.realpath(folder))


def find_mount(mountinfo: str, folder: str) -> Facts:
    """Return the mount with the longest mount point that contains a folder; the last of equal ones.

    A line is: id, parent, device, root, mount point, options, optional fields, "-", type, source,
    options (proc(5)).
    """
    longest = -1
    found = {"type": "unknown", "options": "unknown"}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        kind = right.split(" ")[0]
        if len(fields) <= 5 or not kind:
            continue
        point = _unescape(fields[4])
        if Path(folder).is_relative_to(point) and len(point) >= longest:
            longest = len(point)
            found = {"type": kind, "options": fields[5]}
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _run_checks(folder: Path) -> list[Facts]:
    """Return the outcome of each check; OSError if no folder can be created for them."""
    with tempfile.TemporaryDirectory(
        prefix=".stepctl-doctor-", dir=folder, ignore_cleanup_errors=True
    ) as place:
        return [_run_check(check, Path(place)) for check in CHECKS]


def _run_check(check: Check, place: Path) -> Facts:
    """Return the time of a check or, after a failure, the reason, the consequence and a remedy."""
    keys = ("name", "milliseconds", "reason", "without", "remedy")
    trial: Facts = dict.fromkeys(keys) | {"name": check.name}
    try:
        folder = place / check.name.replace(" ", "-")
        folder.mkdir()
        trial["milliseconds"] = round(1000 * check.attempt(folder), 3)
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error)
        trial["reason"] = text or type(error).__name__
        trial["without"] = check.consequence
        trial["remedy"] = _REMEDIES.get(getattr(error, "errno", None) or 0, _OTHER_FILE_SYSTEM)
    return trial


def _problems(folder: Path, trials: list[Facts]) -> list[str]:
    """Return a message for each reason, which may fail several checks."""
    by_reason: dict[str, list[Facts]] = {}
    for trial in trials:
        if trial["reason"] is not None:
            by_reason.setdefault(trial["reason"], []).append(trial)
    problems = []
    for reason, failed in by_reason.items():
        names = ", ".join(trial["name"] for trial in failed)
        first = failed[0]
        problems.append(f"{folder}: {names}: {reason}: {first['without']}; {first['remedy']}")
    return problems


def _time(function: Callable[..., object], *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fsync_file(place: Path) -> float:
    with _open(place / "file", os.O_WRONLY | os.O_CREAT) as descriptor:
        os.write(descriptor, bytes(4096))
        return _time(fsync, descriptor)


def _fsync_folder(place: Path) -> float:
    (place / "file").touch()
    with _open(place, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        return _time(fsync, descriptor)


def _rename(place: Path) -> float:
    """Rename over a file while a thread reads it: each read must find one of the two contents."""
    name = place / "name"
    contents = (b"new" * 100, b"old" * 100)
    name.write_bytes(contents[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def read_all_the_time() -> None:
        while not done.is_set():
            try:
                seen.add(name.read_bytes())
            except OSError as error:
                seen.add(str(error.strerror).encode())

    reader = threading.Thread(target=read_all_the_time)
    reader.start()
    try:
        seconds = [_rename_over(place / "new", name, content) for content in contents * _RENAMES]
    finally:
        done.set()
        reader.join()
    if seen - set(contents) or len(os.listdir(place)) > 1:
        raise FileSystemError("the file is missing or incomplete for a moment")
    return sum(seconds) / len(seconds)


def _rename_over(source: Path, name: Path, content: bytes) -> float:
    source.write_bytes(content)
    seconds = _time(os.rename, source, name)
    if name.read_bytes() != content:
        raise FileSystemError("the file keeps its old content")
    return seconds


def _exclusive_create(place: Path) -> float:
    file = place / "file"
    seconds = _time(file.touch, 0o666, False)
    with contextlib.suppress(FileExistsError):
        file.touch(exist_ok=False)
        raise FileSystemError("an existing file is created again")
    return seconds


def _append(place: Path) -> float:
    file = place / "file"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with _open(file, flags) as first, _open(file, flags) as second:
        seconds = _time(os.write, first, b"1\n")
        os.write(second, b"2\n")
        os.write(first, b"3\n")
    if file.read_bytes() != b"1\n2\n3\n":
        raise FileSystemError("one of two writers overwrites the other")
    return seconds


def _lock_excludes(place: Path) -> float:
    with _open(place / "lock", os.O_RDWR | os.O_CREAT) as descriptor:
        seconds = _time(_lock, descriptor)
        with _second_process(place / "lock") as second:
            if _read_answer(second) != "held":
                raise FileSystemError("two processes hold the lock at the same time")
    return seconds


def _lock_is_released(place: Path) -> float:
    """Kill a process that holds the lock, and return the seconds until the lock is free."""
    with _open(place / "lock", os.O_RDWR | os.O_CREAT) as descriptor:
        with _second_process(place / "lock") as second:
            if _read_answer(second) != "taken":
                raise FileSystemError("a free lock cannot be taken")
        return _time(_lock, descriptor)


def _lock(descriptor: int) -> None:
    """Take a lock that is free, or that its holder releases in a moment."""
    deadline = time.monotonic() + _RELEASE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                reason = "it stays locked though its holder has ended"
                raise FileSystemError(reason) from error
            time.sleep(0.01)


@contextlib.contextmanager
def _second_process(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that tries to take a lock; kill it at the end and wait for it."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SECOND_PROCESS, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as second:
        try:
            yield second
        finally:
            second.kill()


def _read_answer(second: subprocess.Popen[bytes]) -> str:
    assert second.stdout is not None
    if not select.select([second.stdout], [], [], _ANSWER_SECONDS)[0]:
        raise FileSystemError(f"a second process got no answer in {_ANSWER_SECONDS:.0f} s")
    answer = second.stdout.readline().decode().strip()
    if not answer:
        raise FileSystemError("a second process cannot use it")
    return answer


_NO_SAVE = "checkpoints cannot be saved there"
CHECKS = [
    Check("fsync of a file", _fsync_file, _NO_SAVE),
    Check("fsync of a folder", _fsync_folder, _NO_SAVE),
    Check("rename over a name", _rename, "a reader may find a save half done"),
    Check("O_EXCL", _exclusive_create, "two writers may spoil a checkpoint"),
    Check("O_APPEND", _append, "lines of the ledger and the metrics may be lost"),
    Check("flock excludes", _lock_excludes, "two processes may train one run and spoil it"),
    Check(
        "flock ends with its holder", _lock_is_released, "a killed process leaves its run in use"
    ),
]
