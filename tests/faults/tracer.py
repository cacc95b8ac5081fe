"""Do something to a process at one of its system calls: kill it there, let the call fail, or let it do half its work.

The process is forked off here and traced by ptrace, all threads of it. Seen are the calls that touch a file below one
folder; each is known by its name, its file and how often that came before, so that threads may take turns as they like.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from apart import Refused

_POKE, _SYSCALL, _SEIZE, _INFO = 6, 24, 0x4206, 0x420E
_TRACE_SYSCALLS, _TRACE_CLONES, _EXIT_KILL = 0x1, 0x8, 0x100000  # PTRACE_O_TRACESYSGOOD, TRACECLONE, EXITKILL
_ALL_THREADS = 0x40000000  # __WALL
_RAX, _RDX, _ORIG_RAX = 80, 96, 120  # offsets of the registers in struct user
_ENTERS, _LEAVES = 1, 2
_AT_CWD = -100

# by its number on x86_64: the name, and which arguments are descriptors (f), paths (p), or paths below a descriptor (a)
_CALLS = {
    0: ("read", "f"), 1: ("write", "f"), 2: ("open", "p"), 3: ("close", "f"), 4: ("stat", "p"), 5: ("fstat", "f"),
    6: ("lstat", "p"), 8: ("lseek", "f"), 16: ("ioctl", "f"), 17: ("pread64", "f"), 18: ("pwrite64", "f"),
    19: ("readv", "f"), 20: ("writev", "f"), 21: ("access", "p"), 40: ("sendfile", "f"), 72: ("fcntl", "f"),
    73: ("flock", "f"), 74: ("fsync", "f"), 75: ("fdatasync", "f"), 76: ("truncate", "p"), 77: ("ftruncate", "f"),
    82: ("rename", "pp"), 83: ("mkdir", "p"), 84: ("rmdir", "p"), 85: ("creat", "p"), 86: ("link", "pp"),
    87: ("unlink", "p"), 88: ("symlink", "pp"), 89: ("readlink", "p"), 90: ("chmod", "p"), 91: ("fchmod", "f"),
    217: ("getdents64", "f"), 257: ("openat", "a"), 258: ("mkdirat", "a"), 262: ("newfstatat", "a"),
    263: ("unlinkat", "a"), 264: ("renameat", "aa"), 265: ("linkat", "aa"), 267: ("readlinkat", "a"),
    269: ("faccessat", "a"), 277: ("sync_file_range", "f"), 285: ("fallocate", "f"), 316: ("renameat2", "aa"),
    326: ("copy_file_range", "f"), 332: ("statx", "a"), 439: ("faccessat2", "a"), 280: ("utimensat", "a"),
}  # fmt: skip
WRITES = {"write", "pwrite64"}


class Call(NamedTuple):
    """One system call of a run: `file` as seen from the folder, with the process's number left out."""

    name: str
    file: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.name} {self.file}" + (f" ({self.nth})" if self.nth > 1 else "")


class Blow(NamedTuple):
    """What happens at a call: `signal` is sent; `error`: it fails with this errno; `half`: it writes half; `kill`."""

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
        self._folder, self._blows = os.path.realpath(folder), blows
        self._counts: Counter[tuple[str, str]] = Counter()
        self._at_leave: dict[int, Callable[[], None]] = {}  # by thread, what is left to do when its call ends

    def follow(self, pid: int) -> int:
        """Trace a process that was started by `held` to its end; return its exit code, or -N for signal N."""
        options = _TRACE_SYSCALLS | _TRACE_CLONES | _EXIT_KILL
        if _libc.ptrace(_SEIZE, pid, None, options):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Refused(f"a process cannot be traced ({os.strerror(ctypes.get_errno())})")
        os.kill(pid, signal.SIGCONT)
        while True:
            thread, status = os.waitpid(-1, _ALL_THREADS)
            if not os.WIFSTOPPED(status):
                if thread == pid:
                    return os.waitstatus_to_exitcode(status)
            else:
                self._stopped(pid, thread, status)

    def _stopped(self, pid: int, thread: int, status: int) -> None:
        number, event = os.WSTOPSIG(status), status >> 16
        if number == signal.SIGTRAP | 0x80:
            self._at_call(pid, thread)
            number = 0
        elif event:
            number = 0
        _libc.ptrace(_SYSCALL, thread, None, number)

    def _at_call(self, pid: int, thread: int) -> None:
        info = _Info()
        _libc.ptrace(_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == _LEAVES:
            self._at_leave.pop(thread, _nothing)()
        elif info.op == _ENTERS:
            self._enters(pid, thread, info)

    def _enters(self, pid: int, thread: int, info: _Info) -> None:
        files = [file for file in self._files(pid, info) if file is not None]
        if files:
            name, file = _CALLS[info.nr][0], re.sub(r"tmp-\d+", "tmp-PID", " -> ".join(files))
            self._counts[name, file] += 1
            call = Call(name, file, self._counts[name, file])
            self.calls.append(call)
            if call in self._blows:
                self.struck.add(call)
                self._at_leave[thread] = _strike(pid, thread, self._blows[call], info)

    def _files(self, pid: int, info: _Info) -> Iterator[str | None]:
        """Yield, for each file of a call, its path below the folder; None for one outside."""
        _, kinds = _CALLS.get(info.nr, ("", ""))
        position = 0
        for kind in kinds:
            base = ""
            if kind in "fa":
                base = _descriptor(pid, ctypes.c_int(info.args[position]).value)
                position += 1
            path = base if kind == "f" else os.path.join(base, _text(pid, info.args[position]))
            position += kind in "pa"
            whole = os.path.normpath(path if path.startswith("/") else os.path.join(_descriptor(pid, _AT_CWD), path))
            yield os.path.relpath(whole, self._folder) if f"{whole}/".startswith(f"{self._folder}/") else None


def _strike(pid: int, thread: int, blow: Blow, info: _Info) -> Callable[[], None]:
    """Do what is to be done when a call begins; return what is left for its end."""
    if blow.signal:
        os.kill(pid, blow.signal)
    if blow.error:
        _poke(thread, _ORIG_RAX, -1)
        return lambda: _poke(thread, _RAX, -blow.error)
    if blow.half:
        _poke(thread, _RDX, max(info.args[2] // 2, 1))
        return (lambda: _kill(pid)) if blow.kill else lambda: _poke(thread, _RDX, info.args[2])
    if blow.kill:
        _kill(pid)
    return _nothing


def held(start: Callable[[Callable[[], None]], int]) -> int:
    """Return start(stop), once the process that it forks has called `stop` in itself, and stands still."""
    if platform.machine() != "x86_64":
        raise Refused("system calls are known by their numbers on x86_64 alone")
    pid = start(lambda: signal.raise_signal(signal.SIGSTOP))
    os.waitpid(pid, os.WUNTRACED)
    return pid


def _descriptor(pid: int, number: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd" if number == _AT_CWD else f"/proc/{pid}/fd/{number}")
    except OSError:
        return ""


def _text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        text = b""
        while b"\0" not in text:
            start = address + len(text)
            memory.seek(start)
            text += memory.read(min(4096 - start % 4096, 256))  # not into the next page, which may not be there
    return re.sub(rb"\0.*", b"", text, flags=re.DOTALL).decode(errors="surrogateescape")


def _poke(thread: int, register: int, value: int) -> None:
    if _libc.ptrace(_POKE, thread, register, value):
        raise OSError(ctypes.get_errno(), "a register cannot be set")


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _nothing() -> None:
    pass
