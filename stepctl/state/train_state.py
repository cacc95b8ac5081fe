"""The training state: everything that an update may change and a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol, final

import numpy as np

from stepctl.state.arena import Arena, Array, all_finite, same_bits
from stepctl.state.counters import Counters
from stepctl.state.program_state import ProgramState, SavedProgramState
from stepctl.state.values import CapturedState

PREPROCESSING = "buffers/preprocessing"  # the folder of the statistics in a checkpoint


def restore_counters(counters: Counters, values: Mapping[str, int]) -> None:
    """Set counters to the values of a checkpoint, or of rank 0."""
    # in this run's order: HDF5 may return the names in another one
    counters._set({name: values[name] for name in counters})


class StatefulHook(Protocol):
    """An object with arrays of its own in a checkpoint."""

    @property
    def name(self) -> str:
        """The name of its folder in a checkpoint."""

    def state(self) -> Mapping[str, Array]:
        """Return its current arrays."""

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Restore the arrays of a checkpoint."""


@final
@dataclass(frozen=True)
class SavedHook:
    """A copy of a hook's arrays."""

    name: str
    arrays: Mapping[str, Array]

    def state(self) -> Mapping[str, Array]:
        """Return the arrays."""
        return self.arrays

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Fill the arrays in place."""
        for key, array in self.arrays.items():
            array[...] = state[key]


@final
@dataclass(frozen=True, repr=False)
class TrainState:
    """Counters, parameters, optimizer slots, averages, buffers, stateful hooks, a program's state.

    `arenas` holds what optimizers update, by the folder in a checkpoint: the parameters in
    "params", slots in "optimizers/<name>/<slot>", a moving average in "ema". With several models,
    each has a folder below: "params/<model>". `buffers` are the models' non-trainable arrays.
    `preprocessing` are the statistics that samples are standardized with, which never change.
    `program` is the state of a user's program, live or captured; None for a task.
    """

    counters: Counters
    arenas: Mapping[str, Arena]
    buffers: Arena = field(default_factory=lambda: Arena({}, np.float32, read_only=True))
    hooks: Sequence[StatefulHook] = ()
    program: ProgramState | SavedProgramState | CapturedState | None = None
    preprocessing: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arenas", MappingProxyType(dict(self.arenas)))

    def __repr__(self) -> str:
        counters = ", ".join(f"{name} {value:,}" for name, value in self.counters.items())
        folders = list(self.arenas)
        if self.buffers:
            folders.append("buffers")
        if self.preprocessing:
            folders.append(PREPROCESSING)
        folders += [f"hooks/{hook.name}" for hook in self.hooks]
        if self.program is not None:
            folders.append("state")
        return f"TrainState({counters}; {', '.join(folders)}; {self.n_bytes:,} bytes)"

    @property
    def params(self) -> Arena:
        """The parameters, if there is one model."""
        return self.arenas["params"]

    def arrays(self) -> dict[str, Array]:
        """Return every array by its path in a checkpoint: views, and the hooks' current arrays."""
        folders: dict[str, Mapping[str, Array]] = {
            folder: arena.new_views() for folder, arena in self.arenas.items()
        }
        folders["buffers"] = self.buffers.new_views()
        folders[PREPROCESSING] = self.preprocessing
        folders |= {f"hooks/{hook.name}": hook.state() for hook in self.hooks}
        if self.program is not None:
            folders["state"] = self.program.view().arrays
        return {
            f"{folder}/{path}": array
            for folder, arrays in folders.items()
            for path, array in arrays.items()
        }

    @property
    def values(self) -> str | None:
        """The plain values of a program's state as tagged JSON; None for a task."""
        return None if self.program is None else self.program.view().values

    def snapshot(self) -> TrainState:
        """Return the current state, unchanged by later updates.

        Only the hooks' arrays and a program's are copied, and arenas that are not read-only (see
        `Arena.snapshot`).
        """
        copied = self.with_copies()  # first, because a hook or a program may raise an error
        return replace(
            copied,
            counters=Counters(dict(self.counters)),
            arenas={folder: arena.snapshot() for folder, arena in self.arenas.items()},
            buffers=self.buffers.snapshot() if self.buffers else self.buffers,
        )

    def with_copies(self) -> TrainState:
        """Return this state with copies of what no arena holds: the hooks' arrays, a program's state."""
        program = None if self.program is None else self.program.capture()
        hooks = [
            SavedHook(hook.name, {key: array.copy() for key, array in hook.state().items()})
            for hook in self.hooks
        ]
        return replace(self, hooks=hooks, program=program)

    @property
    def in_snapshot(self) -> bool:
        """Whether the last snapshot holds the current buffers: no update came since."""
        return all(arena.in_snapshot for arena in self.arenas.values() if arena.read_only)

    def first_non_finite(self) -> str | None:
        """Return the path of the first array with a NaN or infinity, or None.

        Hooks and programs may have such arrays.
        """
        for path, array in replace(self, hooks=(), program=None).arrays().items():
            if not all_finite(array):
                return path
        return None

    def same_bits(self, other: TrainState) -> bool:
        """Tell whether both states have the same counters and values, and arrays with the same bits."""
        if dict(self.counters) != dict(other.counters):
            return False
        if self.values != other.values:
            return False
        arrays = self.arrays()
        other_arrays = other.arrays()
        if arrays.keys() != other_arrays.keys():
            return False
        return all(same_bits(array, other_arrays[path]) for path, array in arrays.items())

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())
