"""Whether a segment compiles its updates: only if that saves more time than it takes."""

from __future__ import annotations

from stepctl.optimizers import compilation
from stepctl.optimizers.compilation import CompilationError
from stepctl.training.assembly import Assembly, TaskAssembly

# Measured on two AVX-512 machines, with Adam: NumPy minus compiled.
_SAVED_PER_UPDATE = 15e-6  # seconds
_SAVED_PER_ELEMENT = 0.9e-9  # seconds
# Importing numba and loading a kernel take 0.6 s, and the first compilation 0.6 s more.
_WORTHWHILE = 2.0  # seconds that a segment must save


def seconds_saved(assembly: Assembly, n_steps: int) -> float:
    """Return the estimated time that compiled updates save in that many steps."""
    if not isinstance(assembly, TaskAssembly):  # the updates of a program are its own
        return 0.0
    counters = assembly.state.counters
    increments = assembly.task.increments(counters, assembly.training.samples)
    return sum(
        increments[name] * n_steps * (_SAVED_PER_UPDATE + _SAVED_PER_ELEMENT * learner.n_elements)
        for name, learner in assembly.task.learners.items()
    )


def compile_updates(assembly: Assembly, n_steps: int) -> str | None:
    """Compile the updates of an assembly if that saves time within `n_steps` steps.

    Returns the reason of a failure, or None; the bits are the same in any case. numba is imported only
    if it pays.
    """
    if assembly.config.numerics.compiled == "off":
        return None
    if seconds_saved(assembly, n_steps) < _WORTHWHILE or not compilation.is_available():
        return None
    try:
        for learner in assembly.task.learners.values():
            learner.compile_update()
    except CompilationError as error:
        return str(error)
    return None
