"""The number of checkpoints that retention keeps, computed without listing the steps."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from stepctl.config.cadence import Cadence, Steps
from stepctl.config.model import CheckpointConfig
from stepctl.reports.learning_rates import count_function
from stepctl.training.assembly import Assembly

_MAX_COMPARED = 10_000  # steps


class PlannedSteps(NamedTuple):
    """Training from global step `start` to `last`, with the saved steps and the forked ones."""

    start: int
    last: int
    saved: Sequence[int] = ()
    forked: Collection[int] = ()


def firing_steps(assembly: Assembly, cadence: Cadence, start: int, last: int) -> Steps:
    """Return the global steps after `start`, up to `last`, at which a cadence fires."""
    return cadence.steps(start, last, count_function(assembly, cadence.counter))


def keep_best_notes(assembly: Assembly, planned: PlannedSteps) -> list[str]:
    """Return a note if keep_best keeps nothing: no step has both an evaluation and a save."""
    config = assembly.config
    keep = config.checkpoint
    if keep.keep_best is None or keep.every_seconds is not None or planned.last <= planned.start:
        return []
    evaluate = config.evaluate.cadence()
    save = keep.cadence()
    # from the first step of the run, because an older checkpoint may be the best one
    evaluated = firing_steps(assembly, evaluate, config.initial_step, planned.last)
    saved = firing_steps(assembly, save, planned.start, planned.last)
    if any(step in evaluated for step in (*planned.saved, planned.last)):
        return []
    if _may_intersect(evaluated, saved):
        return []
    return [
        "checkpoint.keep_best keeps nothing: no evaluation falls on a save up to step "
        f"{planned.last} (evaluate.every {evaluate.every}, offset {evaluate.offset}; "
        f"checkpoint.every {save.every}, offset {save.offset}); choose values with common steps"
    ]


def _may_intersect(a: Steps, b: Steps) -> bool:
    """Tell whether two grids have a common step; assume it of very long ones."""
    few, many = sorted((a, b), key=len)
    n_compared = len(few)
    if isinstance(few, range) and isinstance(many, range):
        n_compared = min(n_compared, many.step)  # the remainders repeat from there on
    if n_compared > _MAX_COMPARED:
        return True
    return any(few[index] in many for index in range(n_compared))


def count_kept(planned: PlannedSteps, keep: CheckpointConfig, saves: Steps) -> tuple[int, int]:
    """Return the number of checkpoints after training, and the largest number at any time.

    `saves` is the grid of the saves to come. A checkpoint is removed only after the next one was
    saved. The numbers are upper bounds with `keep_best`, whose steps are unknown, and with
    `keep_every` if the saves follow another counter than the global step.
    """
    before = planned.saved or [planned.start]
    is_last_off_grid = planned.last > planned.start and planned.last not in saves
    after = [planned.last] if is_last_off_grid else []
    total = len(before) + len(saves) + len(after)
    if keep.keep_last is None or not (len(saves) or after):
        return total, total
    n_newest = min(keep.keep_last, total)
    oldest_of_newest = _element(total - n_newest, before, saves, after)
    older = {step for step in before if step < oldest_of_newest}
    kept_older = older & set(planned.forked)
    n_on_grid = 0
    if keep.keep_every is not None:
        kept_older |= {step for step in older if step % keep.keep_every == 0}
        n_on_grid = _count_multiples(saves, keep.keep_every, planned.start, oldest_of_newest)
    n_best = keep.keep_best.n if keep.keep_best else 0
    at_end = min(total, n_newest + n_on_grid + len(kept_older) + n_best)
    return at_end, min(total, max(at_end, len(before)) + 1)


def _element(index: int, before: Sequence[int], saves: Steps, after: Sequence[int]) -> int:
    """Return an element of the three sequences chained."""
    if index < len(before):
        return before[index]
    index -= len(before)
    if index < len(saves):
        return saves[index]
    return after[index - len(saves)]


def _count_multiples(saves: Steps, n: int, start: int, end: int) -> int:
    if isinstance(saves, range):
        return len(multiples(range(saves.start, min(saves.stop, end), saves.step), n))
    return min(len(saves), len(multiples(range(start + 1, end), n)))


def multiples(numbers: range, n: int) -> range:
    """Return the multiples of n in an ascending range.

    Solves start + k * step = 0 (mod n) for the smallest k; the solutions repeat every n / gcd(step,
    n).
    """
    common = math.gcd(numbers.step, n)
    if numbers.start % common:
        return range(0)
    period = n // common
    inverse = pow(numbers.step // common, -1, period)
    first = -(numbers.start // common) * inverse % period
    return range(numbers.start + first * numbers.step, numbers.stop, numbers.step * period)
