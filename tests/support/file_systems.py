"""File systems of a test: one whose power can be cut, and a small one in memory.

Use them in an isolated process (`isolated.py`): only that process and its children see the mounts. When the last of
them ends, in whatever way, the system unmounts what is left and frees the loop device.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.isolated import Refused

_NEW_MOUNTS, _PRIVATE, _RECURSIVE = 0x20000, 1 << 18, 1 << 14  # CLONE_NEWNS, MS_PRIVATE, MS_REC
_GET_FREE, _SET_FILE, _LET_GO = (
    0x4C82,
    0x4C00,
    0x4C01,
)  # LOOP_CTL_GET_FREE, LOOP_SET_FD, LOOP_CLR_FD
_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
LOG_WRITTEN, LOG_LOST = (
    1,
    2,
)  # ..._LOGFLUSH, ..._NOLOGFLUSH: the journal in memory is written out first, or not
_SIZES = {
    "ext4": 16 << 20,
    "xfs": 300 << 20,
}  # the least that mkfs makes; most of it is never written
_ZRAM = Path("/sys/class/zram-control")
_libc = ctypes.CDLL(None, use_errno=True)


def own_mounts() -> None:
    """Keep the mounts that this process makes to itself and its children."""
    try:
        _checked(_libc.unshare(_NEW_MOUNTS))
        _checked(_libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None))
    except OSError as error:
        raise Refused(f"mounting a file system needs root ({error.strerror})") from error


def mount_memory(point: Path, size: int) -> None:
    """Mount an empty tmpfs of `size` bytes."""
    point.mkdir(exist_ok=True)
    _mount("tmpfs", point, "tmpfs", f"size={size}")


def in_memory(folder: Path) -> Path:
    """Return a new folder in memory, or on the disk if no tmpfs can be mounted."""
    point = folder / "memory"
    try:
        own_mounts()
        mount_memory(point, 1 << 30)
    except (Refused, OSError):
        point.mkdir(exist_ok=True)
    return point


@contextlib.contextmanager
def memory_device(kind: str) -> Iterator[Path | None]:
    """Make a fast block device in memory for a `Disk`; None if the system has none.

    The process that mounts it must end first: nothing else releases the device.
    """
    try:
        number = (_ZRAM / "hot_add").read_text().strip()
    except OSError:
        yield None
        return
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(_SIZES[kind]))
        yield Path(f"/dev/zram{number}")
    finally:
        _remove(number)


def _remove(number: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            (_ZRAM / "hot_remove").write_text(number)
            return
        except OSError:  # what is left of the test has yet to end
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


class Disk:
    """An ext4 or xfs, mounted at `point` on a given block device, or on an image file."""

    def __init__(self, kind: str, folder: Path, device: Path | None = None) -> None:
        self.kind = kind
        self.point = folder / kind
        self._device = device
        self.point.mkdir()
        self._image = folder / f"{kind}.image"
        if device is None:
            with open(self._image, "wb") as file:
                file.truncate(_SIZES[kind])
        make = shutil.which(f"mkfs.{kind}") or shutil.which(f"mkfs.{kind}", path="/usr/sbin:/sbin")
        if make is None:
            raise Refused(f"mkfs.{kind} is not installed")
        subprocess.run([make, "-q", device or self._image], check=True)
        try:
            self.mount()
        except OSError as error:
            raise Refused(f"{kind} cannot be mounted ({error.strerror})") from error

    def mount(self) -> None:
        """Mount it, and replay its journal if its power was cut."""
        if self._device is not None:
            _mount(str(self._device), self.point, self.kind)
            return
        loop = _attached(self._image)
        try:
            _mount(os.readlink(f"/proc/self/fd/{loop}"), self.point, self.kind)
        finally:
            os.close(
                loop
            )  # the mount alone holds it from now on, and no process that is forked off this one

    def cut_power(self, flag: int) -> None:
        """Let nothing reach the device from now on; only what did is there at the next mount."""
        descriptor = os.open(self.point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        """Unmount it and release the device; OSError if a file is still open."""
        _checked(_libc.umount2(os.fsencode(self.point), 0))


def _attached(image: Path) -> int:
    """Return a descriptor of a loop device that holds the image until its last user ends."""
    with contextlib.ExitStack() as stack:
        try:
            control = stack.enter_context(_opened("/dev/loop-control"))
            file = stack.enter_context(_opened(image))
            for _ in range(100):  # another process may take the free one first
                device = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
                loop = os.open(device, os.O_RDWR | os.O_CLOEXEC)
                second = stack.enter_context(_opened(device))
                with contextlib.suppress(BlockingIOError, OSError):
                    fcntl.ioctl(loop, _SET_FILE, file)
                    fcntl.ioctl(
                        second, _LET_GO
                    )  # in use, so that it is let go when it no longer is
                    return loop
                os.close(loop)
        except OSError as error:
            raise Refused(f"no loop device can be had ({error})") from error
    raise Refused("no loop device is free")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mount(device: str, point: Path, kind: str, options: str = "") -> None:
    _checked(_libc.mount(device.encode(), os.fsencode(point), kind.encode(), 0, options.encode()))


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
