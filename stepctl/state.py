"""The state of training: everything that changes and is saved. Data only; the trainer moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol, final

import numpy as np

from stepctl.arena import Arena, Array, all_finite, same_bits

GLOBAL_STEP = "global_step"
SAMPLES_SEEN = "samples_seen"
_LARGEST = 2**63 - 1


class Counters(Mapping[str, int]):
    """Named counts that only ever grow: `global_step`, `samples_seen`, and one per optimizer (int64 on disk).

    There is no setter. The trainer, and nothing else, calls `advance` once an update is complete.
    """

    def __init__(self, values: Mapping[str, int]) -> None:
        for required in (GLOBAL_STEP, SAMPLES_SEEN):
            if required not in values:
                raise ValueError(f"counter {required!r} is missing")
        self._set(values)

    def _set(self, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            if not 0 <= value <= _LARGEST:
                raise ValueError(f"counter {name!r} is {value}: outside 0..2^63-1")
        self._values = dict(values)
        self._before = self._values  # the last update

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Counters({self._values})"

    @property
    def global_step(self) -> int:
        """Completed parameter updates since step 0, by anybody, in any process."""
        return self._values[GLOBAL_STEP]

    @property
    def samples_seen(self) -> int:
        """Training samples that those updates used; the position in the data."""
        return self._values[SAMPLES_SEEN]

    def advance(self, increments: Mapping[str, int]) -> None:
        """Count one completed update. For the trainer alone."""
        for name, increment in increments.items():
            if not 0 <= increment <= _LARGEST - self._values[name]:
                raise ValueError(f"counter {name!r} cannot go from {self._values[name]} by {increment}")
        self._before = dict(self._values)
        for name, increment in increments.items():
            self._values[name] += increment

    def crossed(self, name: str, every: int, offset: int = 0) -> bool:
        """Tell whether the last update took a counter to a value with value % every == offset, or past one.

        One that rises by more than one at a time may pass such a value without ever standing there.
        """
        return crosses(self._before[name], self._values[name], every, offset)


def restore_counters(counters: Counters, values: Mapping[str, int]) -> None:
    """Set counters to what a checkpoint, or rank 0, has for them."""
    # in the order in which this run counts them: names come back from HDF5 in that order, but need not
    counters._set({name: values[name] for name in counters})


Trigger = Callable[[Counters], bool]


def crosses(before: int, after: int, every: int, offset: int) -> bool:
    """Tell whether a count that goes from `before` to `after` comes to a value with value % every == offset."""
    return (after - offset) // every > (before - offset) // every


def trigger(name: str, every: int | None, offset: int, also: int | None) -> Trigger:
    """Return what tells, asked after each update of a segment, whether that took a counter to the grid or past it.

    The segment's first update fires too if it came to the global step `also`. Without `every`, none does.
    """
    if every is None:
        return lambda counters: False
    next_value = 0

    def fires(counters: Counters) -> bool:
        nonlocal next_value
        value = counters[name]
        if value < next_value:  # most often, and at once
            return False
        next_value = value - (value - offset) % every + every
        return counters.crossed(name, every, offset) or counters.global_step == also

    return fires


class Remembers(Protocol):
    """What has arrays of its own in a checkpoint: a hook."""

    @property
    def name(self) -> str:
        """The name of their folder there."""

    def state(self) -> Mapping[str, Array]:
        """Return the arrays as they are now."""

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Go on from the arrays of a checkpoint."""


@final
@dataclass(frozen=True)
class Remembered:
    """What a hook remembered when it was asked."""

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
    """All that an update may change.

    `arenas` holds by its folder in a checkpoint what optimizers update: the parameters in "params", slots in
    "optimizers/<name>/<slot>", a moving average in "ema". With several models, each has a folder of its own there:
    "params/<model>". `buffers` holds the models' non-trainable arrays; `hooks` those that remember something.
    """

    counters: Counters
    arenas: Mapping[str, Arena]
    buffers: Arena = field(default_factory=lambda: Arena({}, np.float32, read_only=True))
    hooks: Sequence[Remembers] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "arenas", MappingProxyType(dict(self.arenas)))

    def __repr__(self) -> str:
        counters = ", ".join(f"{name} {value:,}" for name, value in self.counters.items())
        folders = [*self.arenas, *(["buffers"] if self.buffers else []), *(f"hooks/{hook.name}" for hook in self.hooks)]
        return f"TrainState({counters}; {', '.join(folders)}; {self.n_bytes:,} bytes)"

    @property
    def params(self) -> Arena:
        """The parameters, where there is one model."""
        return self.arenas["params"]

    def arrays(self) -> dict[str, Array]:
        """Return every array but the counters by its path in a checkpoint: views, and what the hooks return."""
        folders: dict[str, Mapping[str, Array]] = {folder: arena.new_views() for folder, arena in self.arenas.items()}
        folders["buffers"] = self.buffers.new_views()
        folders |= {f"hooks/{hook.name}": hook.state() for hook in self.hooks}
        return {f"{folder}/{path}": array for folder, arrays in folders.items() for path, array in arrays.items()}

    def hand_over(self) -> TrainState:
        """Return the state as it is now, which no update changes any more.

        Copied is what the hooks return, and arenas that are not read-only.
        """
        hooks = self._remembered()  # first, as this may fail
        return TrainState(
            counters=Counters(dict(self.counters)),
            arenas={folder: arena.hand_over() for folder, arena in self.arenas.items()},
            buffers=self.buffers.hand_over() if self.buffers else self.buffers,
            hooks=hooks,
        )

    def with_hooks_asked(self) -> TrainState:
        """Return this state with a copy of what the hooks return now."""
        return replace(self, hooks=self._remembered())

    def _remembered(self) -> tuple[Remembered, ...]:
        return tuple(
            Remembered(hook.name, {key: array.copy() for key, array in hook.state().items()}) for hook in self.hooks
        )

    @property
    def handed_over(self) -> bool:
        """Tell whether no arena was updated since `hand_over`."""
        return all(arena.handed_over for arena in self.arenas.values() if arena.read_only)

    def first_non_finite(self) -> str | None:
        """Return the path of the first array that an update made NaN or infinite in part; hooks may hold such."""
        for path, array in self.arrays().items():
            if not path.startswith("hooks/") and not all_finite(array):
                return path
        return None

    def same_bits(self, other: TrainState) -> bool:
        """Tell whether both states are the same to the bit."""
        mine, theirs = self.arrays(), other.arrays()
        return (
            dict(self.counters) == dict(other.counters)
            and mine.keys() == theirs.keys()
            and all(same_bits(mine[path], theirs[path]) for path in mine)
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return int(np.sum([array.nbytes for array in self.arrays().values()], dtype=np.int64))
