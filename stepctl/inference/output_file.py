"""Files that the inference commands write: complete and durable, or not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

from stepctl.errors import ConfigError
from stepctl.system import process_signals
from stepctl.system.folder import Folder
from stepctl.system.text import in_one_line

if TYPE_CHECKING:
    from stepctl.state.arena import Array


def check_output(path: str, extensions: Collection[str], *, inputs: Collection[str] = ()) -> str:
    """Return the extension of an output file, such as ".csv".

    ConfigError if it is none of the `extensions`, or if the file is one of the `inputs`. An
    existing file of that name will be replaced.
    """
    extension = os.path.splitext(path)[1].lower()
    shown = in_one_line(path)
    if extension not in extensions:
        raise ConfigError(f"{shown}: unknown extension; name a file {_listed(extensions)}")
    for name in inputs:
        if os.path.exists(path) and os.path.exists(name) and os.path.samefile(path, name):
            raise ConfigError(f"{shown}: is the input too; write to another file")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(f"{shown}: its folder does not exist; create it, or give another path")
    if os.path.isdir(path):
        raise ConfigError(f"{shown}: is a folder; give the path of a file")
    return extension


def _listed(extensions: Collection[str]) -> str:
    *others, last = extensions
    return f"{', '.join(others)} or {last}" if others else last


@contextlib.contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """Yield a new file for writing, which appears under the path complete.

    Nothing is left after an error. SIGTERM and SIGHUP raise KeyboardInterrupt.
    """
    place = Path(path)
    with (
        _termination_as_interrupt(),
        Folder(place.parent).publishing(place.name) as descriptor,
        os.fdopen(os.dup(descriptor), "wb") as file,
    ):
        yield file


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on the signals that would end the process without any clean-up.

    Signals that are ignored or handled, and threads other than the main one, are left alone.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = process_signals.set_handler(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            process_signals.restore_handler(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def write_arrays(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    """Write arrays as an .npz archive; unlike np.savez, under any name."""
    import numpy as np

    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
