"""MPI jobs as a user starts them."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 60.0  # seconds: only a hang comes near it
_OTHERS = ("PMI_", "PMIX_", "OMPI_", "HYDI_", "SLURM_")  # what a test must not inherit


@functools.cache
def mpiexec() -> str | None:
    """Return the mpiexec beside this Python, or the one on the PATH."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def missing() -> str:
    """Return what is missing for a job of ranks; an empty text if nothing is."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    return "" if mpiexec() else "there is no mpiexec"


needs_mpi = pytest.mark.skipif(bool(missing()), reason=missing())


def launcher(ranks: int) -> list[str]:
    """Return the words that start the command after them on a number of ranks."""
    return [mpiexec() or "mpiexec", "-n", str(ranks)]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a shell in which the tests' own modules can be imported."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(_OTHERS)}
    return {**plain, "PYTHONPATH": str(ROOT), **(more or {})}


def job(
    ranks: int, *arguments: object, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `mpiexec -n <ranks> python -m stepctl *arguments` to its end."""
    return run_python([*launcher(ranks)], "-m", "stepctl", *arguments, cwd=cwd, env=env)


def run_python(
    before: list[str], *arguments: object, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this Python with some arguments below a command; TimeoutExpired if it hangs."""
    return subprocess.run(
        [*before, sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )


def said_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines of stderr without those of the launcher itself."""
    return [line for line in done.stderr.splitlines() if line and not line.startswith("[mpiexec@")]
