"""A directory that is written through one descriptor, wherever its path leads in the meantime.

    folder = Folder.opened(path)                  # held: every operation below goes through its descriptor
    folder.publish("config.yaml", [b"seed: 0"])
    folder.subfolder("checkpoints").names()

A held folder refuses to be written as soon as its path names another directory or none. `Folder(path)` is not held:
it works by path, for reading a run that another process trains, and for files that belong to no run.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, final

from stepctl import files
from stepctl.errors import RunMovedError, StepctlError
from stepctl.files import fsync, open_regular, remedy_of

TEMPORARY = ".tmp-"  # in the name of a file that is not published yet; the writer's pid follows
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

_OPEN: weakref.WeakSet[Descriptor] = weakref.WeakSet()


@final
class Descriptor:
    """A file descriptor that a forked child closes at once: kept there, it would hold the parent's locks."""

    def __init__(self, number: int) -> None:
        self._number = number
        _OPEN.add(self)

    @property
    def number(self) -> int:
        """The system's number; StepctlError in a forked child, and after `close`."""
        if self._number < 0:
            raise StepctlError("this process does not hold the run: write from the process that opened it")
        return self._number

    @property
    def closed(self) -> bool:
        """Tell whether it is closed, here or by a fork."""
        return self._number < 0

    def close(self) -> None:
        """Close it, once."""
        number, self._number = self._number, -1
        _OPEN.discard(self)
        if number >= 0:
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
        shown: Path | None = None,
        *,
        descriptor: Descriptor | None = None,
        parent: Folder | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """With a `descriptor` the folder is held; a folder below a held `parent` is held from its first use on.

        Messages call it `shown`, which may be relative. `guard` is called before each write, and raises if the folder
        must not be written any more.
        """
        self.path = path
        self.shown = shown or path
        self._descriptor, self._parent, self._guard = descriptor, parent, guard
        self._children: dict[str, Folder] = {}

    @classmethod
    def opened(cls, path: Path, shown: Path | None = None, guard: Callable[[], None] = lambda: None) -> Folder:
        """Hold a directory; OSError if there is none."""
        return cls(path, shown, descriptor=Descriptor(os.open(path, _DIRECTORY)), guard=guard)

    def close(self) -> None:
        """Let the directory go, and all below it."""
        for child in self._children.values():
            child.close()
        if self._descriptor is not None:
            self._descriptor.close()

    @property
    def dir_fd(self) -> int | None:
        """The descriptor, None if the folder is not held; OSError if it is below a held one and not there."""
        if self._descriptor is None and self._parent is not None:
            above = self._parent.dir_fd
            if above is not None:
                self._descriptor = Descriptor(os.open(self.path.name, _DIRECTORY, dir_fd=above))
        return None if self._descriptor is None else self._descriptor.number

    def subfolder(self, name: str) -> Folder:
        """Return the folder of that name, be it there or not; it is held while this one is."""
        if self._descriptor is None:
            return Folder(self.path / name, self.shown / name)
        return self._children.setdefault(name, Folder(self.path / name, self.shown / name, parent=self))

    def at(self, name: str) -> tuple[str, int | None]:
        """Return a file's path and dir_fd, as the functions of `os` take them."""
        dir_fd = self.dir_fd
        if dir_fd is None:
            return str(self.path / name), None
        return name, dir_fd

    def check(self) -> None:
        """Raise RunMovedError if the folder is held, and its path names another directory by now, or none.

        What the system cannot tell is taken for a yes: the descriptor is that of the right directory anyway.
        """
        if self._parent is not None:
            self._parent.check()
        if self.dir_fd is None or self._descriptor is None:
            return
        path, above = (self.path, None) if self._parent is None else self._parent.at(self.path.name)
        held = os.fstat(self._descriptor.number)
        try:
            named = os.stat(path, dir_fd=above)
        except (FileNotFoundError, NotADirectoryError):
            raise self._moved() from None
        except OSError:
            return
        if not os.path.samestat(held, named):
            raise self._moved()
        self._guard()

    def _moved(self) -> RunMovedError:
        return RunMovedError(
            f"{self.shown}: was renamed or removed while this process wrote in it; nothing more is written "
            "(a renamed run goes on with: stepctl resume NEW-NAME)"
        )

    # --- reading

    def names(self) -> list[str]:
        """Return the names of what is in the folder, none if there is no such folder.

        UnreadableError if it cannot be listed now, OSError if it is no directory.
        """
        try:
            dir_fd = self.dir_fd
            return os.listdir(self.path if dir_fd is None else dir_fd)
        except FileNotFoundError:
            files.refuse_broken_link(self.path)
            return []
        except OSError as error:
            if files.is_unavailable(error):
                raise files.unreadable(self.shown, error) from error
            raise

    def stat(self, name: str) -> os.stat_result | None:
        """Return the status of a file (of a link itself), None if there is none.

        UnreadableError if that cannot be told now.
        """
        try:
            path, dir_fd = self.at(name)
            return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if files.is_unavailable(error):
                raise files.unreadable(self.shown / name, error) from error
            return None

    def names_open_file(self, name: str, descriptor: int) -> bool:
        """Tell whether a name is that of an open file, and not of one that replaced it."""
        named = self.stat(name)
        return named is not None and os.path.samestat(os.fstat(descriptor), named)

    def free_name(self, name: str) -> str:
        """Return `name.aside-N` with the first N that is free."""
        asides = (f"{name}.aside-{number}" for number in itertools.count(1))
        return next(aside for aside in asides if self.stat(aside) is None)

    def open_regular(self, name: str) -> BinaryIO:
        """Open a file to read its bytes; OSError if it is not a regular one."""
        return open_regular(*self.at(name))

    # --- writing

    def open(self, name: str, flags: int) -> int:
        """Open or make a file to write in; return its descriptor."""
        self.check()
        path, dir_fd = self.at(name)
        return os.open(path, flags | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)

    def open_to_append(self, name: str) -> int:
        """Open a file, made if it is not there, to write behind its end; a symbolic link is refused."""
        return self.open(name, _APPEND)

    def make(self) -> None:
        """Create the folder durably, if it is not there."""
        path, above = (str(self.path), None) if self._parent is None else self._parent.at(self.path.name)
        if self._parent is not None:
            self._parent.check()
        try:
            os.mkdir(path, dir_fd=above)
        except FileExistsError:
            return
        (self._parent or Folder(self.path.parent)).sync()

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.check()
        path, dir_fd = self.at(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path, dir_fd=dir_fd)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, durably."""
        self.check()
        source, dir_fd = self.at(old)
        target, _ = self.at(new)
        os.rename(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        self.sync()

    def sync(self) -> None:
        """Make renames in the folder durable."""
        dir_fd = self.dir_fd
        # opened anew: after a failed fsync the same descriptor could report a success that is none
        number = os.open(self.path if dir_fd is None else ".", _DIRECTORY, dir_fd=dir_fd)
        try:
            fsync(number)
        finally:
            os.close(number)

    @contextlib.contextmanager
    def publishing(self, name: str) -> Iterator[int]:
        """Yield a descriptor to write a file through that is then there whole, durably, or not at all.

        Temporary file in the same directory (O_EXCL), write, fsync, rename, fsync of the directory. On any error
        the temporary file is removed and the descriptor given up: a failed fsync is never tried again on it.
        """
        temporary = f".{name}{TEMPORARY}{os.getpid()}"
        with writing(self.shown / name):
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
                    path, dir_fd = self.at(temporary)
                    os.unlink(path, dir_fd=dir_fd)
                raise

    def publish(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file of these chunks so that it is there whole, durably, or not at all."""
        with self.publishing(name) as descriptor:
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


def write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    """Write all of a chunk, however little the system takes at a time."""
    left = memoryview(chunk).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def publish(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file that belongs to no run so that it is there whole, durably, or not at all."""
    Folder(path.parent).publish(path.name, chunks)
