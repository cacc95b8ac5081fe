"""The protocol of an optimizer: clipping, parameter groups, and updates of flat arenas in blocks."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
import numpy.typing as npt

from stepctl.config.registry import Positive, is_builtin
from stepctl.errors import TornUpdate
from stepctl.optimizers.groups import (
    Frozen,
    GroupSlice,
    LearningRateMultipliers,
    Setting,
    WeightDecay,
    group_slices,
    owned_parts,
    settings_by_path,
)
from stepctl.optimizers.schedules import LearningRate
from stepctl.state.arena import Arena, Array, aligned_empty, spans, update_target
from stepctl.system.user_code import describe_error

if TYPE_CHECKING:
    from stepctl.optimizers.kernels import CompiledUpdate

# Elements of a block. A NumPy call on a block takes longer than passing the interpreter lock to
# another thread, and all arrays of a block fit in the last-level cache together.
BLOCK = 1 << 18
# Elements of an update that is worth a second thread. A worker of BLAS that still spins after the
# matrix products competes with it: below, two threads are no faster than one.
THREADED = 10_000_000


class UpdateInfo(NamedTuple):
    """The learning rate of an update, and its number among this optimizer's updates (1, 2, ...).

    An optimizer gets the rate and the weight decay of the parameters at hand.
    """

    learning_rate: float
    number: int
    weight_decay: float = 0.0


Tick = UpdateInfo  # the former name, which a user's optimizer may import


class Run(NamedTuple):
    """A range of the arenas whose parameters share the coefficients of an update."""

    start: int
    stop: int
    info: UpdateInfo
    coefficients: tuple[float, ...]


class Block(NamedTuple):
    """The same range of every arena: 1-D arrays of one length and dtype.

    `params` and `slots` are read-only. `update_block` writes the new values into `new_params` and
    `new_slots`. For a user's optimizer these are copies of the old values; for stepctl's own they
    are the target buffers with undefined values. `grads` and `scratch` may be overwritten.
    """

    params: Array
    slots: tuple[Array, ...]
    grads: Array
    new_params: Array
    new_slots: tuple[Array, ...]
    scratch: Array


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """An update rule: rates and coefficients, without arrays.

    `clip_norm` scales a gradient down to this global norm (Pascanu et al. 2013). `weight_decay`
    times the parameters, biases included, is added to the gradient after clipping.

    Args:
        learning_rate: The learning rate: a number, or a schedule.
        weight_decay: Multiple of the parameters that is added to the gradient after clipping;
            biases decay too. Or one for each pattern of paths.
        clip_norm: Largest global norm of the gradient, which is scaled down to it; by default it is
            not clipped.
        learning_rate_multipliers: Multiple of the learning rate for each pattern of paths; all
            other parameters have the learning rate itself.
        frozen: Patterns of the paths of parameters that are not trained. Their gradients do not
            count in the norm.
    """

    learning_rate: LearningRate
    weight_decay: WeightDecay = 0.0
    clip_norm: Positive | None = None
    learning_rate_multipliers: LearningRateMultipliers | None = None
    frozen: Frozen = ()

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """The names of the optimizer's arrays per parameter, such as ("momentum",)."""

    @abstractmethod
    def coefficients(self, info: UpdateInfo) -> tuple[float, ...]:
        """Return the numbers that `update_block` needs, the same for every block of an update."""

    @abstractmethod
    def update_block(self, block: Block, *coefficients: Array) -> None:
        """Write `new_params` and `new_slots`, element by element.

        The coefficients are 0-d arrays of the parameters' dtype, which ufuncs take faster than
        numbers.
        """

    def initial_slots(self, params: Arena) -> dict[str, Arena]:
        """Return the slots before the first update: zeros, laid out like the parameters."""
        return {slot: params.like() for slot in self.slots}

    @final
    def settings(self, paths: Collection[str]) -> dict[str, Setting]:
        """Return the setting of each of a model's parameters; ConfigError if a pattern is wrong."""
        return settings_by_path(
            paths, self.weight_decay, self.learning_rate_multipliers, self.frozen
        )

    @final
    def group_slices(self, layout: dict[str, slice]) -> list[GroupSlice]:
        """Return the ranges of an arena that an update treats alike, given its arrays' spans."""
        return group_slices(layout, self.settings(layout))

    @final
    def update(
        self,
        params: Arena,
        slots: dict[str, Arena],
        grads: Arena,
        info: UpdateInfo,
        *,
        groups: Sequence[GroupSlice] | None = None,
        threads: int = 1,
        compiled: CompiledUpdate | None = None,
    ) -> None:
        """Apply one update to this process's slice of the parameters and slots.

        `groups` are those of the parameters' layout, if the caller keeps them. Arenas in a
        snapshot are updated out of place, others in place. The gradient is overwritten. Neither the
        number of threads nor `compiled`, which is that of `compilation.compile_update`, changes the
        result. TornUpdate if an update in place fails halfway.
        """
        if groups is None:
            groups = self.group_slices(spans(params.shapes, params.dtype))
        arenas = [params, *[slots[name] for name in self.slots]]
        scale = self._clip_scale(grads, groups)
        old = [arena.flat for arena in arenas]
        new = [update_target(arena) for arena in arenas]
        owned = params.owned_slice
        n_elements = owned.stop - owned.start
        try:
            runs = self._runs(groups, info)
            if self.frozen:
                _copy_frozen(arenas, groups)
            if compiled is not None:
                sources = [arena.flat if arena.in_snapshot else None for arena in arenas]
                update_range = partial(compiled, sources, grads.flat, new, runs, scale)
            else:
                update_range = partial(self._update_range, old, grads.flat, new, runs, scale)
            if threads == 1 or n_elements < THREADED:
                update_range(owned.start, owned.stop)
            else:
                per_thread = -(-n_elements // (threads * BLOCK)) * BLOCK
                starts = range(owned.start, owned.stop, per_thread)
                ends = [min(start + per_thread, owned.stop) for start in starts]
                list(_thread_pool(threads).map(update_range, starts, ends))
        except Exception as error:
            if all(arena.in_snapshot for arena in arenas):
                raise  # nothing was updated in place
            raise TornUpdate(
                f"optimizer: failed in the middle of an update ({describe_error(error)})"
            ) from error
        for arena in arenas:
            arena.swap_buffers()

    def _runs(self, groups: Sequence[GroupSlice], info: UpdateInfo) -> list[Run]:
        """Return the slices that are trained, with the coefficients of this update."""
        known: dict[Setting, tuple[UpdateInfo, tuple[float, ...]]] = {}
        runs = []
        for start, stop, setting in groups:
            if setting.frozen:
                continue
            numbers = known.get(setting)
            if numbers is None:
                rate = info.learning_rate * setting.learning_rate_multiplier
                own_info = UpdateInfo(rate, info.number, setting.weight_decay)
                numbers = own_info, self.coefficients(own_info)
                known[setting] = numbers
            runs.append(Run(start, stop, *numbers))
        return runs

    @final
    def trial(self, dtype: npt.DTypeLike) -> None:
        """Update small arenas, so that an error in `update_block` is raised before training."""
        params = Arena({"x": (5,)}, dtype)
        grads = params.like()
        params["x"] = np.linspace(-1, 1, 5)
        grads["x"] = np.linspace(0.1, -0.2, 5)
        slots = {
            slot: arena.to_read_only(copy=True)
            for slot, arena in self.initial_slots(params).items()
        }
        whole = GroupSlice(0, len(params.flat), Setting(self._largest_weight_decay, 1.0, False))
        self.update(
            params.to_read_only(copy=True), slots, grads, UpdateInfo(0.1, 1), groups=[whole]
        )

    @property
    def _largest_weight_decay(self) -> float:
        if isinstance(self.weight_decay, Mapping):
            return max(self.weight_decay.values())
        return self.weight_decay

    def _update_range(
        self,
        old: Sequence[Array],
        grads: Array,
        new: Sequence[Array],
        runs: Sequence[Run],
        scale: float | None,
        start: int,
        end: int,
    ) -> None:
        """Update the elements from `start` to `end`, block by block; `scale` is for clipping."""
        dtype = old[0].dtype
        thread = threading.get_ident()
        scratch = _scratch(thread, dtype)
        # a user's optimizer gets copies, because it could keep a view of the state and write it
        # later
        copies: list[Array] = []
        if not is_builtin(self):
            copies = [_scratch(thread, dtype, index) for index in range(1, 1 + len(new))]
        for run_start, run_stop, info, coefficients in _with_arrays(runs, dtype):
            stop = min(run_stop, end)
            for first in range(max(run_start, start), stop, BLOCK):
                at = slice(first, min(first + BLOCK, stop))
                g = grads[at]
                if copies:
                    written = [copy[: len(g)] for copy in copies]
                    for array, before in zip(written, old, strict=True):
                        array[:] = before[at]
                else:
                    written = [array[at] for array in new]
                params, *slots = [array[at] for array in old]
                new_params, *new_slots = written
                block = Block(
                    params, tuple(slots), g, new_params, tuple(new_slots), scratch[: len(g)]
                )
                if scale is not None:
                    np.multiply(g, scale, out=g)
                if info.weight_decay:
                    block = self.decay(block, info)
                self.update_block(block, *coefficients)
                if copies:
                    for array, after in zip(written, new, strict=True):
                        after[at] = array

    def decay_factor(self, info: UpdateInfo) -> float:
        """Return the number by which `decay` multiplies the parameters."""
        return info.weight_decay

    def decay(self, block: Block, info: UpdateInfo) -> Block:
        """Apply weight decay before `update_block`, and return the block to update.

        By default, info.weight_decay * params is added to the gradient (L2 regularisation).
        """
        np.multiply(block.params, self.decay_factor(info), out=block.scratch)
        np.add(block.grads, block.scratch, out=block.grads)
        return block

    def _clip_scale(self, grads: Arena, groups: Sequence[GroupSlice]) -> float | None:
        """Return the factor that brings the gradient to `clip_norm`; None if it needs none."""
        if self.clip_norm is None:
            return None
        norm = gradient_norm(grads, groups)
        return self.clip_norm / norm if norm > self.clip_norm else None


def _with_arrays(
    runs: Iterable[Run], dtype: np.dtype[np.generic]
) -> Iterator[tuple[int, int, UpdateInfo, list[Array]]]:
    """Yield the runs with their coefficients as 0-d arrays."""
    known: dict[int, list[Array]] = {}  # runs of one setting share their coefficients
    for start, stop, info, coefficients in runs:
        arrays = known.get(id(coefficients))
        if arrays is None:
            arrays = [np.array(value, dtype) for value in coefficients]
            known[id(coefficients)] = arrays
        yield start, stop, info, arrays


def _copy_frozen(arenas: Sequence[Arena], groups: Sequence[GroupSlice]) -> None:
    """Copy the values of frozen parameters to the arenas that are updated out of place."""
    for arena in arenas:
        if arena.in_snapshot:
            target = update_target(arena)
            for at in owned_parts(arena, groups, frozen=True):
                target[at] = arena.flat[at]


def gradient_norm(grads: Arena, groups: Sequence[GroupSlice]) -> float:
    """Return the norm of a gradient, without frozen parameters, whose gradient is set to zero."""
    for at in owned_parts(grads, groups, frozen=True):
        grads.flat[at] = 0
    return global_norm(grads)


def global_norm(arena: Arena) -> float:
    """Return the Euclidean norm of all elements; the blocks' sums of squares are added exactly."""
    with np.errstate(over="ignore"):
        norm = _scaled_norm(arena, 1.0)
    if not math.isinf(norm):
        return norm
    # the squares overflow: scale the elements by the largest
    largest = max(arena.partition.map_blocks(_max_abs, arena.flat))
    if math.isinf(largest):
        return norm
    return largest * _scaled_norm(arena, 1 / largest)


def _scaled_norm(arena: Arena, scale: float) -> float:
    def sum_of_squares(block: Array) -> float:
        scaled = block if scale == 1 else block * scale
        return float(np.dot(scaled, scaled))

    return math.sqrt(math.fsum(arena.partition.map_blocks(sum_of_squares, arena.flat)))


def _max_abs(block: Array) -> float:
    return float(np.abs(block).max())


@lru_cache(maxsize=1)
def _thread_pool(threads: int) -> ThreadPoolExecutor:
    # non-finite values are checked elsewhere, and each thread has an errstate of its own
    return ThreadPoolExecutor(threads, "optimizer", initializer=lambda: np.seterr(all="ignore"))


@lru_cache(maxsize=64)
def _scratch(thread: int, dtype: np.dtype[np.generic], index: int = 0) -> Array:
    """Return the scratch array with this index of a thread, (BLOCK,)."""
    return aligned_empty((BLOCK,), dtype)
