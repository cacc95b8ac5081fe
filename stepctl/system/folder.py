"""A directory that is written through one descriptor, even if its path is renamed or replaced.

    folder = Folder.opened(path)                  # held: every operation below uses its descriptor
    folder.publish("config.yaml", [b"seed: 0"])
    folder.subfolder("checkpoints").names()

A held folder raises RunMovedError at the next write if its path leads to another directory or to
none. `Folder(path)` is not held and works by path: for reading a run that another process trains,
and for files outside of runs.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, final

from stepctl.errors import RunMovedError, StepctlError
from stepctl.system import files
from stepctl.system.files import fsync, open_regular, write_all, write_errors

TEMPORARY = ".tmp-"  # in the name of an unpublished file, before the writer's pid
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN: weakref.WeakSet[Descriptor] = weakref.WeakSet()


@final
class Descriptor:
    """A file descriptor that forked children close at once: a copy would keep the locks."""

    def __init__(self, number: int) -> None:
        self._number = number
        _OPEN.add(self)

    @property
    def number(self) -> int:
        """The system's number; StepctlError in a forked child, and after `close`."""
        if self.closed:
            raise StepctlError(
                "this process does not hold the run: write from the process that opened it"
            )
        return self._number

    @property
    def closed(self) -> bool:
        """Tell whether it was closed, here or after a fork."""
        return self._number < 0

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self.closed:
            return
        number = self._number
        self._number = -1
        _OPEN.discard(self)
        with contextlib.suppress(OSError):
            os.close(number)


def _close_in_child() -> None:
    for descriptor in list(_OPEN):
        descriptor.close()


os.register_at_fork(after_in_child=_close_in_child)


@final
class Folder:
    """A directory, by path or held through a descriptor. Names are of files directly in it."""

    def __init__(
        self,
        path: Path,
        display_path: Path | None = None,
        *,
        descriptor: Descriptor | None = None,
        parent: Folder | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Hold the folder if there is a `descriptor`, or if its `parent` is held.

        `display_path` is the path in messages; it may be relative. `guard` is called before each
        write and raises if the folder must not be written any more.
        """
        self.path = path
        self.display_path = display_path or path
        self._descriptor = descriptor
        self._parent = parent
        self._guard = guard
        self._children: dict[str, Folder] = {}
        self._status: os.stat_result | None = None  # of the held directory: which one it is

    @classmethod
    def opened(
        cls, path: Path, display_path: Path | None = None, guard: Callable[[], None] = lambda: None
    ) -> Folder:
        """Return a held folder; OSError if there is no such directory."""
        return cls(
            path, display_path, descriptor=Descriptor(os.open(path, _DIRECTORY)), guard=guard
        )

    def close(self) -> None:
        """Close the descriptors of this folder and of all folders below it."""
        for child in self._children.values():
            child.close()
        if self._descriptor is not None:
            self._descriptor.close()

    def dir_fd(self) -> int | None:
        """Return the descriptor, None if the folder is not held; a held one is opened on first use.

        OSError if a held folder is missing.
        """
        if self._descriptor is None and self._parent is not None:
            above = self._parent.dir_fd()
            if above is not None:
                self._descriptor = Descriptor(os.open(self.path.name, _DIRECTORY, dir_fd=above))
        if self._descriptor is None:
            return None
        return self._descriptor.number

    def subfolder(self, name: str) -> Folder:
        """Return the folder of that name, which need not exist; it is held if this one is."""
        path = self.path / name
        display_path = self.display_path / name
        if self._descriptor is None:
            return Folder(path, display_path)
        return self._children.setdefault(name, Folder(path, display_path, parent=self))

    def check_not_moved(self) -> None:
        """Raise RunMovedError if the folder is held and its path no longer leads to it.

        If the system cannot tell, writing continues: the descriptor is of the right directory in
        any case.
        """
        if self._parent is not None:
            self._parent.check_not_moved()
        if self.dir_fd() is None or self._descriptor is None:
            return
        if self._status is None:
            self._status = os.fstat(self._descriptor.number)
        path, above = self._own_path()
        try:
            named = os.stat(path, dir_fd=above)
        except (FileNotFoundError, NotADirectoryError):
            raise self._moved() from None
        except OSError:
            return
        if not os.path.samestat(self._status, named):
            raise self._moved()
        self._guard()

    def _moved(self) -> RunMovedError:
        return RunMovedError(
            f"{self.display_path}: was renamed or removed while this process was writing to it; "
            "nothing more is written (to continue a renamed run: stepctl resume NEW-NAME)"
        )

    def _own_path(self) -> tuple[str, int | None]:
        """Return the path and dir_fd of the folder itself, as the functions of `os` take them."""
        if self._parent is None:
            return str(self.path), None
        return self._parent._path_of(self.path.name)

    def _path_of(self, name: str) -> tuple[str, int | None]:
        """Return the path and dir_fd of a file, as the functions of `os` take them."""
        dir_fd = self.dir_fd()
        if dir_fd is None:
            return str(self.path / name), None
        return name, dir_fd

    # --- reading

    def names(self) -> list[str]:
        """Return the names in the folder, [] if it does not exist.

        UnreadableError if it cannot be listed now, OSError if it is not a directory.
        """
        try:
            dir_fd = self.dir_fd()
            return os.listdir(self.path if dir_fd is None else dir_fd)
        except FileNotFoundError:
            files.refuse_broken_link(self.path)
            return []
        except OSError as error:
            if files.is_unavailable(error):
                raise files.unreadable(self.display_path, error) from error
            raise

    def stat(self, name: str) -> os.stat_result | None:
        """Return the status of a file or of a link itself, None if it is missing.

        UnreadableError if the system cannot tell now.
        """
        try:
            path, dir_fd = self._path_of(name)
            return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if files.is_unavailable(error):
                raise files.unreadable(self.display_path / name, error) from error
            return None

    def is_open_file(self, name: str, descriptor: int) -> bool:
        """Tell whether a name still refers to an open file, and not to one that replaced it."""
        named = self.stat(name)
        return named is not None and os.path.samestat(os.fstat(descriptor), named)

    def aside_name(self, name: str) -> str:
        """Return `name.aside-N` with the first unused N >= 1."""
        number = 1
        while self.stat(f"{name}.aside-{number}") is not None:
            number += 1
        return f"{name}.aside-{number}"

    def open_regular(self, name: str) -> BinaryIO:
        """Open a regular file for reading; OSError for any other kind."""
        return open_regular(*self._path_of(name))

    # --- writing

    def open(self, name: str, flags: int) -> int:
        """Open or create a file for writing, and return its descriptor."""
        self.check_not_moved()
        path, dir_fd = self._path_of(name)
        return os.open(path, flags | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)

    def open_to_append(self, name: str) -> int:
        """Open a file to append to it, creating it if needed; OSError at a symbolic link."""
        return self.open(name, _APPEND)

    def create(self) -> None:
        """Create the folder durably if it does not exist."""
        path, above = self._own_path()
        if self._parent is not None:
            self._parent.check_not_moved()
        try:
            os.mkdir(path, dir_fd=above)
        except FileExistsError:
            return
        parent = self._parent or Folder(self.path.parent)
        parent.sync()

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self.check_not_moved()
        path, dir_fd = self._path_of(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path, dir_fd=dir_fd)

    def truncate(self, name: str, size: int) -> None:
        """Cut a file to `size` bytes durably. A file's size changes atomically, in one system call."""
        with write_errors(self.display_path / name):
            descriptor = self.open(name, os.O_RDWR | os.O_NOFOLLOW)
            try:
                os.ftruncate(descriptor, size)
                fsync(descriptor)
            finally:
                os.close(descriptor)

    def rename(self, old: str, new: str) -> None:
        """Rename a file durably."""
        self.check_not_moved()
        source, dir_fd = self._path_of(old)
        target, _ = self._path_of(new)
        os.rename(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        self.sync()

    def sync(self) -> None:
        """Make renames in the folder durable."""
        dir_fd = self.dir_fd()
        # After a failed fsync, a second one on the same descriptor may report success.
        number = os.open(self.path if dir_fd is None else ".", _DIRECTORY, dir_fd=dir_fd)
        try:
            fsync(number)
        finally:
            os.close(number)

    @contextlib.contextmanager
    def publishing(self, name: str) -> Iterator[int]:
        """Yield the descriptor of a new file, which appears complete and durable, or not at all.

        Temporary file in the same directory (O_EXCL), write, fsync, rename, fsync of the directory.
        After any error the temporary file is removed, and nothing is retried on a descriptor whose
        fsync failed.
        """
        temporary = f".{name}{TEMPORARY}{os.getpid()}"
        with write_errors(self.display_path / name):
            try:
                descriptor = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                try:
                    yield descriptor
                    fsync(descriptor)
                finally:
                    os.close(descriptor)
                self.rename(temporary, name)
            except BaseException:
                with contextlib.suppress(OSError, StepctlError):
                    path, dir_fd = self._path_of(temporary)
                    os.unlink(path, dir_fd=dir_fd)
                raise

    def publish(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file that appears under `name` complete and durable, or not at all."""
        with self.publishing(name) as descriptor:
            for chunk in chunks:
                write_all(descriptor, chunk)


def publish(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file outside of runs that appears complete and durable, or not at all."""
    Folder(path.parent).publish(path.name, chunks)
