"""Files that may be anything: opened if they are regular ones, and looked for without taking an error for a no."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from stepctl.errors import UnreadableError

AnyPath = str | os.PathLike[str]

# These tell what the path is. After any other error nothing is known: the file may be intact, and readable later.
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
# what network and foreign file systems answer to F_FULLFSYNC
_NOT_OFFERED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expanded(path: str) -> str:
    """Return a path with a leading ~ or ~user and each $NAME or ${NAME} replaced, as a shell would.

    A file that exists under the path as it is written is meant literally. ValueError for a variable that is not set.
    """
    if path[:1] != "~" and "$" not in path:
        return path
    if os.path.lexists(path):
        return path

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"{path}: the environment variable {name} is not set; set it, or write the path out")
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(value_of, path))


def open_regular(path: str, dir_fd: int | None = None) -> BinaryIO:
    """Open a file to read its bytes; OSError for what is none: a pipe would be waited for, a device has no end."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=dir_fd)

    file = open(path, "rb", opener=opener)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file; copy its content into one", path)
    return file


def fsync(descriptor: int) -> None:
    """Wait until what was written to a file, or renamed in a directory, is on the disk; OSError if it is not.

    On macOS, os.fsync leaves it in the drive's cache; F_FULLFSYNC does not, where the file system has it.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
        else:
            return
    os.fsync(descriptor)


def remedy_of(error: OSError) -> str:
    """Return how to mend what the system refused to read or write."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "go where this user may, or let it; then run the command again"
    if error.errno == errno.ELOOP:
        return "put the file itself there instead of a symbolic link"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return "give another path"
    return "make room or mend the disk, then go on"


def is_unavailable(error: OSError) -> bool:
    """Tell whether an error says nothing about the file itself (EACCES, EIO, ESTALE, ETIMEDOUT, ...)."""
    return error.errno is not None and error.errno not in _ABOUT_THE_PATH


def unreadable(path: AnyPath, error: OSError) -> UnreadableError:
    """Return the error that a file cannot be read now, with its remedy."""
    remedy = "bring its disk or server back"
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "let this user read it"
    return UnreadableError(f"{os.fspath(path)}: cannot be read now: {error.strerror}; {remedy}, then try again")


def refuse_broken_link(path: AnyPath) -> None:
    """Raise UnreadableError if the path, or a folder above it, is a link to what is not there: an unmounted disk."""
    place = Path(path)
    while not _status(place, follow_symlinks=False) and place != place.parent:
        place = place.parent
    if _status(place, follow_symlinks=False) and not _status(place):
        target = os.readlink(place)
        remedy = "mount its disk, or mend the link, then try again"
        raise UnreadableError(f"{place}: cannot be read now: it is a link to {target}, which is not there; {remedy}")


def is_there(path: AnyPath) -> bool:
    """Tell whether something has this name; UnreadableError if that cannot be told (os.path.lexists would say no)."""
    return _status(path, follow_symlinks=False) is not None


def is_directory(path: AnyPath) -> bool:
    """Tell whether this is a directory; UnreadableError if that cannot be told, or at a link to what is not there."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: AnyPath) -> bool:
    """Tell whether this is a regular file; UnreadableError as for a directory."""
    return stat.S_ISREG(_mode(path))


def list_directory(path: AnyPath) -> list[str]:
    """Return the names in a directory, none if there is no such directory; UnreadableError if it cannot be listed."""
    try:
        return os.listdir(path)
    except FileNotFoundError:
        refuse_broken_link(path)
        return []
    except OSError as error:
        if is_unavailable(error):
            raise unreadable(path, error) from error
        raise


def _mode(path: AnyPath) -> int:
    """Return the mode of what is there, 0 if nothing is; UnreadableError at a broken link."""
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
