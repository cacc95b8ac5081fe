"""The lock of a run directory: at most one process writes to a run."""

import contextlib
import fcntl
import json
import os
import stat
import time
from pathlib import Path
from typing import NamedTuple, Self

from stepctl.distributed import launcher
from stepctl.errors import RunInUseError, RunMovedError, StepctlError, UnreadableError
from stepctl.rundir.json_lines import parse_row
from stepctl.system.closing import close_on_error
from stepctl.system.files import is_disk_full, write_all, write_errors
from stepctl.system.folder import Descriptor, Folder
from stepctl.system.shell import command

_NAME = "lock"
N_BYTES = 512  # size of the lock file
_ATTEMPTS = 100
_RETRY_SECONDS = 0.01


class Holder(NamedTuple):
    """The process named in the lock file, which may be damaged: no field is reliable."""

    host: str
    boot_id: str
    pid: int | None

    @classmethod
    def parse(cls, line: bytes) -> Self | None:
        """Return the holder that a lock file names; None if it is empty or unreadable."""
        row = parse_row(line)
        if not row:
            return None
        pid = row.get("pid")
        return cls(
            host=str(row.get("host", "?")),
            boot_id=str(row.get("boot_id")),
            pid=pid if isinstance(pid, int) else None,
        )

    def __str__(self) -> str:
        pid = "?" if self.pid is None else self.pid
        return f"process {pid} on {self.host}"

    @property
    def other_host(self) -> str | None:
        """The host that alone can tell whether the process is alive; None if it is this one."""
        if self.host == os.uname().nodename:
            return None
        return self.host

    @property
    def ended_with_its_boot(self) -> bool:
        """Tell whether this host was restarted since."""
        return self.other_host is None and self.boot_id != boot_id()

    def may_be_alive(self) -> bool:
        """Return False only if no process of this boot of this host has the pid."""
        if self.other_host is not None or self.boot_id != boot_id():
            return True
        return self.pid is not None and is_pid_in_use(self.pid)


class Lock:
    """The locks of a process on a run: flock on the directory, if supported, and on the file
    `lock`.

    The lock on the directory excludes other processes even if the file is removed. Where only the
    file can be locked, removing it lets another process in, so the holder checks the file before
    each write.
    """

    def __init__(self, root: Path, display_path: Path) -> None:
        """Acquire both locks; RunInUseError if another process holds one."""
        self._display_path = display_path
        self._path = display_path / _NAME
        self._file: Descriptor | None = None
        with write_errors(self._path):
            self.folder = Folder.opened(root, display_path, self._check_file)
        with close_on_error(self):
            self._directory_is_locked = self._lock_directory()
            self._file = self._lock_file()

    def read_holder(self) -> Holder | None:
        """Return the process that wrote the lock file last, None if it released the lock."""
        with contextlib.suppress(OSError), self.folder.open_regular(_NAME) as file:
            return Holder.parse(file.read(N_BYTES))
        return None

    def write_holder(self) -> None:
        """Write this process to the lock file, unless the disk is full: the lock is held anyway."""
        assert self._file is not None
        holder = Holder(os.uname().nodename, boot_id(), os.getpid())
        line = json.dumps(holder._asdict()) + "\n"
        try:
            with write_errors(self._path):
                # A single write of constant length: a reader sees the old holder or the new one.
                write_all(self._file.number, line.ljust(N_BYTES).encode())
        except StepctlError as error:
            if not is_disk_full(error):
                raise

    def close(self) -> None:
        """Release the locks; in a forked child, which holds none, do nothing."""
        if self._file is not None and not self._file.closed:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.number, 0)
            self._file.close()
        self.folder.close()

    def _lock_directory(self) -> bool:
        """Lock the directory; return False if the file system does not support that."""
        dir_fd = self.folder.dir_fd()
        assert dir_fd is not None
        try:
            self._acquire(dir_fd)
        except OSError:
            return False
        return True

    def _lock_file(self) -> Descriptor:
        """Create or open the file, and lock it."""
        while True:
            file = self._open_file()
            with close_on_error(file):
                self._acquire_file(file)
                if self.folder.is_open_file(_NAME, file.number):
                    return file
            file.close()  # it was removed or replaced meanwhile

    def _open_file(self) -> Descriptor:
        # O_NOFOLLOW: the file is written and truncated, and a link would lead to another file
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with write_errors(self._path):
            return Descriptor(self.folder.open(_NAME, flags))

    def _acquire_file(self, file: Descriptor) -> None:
        if not stat.S_ISREG(os.fstat(file.number).st_mode):
            raise StepctlError(
                f"{self._path}: is not a regular file; remove it, then run the command again"
            )
        try:
            self._acquire(file.number)
        except OSError as error:
            remedy = "put the run on a file system that supports flock"
            raise StepctlError(
                f"{self._display_path}: cannot be locked: {error.strerror}; {remedy}"
            ) from error

    def _acquire(self, descriptor: int) -> None:
        """Lock an open file; RunInUseError if another process holds it, OSError if unsupported."""
        holder: Holder | None = None
        for _ in range(_ATTEMPTS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = self.read_holder()
                if holder and holder.may_be_alive():
                    break
                # The other process has not written its name yet, or is just releasing the lock.
                time.sleep(_RETRY_SECONDS)
        raise RunInUseError(self._in_use_message(holder))

    def _in_use_message(self, holder: Holder | None) -> str:
        remedy = f"wait for it, or stop it{launcher.srun_hint()}"
        if holder and holder.pid == os.getpid() and holder.may_be_alive():
            remedy = (
                "this program has already opened it; close it first: run.close(), or leave its loop"
            )
        return f"{self._display_path}: in use by {holder or 'another process'}; {remedy}"

    def _check_file(self) -> None:
        """Raise RunMovedError if another process may have locked the run."""
        if self._file is None:
            return
        try:
            named = self.folder.stat(_NAME)
        except UnreadableError:  # not a sign of another process
            return
        if named is None and self._directory_is_locked:
            return
        if named is None or not os.path.samestat(os.fstat(self._file.number), named):
            raise RunMovedError(
                f"{self._path}: was removed or replaced, so another process may hold the run; "
                f"nothing more is written (continue with: {command('resume', self._display_path)})"
            )


def is_pid_in_use(pid: int) -> bool:
    """Tell whether this system has a process with this pid."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def boot_id() -> str:
    """Return the id of this boot of the system, "unknown" where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
