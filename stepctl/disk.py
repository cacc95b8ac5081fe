"""What a file system does with the calls that a run's safety rests on: each tried for real, in a folder of its own."""

from __future__ import annotations

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

from stepctl.files import fsync

_MOUNTS = "/proc/self/mountinfo"
_OTHER = "keep runs on another file system (--run-dir)"
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there")
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a folder that this user may write to")
_PATIENCE = 5.0  # seconds for an answer of the second process
_GRACE = 0.5  # seconds in which the lock of a process that has ended must be free
_RENAMES = 5
# Takes the lock if it can, says so, and stays until it is ended.
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


class Misbehaves(Exception):
    """The file system does not do what it says."""


class Trial(NamedTuple):
    """One call: how it is tried (returns its seconds), and what a run is without it."""

    name: str
    attempt: Callable[[Path], float]
    without: str


def examine(path: str) -> dict[str, Any]:
    """Return what the file system that would hold `path` is, and how it behaves; nothing is left there.

    "path", "folder" (the path, or the nearest above it that exists), "type" and "options" of its mount, "free"
    bytes, "trials" (each "name", "milliseconds", and "reason" if it failed), and "problems", lines in words.
    """
    wanted = Path(os.path.abspath(path))
    there = next((place for place in (wanted, *wanted.parents) if os.path.lexists(place)), Path("/"))
    folder = there if there.is_dir() else there.parent
    facts = {"path": str(wanted), "folder": str(folder), **mount_of(str(folder)), "free": _free(folder)}
    if folder != there:
        remedy = "move it away, or give another folder (--run-dir)"
        return facts | {"trials": [], "problems": [f"{there}: is no folder: no run can be kept in it; {remedy}"]}
    trials, refusal = _trials(folder)
    problems = [refusal] if refusal else _problems(folder, trials)
    return facts | {"trials": trials, "problems": problems}


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def mount_of(folder: str) -> dict[str, str]:
    """Return "type" and "options" of the mount that holds a folder; "unknown" where the system does not tell."""
    try:
        text = os.fsdecode(Path(_MOUNTS).read_bytes())
    except OSError:
        text = ""
    return mount_in(text, os.path.realpath(folder))


def mount_in(mountinfo: str, folder: str) -> dict[str, str]:
    """Return "type" and "options" of the longest mount point that contains a folder; of equal ones the last counts.

    A line is: id, parent, device, root, mount point, options, optional fields, "-", type, source, options (proc(5)).
    """
    best, found = -1, {"type": "unknown", "options": "unknown"}
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        words, kind = fields.split(" "), rest.split(" ")[0]
        point = _unescaped(words[4]) if len(words) > 5 and kind else ""
        if point and _contains(point, folder) and len(point) >= best:
            best, found = len(point), {"type": kind, "options": words[5]}
    return found


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def _contains(point: str, folder: str) -> bool:
    return folder == point or folder.startswith(point.rstrip("/") + "/")


def _trials(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the trials, or why there are none."""
    try:
        place = Path(tempfile.mkdtemp(prefix=".stepctl-doctor-", dir=folder))
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, _OTHER)
        return [], f"{folder}: no folder can be made in it ({error.strerror}): no run can be kept there; {remedy}"
    try:
        return [_tried(trial, place) for trial in TRIALS], None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _tried(trial: Trial, place: Path) -> dict[str, Any]:
    milliseconds, reason, remedy = None, None, None
    try:
        own = place / trial.name.replace(" ", "-")
        own.mkdir()
        milliseconds = round(1000 * trial.attempt(own), 3)
    except OSError as error:
        reason, remedy = error.strerror or type(error).__name__, _REMEDIES.get(error.errno or 0, _OTHER)
    except Exception as error:
        reason, remedy = str(error) or type(error).__name__, _OTHER
    without = trial.without if reason else None
    return {"name": trial.name, "milliseconds": milliseconds, "reason": reason, "without": without, "remedy": remedy}


def _problems(folder: Path, trials: list[dict[str, Any]]) -> list[str]:
    """Return a line for each reason: a full disk is one, whatever it fails."""
    failed: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for trial in trials:
        if trial["reason"]:
            failed.setdefault((trial["reason"], trial["remedy"]), []).append(trial)
    return [
        f"{folder}: {', '.join(trial['name'] for trial in some)}: {reason}: {some[0]['without']}; {remedy}"
        for (reason, remedy), some in failed.items()
    ]


def _seconds(function: Callable[..., object], *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fsync_file(place: Path) -> float:
    with _opened(place / "file", os.O_WRONLY | os.O_CREAT) as descriptor:
        os.write(descriptor, bytes(4096))
        return _seconds(fsync, descriptor)


def _fsync_folder(place: Path) -> float:
    (place / "file").touch()
    with _opened(place, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        return _seconds(fsync, descriptor)


def _rename(place: Path) -> float:
    """Rename over a name that is looked for all the while: it must be there, whole, at every moment."""
    name, contents = place / "name", {b"old" * 100, b"new" * 100}
    name.write_bytes(min(contents))
    done, seen = threading.Event(), set()

    def look() -> None:
        while not done.is_set():
            try:
                seen.add(name.read_bytes())
            except OSError as error:
                seen.add(str(error.strerror).encode())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        took = [_renamed(place / f"{number}", name, content) for number in range(_RENAMES) for content in contents]
    finally:
        done.set()
        looking.join()
    if seen - contents or len(os.listdir(place)) > 1:
        raise Misbehaves("the name is not there, or not whole, for a moment")
    return sum(took) / len(took)


def _renamed(source: Path, name: Path, content: bytes) -> float:
    source.write_bytes(content)
    took = _seconds(os.rename, source, name)
    if name.read_bytes() != content:
        raise Misbehaves("the old content stays under the name")
    return took


def _exclusive(place: Path) -> float:
    def make() -> None:
        os.close(os.open(place / "file", os.O_WRONLY | os.O_CREAT | os.O_EXCL))

    took = _seconds(make)
    with contextlib.suppress(FileExistsError):
        make()
        raise Misbehaves("a file that exists is made again")
    return took


def _append(place: Path) -> float:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with _opened(place / "file", flags) as one, _opened(place / "file", flags) as other:
        took = _seconds(os.write, one, b"1\n")
        for descriptor, line in ((other, b"2\n"), (one, b"3\n")):
            os.write(descriptor, line)
    if (place / "file").read_bytes() != b"1\n2\n3\n":
        raise Misbehaves("of two writers one overwrites the other")
    return took


def _lock_excludes(place: Path) -> float:
    with _opened(place / "lock", os.O_RDWR | os.O_CREAT) as descriptor:
        took = _seconds(_take, descriptor)
        with _second_process(place / "lock") as second:
            if _answer(second) != "held":
                raise Misbehaves("two processes hold the lock at a time")
    return took


def _lock_ends(place: Path) -> float:
    """A process that holds the lock is killed; return how long the lock then takes."""
    with _opened(place / "lock", os.O_RDWR | os.O_CREAT) as descriptor:
        with _second_process(place / "lock") as second:
            if _answer(second) != "taken":
                raise Misbehaves("a lock that nobody holds cannot be taken")
        return _seconds(_take_soon, descriptor)


def _take(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Misbehaves("it stays locked, though its holder has ended") from error


def _take_soon(descriptor: int) -> None:
    deadline = time.monotonic() + _GRACE
    while True:
        try:
            return _take(descriptor)
        except Misbehaves:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def _second_process(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that tries to take a lock; it is killed at the end, and has ended then."""
    command = [sys.executable, "-I", "-S", "-c", _SECOND_PROCESS, str(lock)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as second:
        try:
            yield second
        finally:
            second.kill()


def _answer(second: subprocess.Popen[bytes]) -> str:
    assert second.stdout is not None
    if not select.select([second.stdout], [], [], _PATIENCE)[0]:
        raise Misbehaves(f"a second process gets no answer in {_PATIENCE:.0f} s")
    answer = second.stdout.readline().decode().strip()
    if not answer:
        raise Misbehaves("a second process cannot try it")
    return answer


_NO_SAVE = "no checkpoint can be saved there"
TRIALS = [
    Trial("fsync of a file", _fsync_file, _NO_SAVE),
    Trial("fsync of a folder", _fsync_folder, _NO_SAVE),
    Trial("rename over a name", _rename, "a save could be found half done"),
    Trial("O_EXCL", _exclusive, "two writers could spoil a checkpoint"),
    Trial("O_APPEND", _append, "lines of the ledger and the metrics could be lost"),
    Trial("flock excludes", _lock_excludes, "two processes could train one run at a time, and spoil it"),
    Trial("flock ends with its holder", _lock_ends, "a run whose process was killed would stay in use"),
]
