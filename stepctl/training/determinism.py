"""A check that user code computes the same first step each time, which exact resume requires."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np

from stepctl.config.model import ScriptConfig
from stepctl.config.registry import USER_CODE_ERRORS, is_builtin
from stepctl.data.base import Sources
from stepctl.errors import ConfigError, NonFiniteError
from stepctl.programs.base import OneUpdate, as_numbers
from stepctl.programs.model_loss import ModelLoss
from stepctl.state.arena import Array
from stepctl.state.program_state import ProgramState
from stepctl.state.read_only import explain_read_only
from stepctl.system.closing import close_on_error
from stepctl.system.text import in_one_line
from stepctl.system.user_code import describe_error
from stepctl.training.assembly import Assembly, TaskAssembly
from stepctl.training.build import assemble

_N_INSTANCES = 2
_N_NAMED = 3  # differences that the warning names
_REMEDY = (
    "a resume of this run would not be exact; draw random numbers from {rng} only, and "
    "depend on no earlier calls, time or threads (check_determinism: false disables this check)"
)


def find_difference(assembly: Assembly) -> str | None:
    """Compute the first step of a fresh run several times; return a warning if a bit differs.

    Each time model, optimizer and task are built again, start from the state of `assembly`, which
    does not change, and draw the same random numbers. User data are loaded a second time, once. A
    program is built once more, and its first step is made twice by that instance.
    None if no user code takes part, or the config disables the check. ConfigError if user code
    breaks its protocol.
    """
    if not assembly.config.check_determinism or not _has_user_code(assembly):
        return None
    with _preserved_global_rng():
        steps = []
        for number in range(_N_INSTANCES):
            try:
                instance = _rebuild(assembly, share_sources=number == 0)
            except USER_CODE_ERRORS as error:
                why = in_one_line(describe_error(error), 200)
                return (
                    "determinism could not be checked: the parts of the run cannot be built a "
                    f"second time: {why}"
                )
            try:
                with contextlib.closing(instance):
                    steps.append(_first_step(instance, n_trials=number))
                    if instance.state.program is not None:
                        _restore_program(instance, assembly)
                        steps.append(_first_step(instance, n_trials=0))
                        break
            except ConfigError:
                raise
            except USER_CODE_ERRORS:  # the run's own first step raises it again
                return None
    first, *others = steps
    differing = [name for name in first if any(other.get(name) != first[name] for other in others)]
    if not differing:
        return None
    if "the batch" in differing:
        differing = ["the batch"]
    named = differing[:_N_NAMED]
    if len(differing) > _N_NAMED:
        named.append(f"{len(differing) - _N_NAMED} more")
    has_workspace = isinstance(assembly, TaskAssembly) and not isinstance(assembly.task, ModelLoss)
    rng = "workspace.rng" if has_workspace else 'rng("a name")'
    return (
        "the first step was computed twice from the same state, with different results "
        f"({', '.join(named)}); {_REMEDY.format(rng=rng)}"
    )


def _has_user_code(assembly: Assembly) -> bool:
    if isinstance(assembly.config, ScriptConfig):  # its steps cannot be made from here
        return False
    if not isinstance(assembly, TaskAssembly):
        return True
    components: list[object] = [assembly.task, *assembly.sources]
    for learner in assembly.task.learners.values():
        components += [learner.model, learner.optimizer, learner.optimizer.learning_rate]
    return not all(is_builtin(component) for component in components)


def _rebuild(assembly: Assembly, *, share_sources: bool) -> Assembly:
    """Return another assembly of the same config and state; built-in sources are shared."""
    sources = None
    if isinstance(assembly, TaskAssembly):
        share_sources = share_sources or all(is_builtin(source) for source in assembly.sources)
        sources = Sources(*assembly.sources) if share_sources else None
    instance = assemble(assembly.config.without_hooks(), sources=sources)
    if assembly.state.program is not None:
        with close_on_error(instance):
            _restore_program(instance, assembly)
    for folder, arena in assembly.state.arenas.items():
        instance.state.arenas[folder].copy_from(arena)
    instance.state.buffers.copy_from(assembly.state.buffers)
    return instance


def _restore_program(instance: Assembly, assembly: Assembly) -> None:
    """Give an instance of a program the state of `assembly`."""
    assert isinstance(instance.state.program, ProgramState)
    assert assembly.state.program is not None
    instance.state.program.restore(assembly.state.program.capture())
    instance.series.discard()


@np.errstate(all="ignore")
def _first_step(assembly: Assembly, n_trials: int) -> dict[str, str]:
    """Make the first step, after trials that must not matter; return a digest of each result."""
    task = assembly.task
    state = assembly.state
    batch = assembly.training.batch(state.counters.samples_seen)
    digests = {"the batch": _digest(batch.x) + _digest(batch.y)}
    with contextlib.suppress(NonFiniteError), explain_read_only(state):
        for _ in range(n_trials):
            task.trial(state, batch)
        if isinstance(task, OneUpdate):
            gradient, metrics = task.gradient(state, batch)
            for name, value in as_numbers(metrics, "task: gradient returned").items():
                digests[f"the {name}"] = repr(value)
            for name, array in gradient.items():
                digests[f"the gradient of {name}"] = _digest(array)
        metrics = as_numbers(task.step(state, batch), "task: step returned")
        for name, value in metrics.items():
            digests[f"the {name} of the step"] = repr(value)
        for path, array in state.arrays().items():
            if not path.startswith("hooks/"):
                digests[f"/{path} after it"] = _digest(array)
        digests["/values after it"] = str(state.values)
    return digests


def _digest(array: Array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@contextlib.contextmanager
def _preserved_global_rng() -> Iterator[None]:
    """Restore the state of Python's and NumPy's global generators, which user code may use."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
