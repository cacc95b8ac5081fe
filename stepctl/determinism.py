"""Checks that the user's code computes the same first step each time, which exact resume requires."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np

from stepctl.arena import Array
from stepctl.assembly import Assembly, assemble
from stepctl.data.base import Sources
from stepctl.errors import ConfigError, NonFiniteError
from stepctl.problems import in_one_line, reason
from stepctl.registry import FOREIGN, is_builtin
from stepctl.tasks.base import OneUpdate, as_numbers
from stepctl.tasks.read_only import explained

_INSTANCES = 2
_NAMED = 3  # of what differs
_REMEDY = (
    "a run of this code breaks the promise of exact resume; draw random numbers from workspace.rng alone, and let "
    "nothing depend on earlier calls, time or threads (check_determinism: false leaves this check out)"
)


def find_difference(assembly: Assembly) -> str | None:
    """Compute the first step of a fresh run several times, and compare every bit; return a warning if one differs.

    Each time model, optimizer and task are built anew, start from the state of `assembly`, which stays as it is, and
    get the same random numbers. A user's data are loaded a second time, once. Stepctl's own code is not checked: its
    tests do that. None if no user's code takes part, or the config asks for no check. ConfigError if the code breaks
    its protocol.
    """
    if not assembly.config.check_determinism or not _has_users_code(assembly):
        return None
    with _global_random_kept():
        found = []
        for number in range(_INSTANCES):
            try:
                instance = _built_anew(assembly, share_sources=number == 0)
            except FOREIGN as error:
                why = in_one_line(reason(error), 200)
                return f"determinism could not be checked, as the run's parts cannot be built a second time: {why}"
            try:
                found.append(_first_step(instance, number))
            except ConfigError:
                raise
            except FOREIGN:  # the run's own first step will tell
                return None
    first, *others = found
    differing = [what for what in first if any(other.get(what) != first[what] for other in others)]
    if not differing:
        return None
    if "the batch" in differing:
        differing = ["the batch"]
    more = len(differing) - _NAMED
    names = [*differing[:_NAMED], *([f"{more} more"] if more > 0 else [])]
    return f"the first step, computed again on the same numbers, came out differently ({', '.join(names)}); {_REMEDY}"


def _has_users_code(assembly: Assembly) -> bool:
    learners = assembly.task.learners.values()
    parts: list[object] = [assembly.task, *assembly.sources]
    for learner in learners:
        parts += [learner.model, learner.optimizer, learner.optimizer.learning_rate]
    return not all(is_builtin(part) for part in parts)


def _built_anew(assembly: Assembly, *, share_sources: bool) -> Assembly:
    """Return another assembly of the same config and state; stepctl's own sources, which only read, are shared."""
    share_sources = share_sources or all(is_builtin(source) for source in assembly.sources)
    sources = Sources(*assembly.sources) if share_sources else None
    instance = assemble(assembly.config, sources=sources)
    for folder, arena in assembly.state.arenas.items():
        instance.state.arenas[folder].copy_from(arena)
    instance.state.buffers.copy_from(assembly.state.buffers)
    return instance


@np.errstate(all="ignore")
def _first_step(assembly: Assembly, trials: int) -> dict[str, str]:
    """Make the first step after so many trials, which must not matter; return digests of all that comes of it."""
    task, state = assembly.task, assembly.state
    batch = assembly.training.batch(state.counters.samples_seen)
    found = {"the batch": _digest(batch.x) + _digest(batch.y)}
    with contextlib.suppress(NonFiniteError), explained(state):
        for _ in range(trials):
            task.trial(state, batch)
        if isinstance(task, OneUpdate):
            gradient, metrics = task.gradient(state, batch)
            found |= {f"the {name}": repr(value) for name, value in as_numbers(metrics, "gradient").items()}
            found |= {f"the gradient of {name}": _digest(array) for name, array in gradient.items()}
        metrics = as_numbers(task.step(state, batch), "step")
        found |= {f"the {name} of the step": repr(value) for name, value in metrics.items()}
        found |= {f"/{path} after it": _digest(array) for path, array in _updated(assembly).items()}
    return found


def _updated(assembly: Assembly) -> dict[str, Array]:
    folders = {**assembly.state.arenas, "buffers": assembly.state.buffers}
    return {f"{folder}/{name}": array for folder, arena in folders.items() for name, array in arena.items()}


def _digest(array: Array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@contextlib.contextmanager
def _global_random_kept() -> Iterator[None]:
    """Leave the global generators as they are, which a user's code may use all the same."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
