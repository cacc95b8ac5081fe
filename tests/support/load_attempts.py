"""Loads of a file in several ways, and their results."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from stepctl.errors import CheckpointError, UnreadableError
from stepctl.state.arena import Arena
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from tests.support.checkpoints import STEP, small_state, written
from tests.support.program_states import fresh_program, program_state, small_program

ACCEPTED = ("accepted", "")


class OtherBits(Exception):
    """A file was taken, and what it gave is not the small state."""


def attempt(path: Path, manner: str = "restored") -> tuple[str, str]:
    """Load a checkpoint; return the code (or else the exception's name) and message of its refusal."""
    try:
        load, _ = MANNERS[manner]
        load(path)
    except CheckpointError as error:
        return error.code, str(error)
    except UnreadableError as error:
        return "unreadable", str(error)
    except OtherBits:
        return "other bits", ""
    except Exception as error:
        return type(error).__name__, str(error)
    return ACCEPTED


def codec() -> Any:
    """Return the module as it is now: `mutants` exchanges it."""
    from stepctl.checkpoint import codec

    return codec


def restored(path: Path) -> None:
    with codec().Reader(path) as reader:
        if reader.header.values is None:
            restore_task(reader)
        else:
            restore_program(reader)


def restored_into_task(path: Path) -> None:
    with codec().Reader(path) as reader:
        restore_task(reader)


def restored_into_program(path: Path) -> None:
    with codec().Reader(path) as reader:
        restore_program(reader)


def restore_task(reader: Any) -> None:
    state = small_state()
    state.params.flat.fill(0)
    codec().restore(reader, state)
    if not state.same_bits(small_state()):
        raise OtherBits


def restore_program(reader: Any) -> None:
    # the module as it is now
    program = importlib.import_module("stepctl.state.program_state").ProgramState(fresh_program())
    state = dataclasses.replace(program_state({}, step=0), program=program)
    codec().restore(reader, state)
    if not state.same_bits(program_state(small_program())):
        raise OtherBits


def vetted(path: Path) -> None:
    """With an objection to any digest."""

    def vet(digest: str) -> None:
        raise CheckpointError("vetted", f"{path.name}: {digest}")

    codec().Reader(path, vet).close()


def after(harm: Callable[[Path], None], load: Callable[[Any], None]) -> Callable[[Path], None]:
    """Damage a file for a while after its digest was found right, and load it."""

    def manner(path: Path) -> None:
        data = path.read_bytes()
        try:
            with codec().Reader(path) as reader:
                harm(path)
                load(reader)
        finally:
            path.write_bytes(data)

    return manner


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def changed(path: Path) -> None:
    """Write in the middle until the file system's clock has advanced since the file was made."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(bytes(100))


def unreadable(path: Path) -> None:
    """Let every read of the open file fail."""
    failing = os.open("/proc/self/mem", os.O_RDONLY)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                os.dup2(failing, int(name), inheritable=False)
    os.close(failing)


def without_status(path: Path) -> None:
    """On a disk that fails when the open file is asked for its size."""
    with mock.patch.object(os, "fstat", side_effect=OSError(errno.EIO, "Input/output error")):
        codec().Reader(path).close()


def changed_while_checked(path: Path) -> None:
    """A change to bytes that the digest has seen already, before it has seen them all."""
    data = path.read_bytes()
    real = hashlib.file_digest

    def file_digest(*arguments: Any) -> Any:
        digest = real(*arguments)
        changed(path)
        return digest

    try:
        with mock.patch.object(hashlib, "file_digest", file_digest), codec().Reader(path) as reader:
            restore_large(reader)
    finally:
        path.write_bytes(data)


def restore_large(reader: Any) -> None:
    codec().restore(reader, large_state(2))


def read_parts(reader: Any) -> None:
    for path in reader.array_shapes():
        list(reader.parts(path))


def read_whole(reader: Any) -> None:
    reader.content(1 << 30)


def large_state(fill: float) -> TrainState:
    """A state that no buffer holds whole."""
    params = Arena({"weight": (100_000,), "bias": (100_000,)}, "float32")
    params.flat.fill(fill)
    return TrainState(Counters({"global_step": STEP, "samples_seen": 1}), {"params": params})


def large(folder: Path) -> Path:
    return written(folder, large_state(1))


MANNERS: dict[
    str, tuple[Callable[[Path], None], str]
] = {  # name -> what is done, code of the refusal
    "restored": (restored, "accepted"),
    "restored into a task": (restored_into_task, "mismatch"),
    "restored into a program": (restored_into_program, "mismatch"),
    "vetted": (vetted, "vetted"),
    "without status": (without_status, "unreadable"),
    "changed while it is checked": (changed_while_checked, "changed"),
    "cut, then restored": (after(cut, restore_large), "changed"),
    "changed, then restored": (after(changed, restore_large), "changed"),
    "unreadable, then restored": (after(unreadable, restore_large), "unreadable"),
    "changed, then read whole": (after(changed, read_whole), "changed"),
    "cut, then read in parts": (after(cut, read_parts), "changed"),
    "unreadable, then read in parts": (after(unreadable, read_parts), "unreadable"),
}
