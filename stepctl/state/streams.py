"""The random streams of a user's program: one generator per name, re-keyed at each step.

    streams = Streams(seed=0, purpose="steps")
    streams.begin_step(7)
    streams("proposal").standard_normal(3)  # a function of (seed, "proposal", 7)
    streams.end_step()

The draws of a step depend on the seed, the purpose, the name and the step only. Re-keying a Philox
takes about 1 us; creating a generator takes over 10 us.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, final

import numpy as np

from stepctl.errors import ConfigError, StepctlError
from stepctl.state.rng import refuse_attribute, seed_sequence


class StreamGenerator(np.random.Generator):
    """The generator of a stream. A class of its own, because it cannot be part of a state."""

    stream = "?"  # its name

    def __repr__(self) -> str:
        return f"rng({self.stream!r})"


class StreamBitGenerator(np.random.Philox):
    """The bit generator of a stream, which cannot be part of a state either."""


@final
class _Stream:
    """One Philox (Salmon et al. 2011) and its generator.

    The third word of the 256-bit counter is the step; the first two count the blocks drawn within the step.
    """

    def __init__(self, name: str, key: list[int]) -> None:
        self._philox = StreamBitGenerator(key=key)
        self._counter = [0, 0, 0, 0]
        self._state: Any = {
            "bit_generator": StreamBitGenerator.__name__,
            "state": {"counter": self._counter, "key": key},
            "buffer": [0, 0, 0, 0],
            "buffer_pos": 4,  # the buffer is used up
            "has_uint32": 0,
            "uinteger": 0,
        }
        self.generator = StreamGenerator(self._philox)
        self.generator.stream = name
        self.began = -1  # number of the step that it was re-keyed for

    def begin(self, step: int, number: int) -> None:
        """Restart for the step after `step` completed ones; `number` is its number in this process."""
        self._counter[2] = step
        self._philox.state = self._state
        self.began = number

    @property
    def is_kept(self) -> bool:
        """Whether anything else refers to the generator."""
        return sys.getrefcount(self.generator) > _OWN_REFERENCES


_OWN_REFERENCES = 2  # of the stream, and of the call that counts them


@final
class Streams:
    """Random generators by name. Within one step, one name is one generator.

    Each `purpose`, such as "steps" or "initial state", has keys of its own. A generator that is
    kept from an earlier step restarts with the step too, as if it had been requested again.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._seed = seed
        self._purpose = purpose
        self._step: int | None = None  # None outside of a step
        self._number = 0  # of the step in this process: tells a repeated step from its first run
        self._streams: dict[str, _Stream] = {}
        self._begun: list[_Stream] = []  # in this step

    def __repr__(self) -> str:
        names = ", ".join(self._streams) or "none yet"
        return f"Streams({self._purpose}, seed {self._seed}; {names})"

    def begin_step(self, step: int) -> None:
        """Start the step after `step` completed steps; each stream restarts."""
        self._step = step
        self._number += 1
        if self._begun:
            self._begun = [stream for stream in self._begun if stream.is_kept]
            for stream in self._begun:
                stream.begin(step, self._number)

    def end_step(self) -> None:
        """End a step: no stream can be requested until the next begins."""
        self._step = None
        self._number += 1

    def refuse_kept(self, owner: str) -> None:
        """Raise ConfigError if a generator is still in use after the call of `owner`."""
        kept = [stream for stream in self._begun if stream.is_kept]
        if kept:
            gc.collect()  # a cycle of the call's frames may still refer to one
            kept = [stream for stream in kept if stream.is_kept]
        for stream in kept:
            raise ConfigError(
                f"{owner} keeps the generator {stream.generator!r}, whose draws are the same only "
                "within it; in a step, call the step's rng, and put a generator that continues from "
                "step to step into the state: np.random.default_rng(...)"
            )

    def __call__(self, name: str) -> np.random.Generator:
        """Return the generator of a stream. A second call in the same step continues the stream."""
        stream = self._streams.get(name)
        if stream is None or stream.began != self._number:
            stream = self._restarted(name, stream)
        return stream.generator

    def _restarted(self, name: str, stream: _Stream | None) -> _Stream:
        step = self._step
        if step is None:
            raise StepctlError(
                f"rng({name!r}) is called outside of {self._purpose}; its draws belong to a step"
            )
        if stream is None:
            stream = self._streams[name] = self._create(name)
        stream.begin(step, self._number)
        self._begun.append(stream)
        return stream

    def __getattr__(self, name: str) -> Any:
        refuse_attribute(name)

    def _create(self, name: str) -> _Stream:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f'rng({name!r}): a stream is named by a non-empty string, as in rng("noise")'
            )
        words = seed_sequence(self._seed, f"program, {self._purpose}: {name}").generate_state(
            2, np.uint64
        )
        return _Stream(name, [int(word) for word in words])
