"""Attack a process at a system call: kill it there, fail the call, or do half of its work.

The process is forked here and traced with ptrace, with all its threads. Only calls that touch a
file below one folder count. A call is identified by its name, its file and its number among equal
ones, so the order of threads does not matter.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.isolated import Refused

_POKE = 6
_CONTINUE = 7
_SYSCALL = 24
_SEIZE = 0x4206
_INFO = 0x420E
_OPTIONS = (
    0x1 | 0x2 | 0x4 | 0x8 | 0x80 | 0x100000
)  # TRACESYSGOOD, FORK, VFORK, CLONE, SECCOMP, EXITKILL
_EVENT_SECCOMP = 7
_LEAVES = 2
_NO_NEW_PRIVILEGES, _SET_SECCOMP = 38, 22  # of prctl
_ALLOW, _STOP = 0x7FFF0000, 0x7FF00000  # what a filter answers
_ALL_THREADS = 0x40000000  # __WALL
_RAX, _RDX, _ORIG_RAX = 80, 96, 120  # offsets of the registers in struct user
_AT_CWD = -100

# by its number on x86_64: the name, and which arguments are descriptors (f), paths (p), or paths
# below a descriptor
# (a). One name for one thing: a rename is a rename by path, below a descriptor, and with flags.
_CALLS = {
    0: ("read", "f"), 1: ("write", "f"), 2: ("open", "p"), 3: ("close", "f"), 4: ("stat", "p"), 5: ("stat", "f"),
    6: ("stat", "p"), 8: ("lseek", "f"), 16: ("ioctl", "f"), 17: ("pread64", "f"), 18: ("pwrite64", "f"),
    19: ("readv", "f"), 20: ("writev", "f"), 21: ("access", "p"), 40: ("sendfile", "f"), 72: ("fcntl", "f"),
    73: ("flock", "f"), 74: ("fsync", "f"), 75: ("fdatasync", "f"), 76: ("truncate", "p"), 77: ("ftruncate", "f"),
    82: ("rename", "pp"), 83: ("mkdir", "p"), 84: ("rmdir", "p"), 85: ("open", "p"), 86: ("link", "pp"),
    87: ("unlink", "p"), 88: ("symlink", "pp"), 89: ("readlink", "p"), 90: ("chmod", "p"), 91: ("chmod", "f"),
    217: ("getdents64", "f"), 257: ("open", "a"), 258: ("mkdir", "a"), 262: ("stat", "a"), 263: ("unlink", "a"),
    264: ("rename", "aa"), 265: ("link", "aa"), 267: ("readlink", "a"), 269: ("access", "a"),
    277: ("sync_file_range", "f"), 280: ("utimensat", "a"), 285: ("fallocate", "f"),
    316: ("rename", "aa"), 326: ("copy_file_range", "f"),
    332: ("stat", "a"), 437: ("open", "a"), 439: ("access", "a"),
}  # fmt: skip


class Call(NamedTuple):
    """One system call of a run; `file` is relative to the folder, without the process's pid."""

    name: str
    file: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.name} {self.file}" + (f" ({self.nth})" if self.nth > 1 else "")


class Blow(NamedTuple):
    """The attack at a call: send `signal`, fail with errno `error`, write `half`, or `kill`."""

    kill: bool = False
    half: bool = False
    error: int = 0
    signal: int = 0


class _Info(ctypes.Structure):  # struct ptrace_syscall_info
    _fields_ = [
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("nr", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Trace:
    """The calls of a traced process, and the blows that fell."""

    def __init__(self, folder: Path, blows: Mapping[Call, Blow]) -> None:
        self.calls: list[Call] = []
        self.struck: set[Call] = set()
        self._folder = os.path.realpath(folder)
        self._blows = blows
        self._counts: Counter[tuple[str, str]] = Counter()
        self._at_leave: dict[
            int, Callable[[], None]
        ] = {}  # by thread, what is left to do when its call ends

    def follow(self, pid: int) -> int:
        """Trace a process that calls `stand_still` first; return its exit code, or -N for signal N."""
        os.waitpid(pid, os.WUNTRACED)
        if platform.machine() != "x86_64" or _libc.ptrace(_SEIZE, pid, None, _OPTIONS):
            _kill(pid)
            os.waitpid(pid, 0)
            raise Refused(
                "a process cannot be traced here (that needs ptrace, and the registers of x86_64)"
            )
        os.kill(pid, signal.SIGCONT)
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            while True:
                thread, status = os.waitpid(-1, _ALL_THREADS)
                if os.WIFSTOPPED(status):
                    self._stopped(pid, thread, status, memory.fileno())
                elif thread == pid:
                    return os.waitstatus_to_exitcode(status)

    def _stopped(self, pid: int, thread: int, status: int, memory: int) -> None:
        number = os.WSTOPSIG(status)
        event = status >> 16
        if event == _EVENT_SECCOMP:
            self._enters(pid, thread, memory)
        elif (
            number == signal.SIGTRAP | 0x80
            and thread in self._at_leave
            and _info(thread).op == _LEAVES
        ):
            self._at_leave.pop(thread)()
        to_end = _SYSCALL if thread in self._at_leave else _CONTINUE
        _libc.ptrace(to_end, thread, None, 0 if event or number & 0x80 else number)

    def _enters(self, pid: int, thread: int, memory: int) -> None:
        info = _info(thread)
        files = [file for path in _paths(pid, info, memory) if (file := self._below(path))]
        if files:
            name = _CALLS[info.nr][0]
            file = re.sub(r"tmp-\d+", "tmp-PID", " -> ".join(files))
            self._counts[name, file] += 1
            call = Call(name, file, self._counts[name, file])
            self.calls.append(call)
            if call in self._blows:
                self.struck.add(call)
                leave = _strike(pid, thread, self._blows[call], info)
                if leave:
                    self._at_leave[thread] = leave

    def _below(self, path: str) -> str | None:
        if not path.startswith(self._folder):
            return None
        path = os.path.normpath(path)
        return (
            os.path.relpath(path, self._folder)
            if f"{path}/".startswith(f"{self._folder}/")
            else None
        )


def stand_still() -> None:
    """Wait to be traced; from then on stop at the calls that are listed here, and at no other."""
    signal.raise_signal(signal.SIGSTOP)
    numbers = sorted(_CALLS)
    jumps = [(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program = [(0x20, 0, 0, 0), *jumps, (0x06, 0, 0, _ALLOW), (0x06, 0, 0, _STOP)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(filters))
    if _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or _libc.prctl(_SET_SECCOMP, 2, header, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set")


def _strike(pid: int, thread: int, blow: Blow, info: _Info) -> Callable[[], None] | None:
    """Do what is to be done when a call begins; return what is left for its end."""
    if blow.signal and _libc.tgkill(
        pid, thread, blow.signal
    ):  # to this thread: another could handle it any time later
        raise OSError(ctypes.get_errno(), "a thread cannot be signalled")
    if blow.error:
        _poke(thread, _ORIG_RAX, -1)  # no call is made
        _poke(thread, _RAX, -blow.error)
    elif blow.half:
        _poke(thread, _RDX, max(info.args[2] // 2, 1))
        return (lambda: _kill(pid)) if blow.kill else lambda: _poke(thread, _RDX, info.args[2])
    elif blow.kill:
        _kill(pid)
    return None


def _info(thread: int) -> _Info:
    info = _Info()
    _libc.ptrace(_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
    return info


def _paths(pid: int, info: _Info, memory: int) -> Iterator[str]:
    """Yield the path of each file of a call."""
    position = 0
    for kind in _CALLS[info.nr][1]:
        base = ""
        text = ""
        if kind != "f":
            text = _text(memory, info.args[position + (kind == "a")])
        if not text.startswith("/"):
            base = _descriptor(
                pid, ctypes.c_int(info.args[position]).value if kind in "fa" else _AT_CWD
            )
        yield f"{base}/{text}" if base and text else base or text
        position += len("ap") if kind == "a" else 1


def _descriptor(pid: int, number: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd" if number == _AT_CWD else f"/proc/{pid}/fd/{number}")
    except OSError:
        return ""


def _text(memory: int, address: int) -> str:
    text = b""
    while b"\0" not in text:
        start = address + len(text)
        text += os.pread(
            memory, min(4096 - start % 4096, 256), start
        )  # not into a page that may not be there
    return os.fsdecode(text[: text.index(b"\0")])


def _poke(thread: int, register: int, value: int) -> None:
    if _libc.ptrace(_POKE, thread, register, value):
        raise OSError(ctypes.get_errno(), "a register cannot be set")


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
