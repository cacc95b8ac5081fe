"""Files that may be anything: opened if they are regular ones, and looked for without taking an error for a no."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def open_regular(path: str) -> BinaryIO:
    """Open a file to read its bytes; OSError for what is none: a pipe would be waited for, a device has no end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file; copy its content into one", path)
    return file


def remedy_of(error: OSError) -> str:
    """Return how to mend what the system refused to read or write."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "go where this user may, or let it; then run the command again"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return "give another path"
    return "make room or mend the disk, then go on"


def is_there(path: str | os.PathLike[str]) -> bool:
    """Tell whether something has this name; OSError if that cannot be told (os.path.lexists would say no)."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True
