"""How a file fares when it is loaded in one of several manners."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from states import STEP, small_state, written
from stepctl.arena import Arena
from stepctl.errors import CheckpointError
from stepctl.state import Counters, TrainState

ACCEPTED = ("accepted", "")


def attempt(path: Path, manner: str = "restored") -> tuple[str, str]:
    """Load a checkpoint; return the code and the message of its refusal (an exception's name if it has no code)."""
    try:
        MANNERS[manner](path)
    except CheckpointError as error:
        return error.code, str(error)
    except Exception as error:
        return type(error).__name__, str(error)
    return ACCEPTED


def codec() -> Any:
    """Return the module as it is now: `mutants` exchanges it."""
    from stepctl.checkpoint import codec

    return codec


def restored(path: Path) -> None:
    with codec().Reader(path) as reader:
        codec().restore(reader, small_state())


def vetted(path: Path) -> None:
    """With an objection to any digest."""

    def vet(digest: str) -> None:
        raise CheckpointError("vetted", f"{path.name}: {digest}")

    codec().Reader(path, vet).close()


def after(harm: Callable[[Path], None], load: Callable[[Any], None]) -> Callable[[Path], None]:
    """Do harm to a file (for the time being) when its digest has been found right, and then load it."""

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
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(100))


def restore_large(reader: Any) -> None:
    codec().restore(reader, large_state(2))


def read_parts(reader: Any) -> None:
    for path in reader.array_shapes():
        list(reader.parts(path))


def large_state(fill: float) -> TrainState:
    """A state that no buffer holds whole."""
    params = Arena({"weight": (100_000,), "bias": (100_000,)}, "float32")
    params.flat.fill(fill)
    return TrainState(Counters({"global_step": STEP, "samples_seen": 1}), params, {}, Arena({}, "float32"))


def large(folder: Path) -> Path:
    return written(folder, large_state(1))


MANNERS: dict[str, Callable[[Path], None]] = {
    "restored": restored,
    "vetted": vetted,
    "cut, then restored": after(cut, restore_large),
    "changed, then restored": after(changed, restore_large),
    "cut, then read in parts": after(cut, read_parts),
}
