"""Single files: inspecting, opening, writing through a descriptor, and their errors.

    if files.is_file(path):
        with files.open_regular(path) as file:
            ...
    with write_errors(path):
        write_all(descriptor, b"seed: 0")
        fsync(descriptor)

`os.path.exists` answers no when the disk does not answer. The functions here raise UnreadableError
then.
"""

import errno
import fcntl
import os
import re
import stat
from io import BufferedReader

from stepctl.errors import StepctlError, UnreadableError

AnyPath = str | os.PathLike[str]

# Errors that are facts about the path. After any other, the file may be intact, and readable later.
_ABOUT_THE_PATH = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EILSEQ,
        errno.ENXIO,  # a socket
    }
)
# F_FULLFSYNC fails with these on network and foreign file systems.
_NOT_SUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand_path(path: str) -> str:
    """Replace a leading ~ or ~user and each $NAME or ${NAME} in a path, as a shell does.

    A path that exists as written is returned unchanged. ValueError for a variable that is not set.
    """
    if path[:1] != "~" and "$" not in path:
        return path
    if os.path.lexists(path):
        return path
    for match in _VARIABLE.finditer(path):
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(
                f"{path}: the environment variable {name} is not set; set it, or give the full path"
            )
    return os.path.expanduser(os.path.expandvars(path))


# --- inspecting


def exists(path: AnyPath) -> bool:
    """Tell whether the name exists, even as a broken link; UnreadableError if unknown."""
    return _status(path, follow_symlinks=False) is not None


def is_directory(path: AnyPath) -> bool:
    """Tell whether this is a directory; UnreadableError if unknown, or at a broken link."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: AnyPath) -> bool:
    """Tell whether this is a regular file; UnreadableError if unknown, or at a broken link."""
    return stat.S_ISREG(_mode(path))


def refuse_broken_link(path: AnyPath) -> None:
    """Raise UnreadableError if the path or a parent is a broken link: an unmounted disk."""
    from pathlib import Path  # not at the top: `--help` needs none

    place = Path(path)
    while not _status(place, follow_symlinks=False) and place != place.parent:
        place = place.parent
    if _status(place, follow_symlinks=False) and not _status(place):
        target = os.readlink(place)
        remedy = "mount its disk, or repair the link, then try again"
        raise UnreadableError(
            f"{place}: cannot be read now: it is a link to {target}, which does not exist; {remedy}"
        )


def _mode(path: AnyPath) -> int:
    """Return the file's mode, 0 if there is none."""
    status = _status(path)
    if status is None:
        refuse_broken_link(path)
        return 0
    return status.st_mode


def _status(path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow_symlinks)
    except OSError as error:
        if is_unavailable(error):
            raise unreadable(path, error) from error
        return None


# --- reading


def open_regular(path: str, dir_fd: int | None = None) -> BufferedReader:
    """Open a regular file for reading; OSError for a pipe, which blocks, or a device."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=dir_fd)

    file = open(path, "rb", opener=opener)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file; copy its content into one", path)
    return file


def is_unavailable(error: OSError) -> bool:
    """Tell whether the file may be intact in spite of the error (EACCES, EIO, ESTALE, ...)."""
    return error.errno is not None and error.errno not in _ABOUT_THE_PATH


def unreadable(path: AnyPath, error: OSError) -> UnreadableError:
    """Return the error of a file that cannot be read now, with its remedy."""
    remedy = "reconnect its disk or server"
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "make it readable for this user"
    return UnreadableError(
        f"{os.fspath(path)}: cannot be read now: {error.strerror}; {remedy}, then try again"
    )


# --- writing


def write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    """Write a whole chunk: `os.write` may write only a part of it."""
    remaining = memoryview(chunk).cast("B")
    while remaining:
        n_written = os.write(descriptor, remaining)
        remaining = remaining[n_written:]


def fsync(descriptor: int) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk; OSError if they are not.

    On macOS, os.fsync leaves them in the drive's cache. F_FULLFSYNC does not, where the file system
    supports it.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        else:
            return
    os.fsync(descriptor)


class write_errors:
    """A context manager that raises an OSError as a StepctlError with the path and the remedy."""

    # not a generator, which takes three times as long: it is entered at every row
    __slots__ = ("_path",)

    def __init__(self, path: AnyPath) -> None:
        self._path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StepctlError(
                f"{self._path}: cannot be written: {error.strerror}; {remedy_of(error)}"
            ) from error


def is_disk_full(error: StepctlError) -> bool:
    """Tell whether a write failed because the disk or the quota is full."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def remedy_of(error: OSError) -> str:
    """Return the advice that ends the message of an OSError."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "use a directory you can write to, or change its permissions; then run the command again"
    if error.errno == errno.ELOOP:
        return "replace the symbolic link by the file itself"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return "give another path"
    return "free some space or repair the disk, then run the command again"
