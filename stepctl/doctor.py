"""What this machine has that decides whether training works and what it gives: for a bug report.

Libraries are looked at in child processes: one that crashes or hangs costs its own part of the answer.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepctl import __version__, disk, numerics

if TYPE_CHECKING:
    from stepctl.state import TrainState

Facts = dict[str, Any]
EXTRAS = {
    "tensorboard": ("tensorboard",),
    "mpi": ("mpi4py", "mpich"),
    "plot": ("matplotlib", "plotext"),
}
_SECONDS = 10.0  # for a child's answer: only a hang comes near it
# Parts that must not fail, and what it means if they do.
_NEEDED = {
    "stepctl": "install Python anew",
    "numerics": "no training can start; unset OPENBLAS_* and MKL_*, or install NumPy anew",
    "hdf5": "no checkpoint can be saved; install h5py anew",
    "runs": "no run can be kept there; give another folder (--run-dir)",
}
# A child's program: what it prints last is its answer; a library may have printed before.
_CHILD = """
import json, resource, sys
sys.path[:] = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
try:
    {body}
except BaseException as error:
    facts = {{"error": f"{{type(error).__name__}}: {{error}}"}}
print("\\n" + json.dumps(facts))
"""
_MPI = """
    import importlib.util
    if importlib.util.find_spec("mpi4py") is None:
        facts = {"library": None}
    else:
        from mpi4py import MPI
        library, standard = MPI.Get_library_version().split(chr(10))[0], ".".join(map(str, MPI.Get_version()))
        world = MPI.COMM_WORLD
        facts = {"library": library, "standard": standard, "rank": world.Get_rank(), "ranks": world.Get_size()}
"""


def examine(runs: str) -> Facts:
    """Return all parts, and "problems", each a line in words.

    The parts are "stepctl", "machine", "environment", "numerics", "hdf5", "mpi", "extras" and "runs".
    A part that could not be found out has "error", which says why. `runs` is the folder in which runs are to be kept.
    """
    parts: dict[str, Callable[[], Facts]] = {
        "stepctl": software,
        "machine": machine,
        "environment": environment,
        "numerics": lambda: _answer("from stepctl import doctor; facts = doctor.loaded_numerics()"),
        "hdf5": _hdf5,
        "mpi": _mpi,
        "extras": extras,
    }
    with ThreadPoolExecutor(len(parts)) as pool:
        found = dict(zip(parts, pool.map(_guarded, parts.values()), strict=True))
    found["runs"] = _guarded(lambda: disk.examine(runs))  # when nothing else keeps the machine busy
    return found | {"problems": _problems(found)}


def _guarded(part: Callable[[], Facts]) -> Facts:
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _problems(found: dict[str, Facts]) -> list[str]:
    reasons = {name: found[name].get("error") or found[name].get("reason") for name in _NEEDED}
    failed = [f"{name}: {reason}: {_NEEDED[name]}" for name, reason in reasons.items() if reason]
    return [*failed, *found["runs"].get("problems", [])]


def software() -> Facts:
    """Return the versions of stepctl and Python, and the platform."""
    python = f"{platform.python_version()} ({platform.python_implementation()})"
    return {"version": __version__, "python": python, "platform": platform.platform()}


def machine() -> Facts:
    """Return "cpu" (its model), "cpus", "usable_cpus" (by this process), "memory" and "available" (bytes)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    available = _first("/proc/meminfo", "MemAvailable")
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "usable_cpus": usable,
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available": int(available.split()[0]) * 1024 if available else None,
    }


def _first(path: str, key: str) -> str | None:
    """Return the value of the first line "key: value" of one of the system's files."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)


def environment() -> Facts:
    """Return the "variables" that change BLAS, and the "threads" that they ask for."""
    prefixes = ("OPENBLAS_", "MKL_", "OMP_NUM_THREADS")
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}
    return {"variables": variables, "threads": numerics.threads_asked()}


def loaded_numerics() -> Facts:
    """Load NumPy, and return "numpy", "libraries" (BLAS, see threadpoolctl) and the "fingerprint" of the numerics."""
    import numpy as np

    for dtype in (np.float32, np.float64):  # a kernel that this CPU cannot run ends the process here
        np.ones((64, 64), dtype) @ np.ones((64, 64), dtype)
    told = ("internal_api", "version", "architecture", "num_threads", "threading_layer")
    info = numerics.loaded_blas().info()
    libraries = [{key: library[key] for key in told if key in library} for library in info]
    return {"numpy": np.__version__, "libraries": libraries, "fingerprint": numerics.fingerprint(info)}


def _hdf5() -> Facts:
    # made here, so that it goes even if the child ends early
    with tempfile.TemporaryDirectory(prefix="stepctl-doctor-", ignore_cleanup_errors=True) as folder:
        return _answer("from stepctl import doctor; facts = doctor.checkpoint_in(sys.argv[2])", folder)


def checkpoint_in(folder: str) -> Facts:
    """Write a checkpoint in a folder and read it back.

    "h5py" and "hdf5" are versions; "milliseconds" is what it took, "reason" why it is not the same, or None.
    """
    import h5py

    from stepctl.checkpoint import codec  # noqa: F401  (the time it takes to load is not measured)

    began = time.perf_counter()
    try:
        reason = None if _comes_back(folder) else "a checkpoint does not read back as it was written"
    except Exception as error:
        reason = f"a checkpoint cannot be written and read back ({error})"
    milliseconds = round(1000 * (time.perf_counter() - began), 3)
    versions = {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}
    return {**versions, "milliseconds": milliseconds, "reason": reason}


def _comes_back(folder: str) -> bool:
    from stepctl.checkpoint import codec
    from stepctl.checkpoint.store import Store

    state, other = _state(1), _state(0)
    step, store = state.counters.global_step, Store(Path(folder))
    store.publish(step, codec.encode(state, run="doctor", run_id="0" * 32, config="seed: 0\n", numerics="{}"))
    with store.open(step) as reader:
        codec.restore(reader, other)
    return other.same_bits(state)


def _state(fill: int) -> TrainState:
    """Return a small state: of odd values, or, where `fill` is 0, of zeros."""
    import numpy as np

    from stepctl.arena import Arena
    from stepctl.state import Counters, Remembered, TrainState

    odd = [-0.0, np.inf, np.nan, np.finfo(np.float32).smallest_subnormal, 1 / 3]
    arenas = {"params": Arena({"odd": (5,)}, np.float32), "ema": Arena({"odd": (5,)}, np.float64)}
    for arena in arenas.values():
        arena["odd"][...] = odd if fill else 0
    counters = Counters({"global_step": 7, "samples_seen": 2**62 * fill})
    hook = Remembered("doctor", {"bytes": np.arange(9, dtype=np.uint8) * fill, "count": np.array(2**62 * fill)})
    return TrainState(counters, arenas, hooks=[hook])


def _mpi() -> Facts:
    # with the descriptors by which mpiexec talks to its ranks
    return {"mpiexec": shutil.which("mpiexec"), "pip": _pip("mpi")} | _answer(_MPI, keep_descriptors=True)


def extras() -> Facts:
    """Return for each extra its packages' versions (None: not installed), and the pip command that brings them."""
    return {
        extra: {"packages": {name: _version(name) for name in names}, "pip": _pip(extra)}
        for extra, names in EXTRAS.items()
    }


def _pip(extra: str) -> str:
    return f"pip install 'stepctl[{extra}]'"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _answer(body: str, *arguments: str, keep_descriptors: bool = False) -> Facts:
    """Return the `facts` of a program's body, run in a child that imports what this process would; or "error"."""
    flags = ["-P", *(["-S"] if sys.flags.no_site else [])]
    command = [sys.executable, *flags, "-c", _CHILD.format(body=body), json.dumps(sys.path), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        close_fds=not keep_descriptors,
        start_new_session=True,
    ) as child:
        try:
            output, errors = child.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # and what it may have started
            return {"error": f"no answer in {_SECONDS:.0f} s"}
    try:
        facts: Facts = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": _end(child.returncode, errors.decode(errors="replace"))}
    return facts


def _end(code: int, errors: str) -> str:
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"{how}: {lines[-1]}" if lines else how
