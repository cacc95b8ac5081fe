"""The facts about this machine that decide whether training works and which bits it gives.

Libraries are loaded in child processes: one that crashes or hangs affects only its own part of the
report.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from stepctl import __version__
from stepctl.distributed.mpi import describe_library
from stepctl.doctor import child, filesystem
from stepctl.doctor.child import Facts
from stepctl.doctor.kernels import compare_kernels
from stepctl.system import blas
from stepctl.system.cpus import proc_value, usable_cpus

if TYPE_CHECKING:
    from stepctl.state.train_state import TrainState

EXTRAS = {
    "tensorboard": ("tensorboard",),
    "mpi": ("mpi4py", "mpich"),
    "autograd": ("autograd",),
    "numba": ("numba",),
    "plot": ("matplotlib", "plotext"),
    "remote": ("obstore",),
    "export": ("safetensors", "onnx"),
}
# required part -> consequence of its failure
_REQUIRED = {
    "stepctl": "reinstall Python",
    "numerics": "training cannot start; unset OPENBLAS_* and MKL_*, or reinstall NumPy",
    "hdf5": "checkpoints cannot be saved; reinstall h5py",
    "runs": "runs cannot be kept there; give another folder (--run-dir)",
}


def examine(runs: str) -> Facts:
    """Return the parts of the report by name, and "problems", a list of messages.

    The parts are "stepctl", "machine", "environment", "numerics", "kernels", "compiled", "hdf5",
    "mpi", "extras" and "runs", the file system of the folder `runs`. A part that fails has "error", the reason.
    """
    parts: dict[str, Callable[[], Facts]] = {
        "stepctl": software,
        "machine": machine,
        "environment": environment,
        "numerics": lambda: child.call(load_numerics),
        "compiled": lambda: child.call(compile_adam),
        "hdf5": hdf5,
        "mpi": mpi,
        "extras": extras,
    }
    with ThreadPoolExecutor(len(parts)) as pool:
        reports = list(pool.map(_report, parts.values()))
    found = dict(zip(parts, reports, strict=True))
    # last, because other work would change the times that they measure
    found["kernels"] = _report(compare_kernels)
    found["runs"] = _report(lambda: filesystem.examine(runs))
    return found | {"problems": _problems(found)}


def _report(part: Callable[[], Facts]) -> Facts:
    try:
        return part()
    except child.ChildError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _problems(found: dict[str, Facts]) -> list[str]:
    problems = []
    for name, consequence in _REQUIRED.items():
        reason = found[name].get("error") or found[name].get("reason")
        if reason:
            problems.append(f"{name}: {reason}: {consequence}")
    return [*problems, *found["runs"].get("problems", [])]


def software() -> Facts:
    """Return the versions of stepctl, Python and the system."""
    python = f"{platform.python_version()} ({platform.python_implementation()})"
    return {"version": __version__, "python": python, "platform": platform.platform()}


def machine() -> Facts:
    """Return the CPUs, and the memory in bytes, as far as the system reports them."""
    cpu = proc_value("/proc/cpuinfo", "model name")
    available = proc_value("/proc/meminfo", "MemAvailable")
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),  # by this process
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available": int(available.split()[0]) * 1024 if available else None,
    }


def environment() -> Facts:
    """Return the environment variables that change BLAS, and the thread count they ask for."""
    prefixes = ("OPENBLAS_", "MKL_", "OMP_NUM_THREADS")
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}
    return {"variables": variables, "threads": blas.environment_threads()}


def load_numerics() -> Facts:
    """Load NumPy and BLAS, and describe them; an unsuitable kernel ends the process."""
    import numpy as np

    for dtype in (np.float32, np.float64):
        np.ones((64, 64), dtype) @ np.ones((64, 64), dtype)  # the CPU may lack its instructions
    info = blas.loaded_blas().info()
    keys = ("internal_api", "version", "architecture", "num_threads", "threading_layer")
    libraries = [{key: library[key] for key in keys if key in library} for library in info]
    return {"numpy": np.__version__, "libraries": libraries, "fingerprint": blas.fingerprint(info)}


def compile_adam() -> Facts:
    """Compile an update and compare its bits with NumPy's; "numba" is None where it is missing."""
    from stepctl.optimizers import compilation
    from stepctl.optimizers.adam import Adam
    from stepctl.optimizers.schedules import Constant

    if not compilation.is_available():
        return {"numba": None, "pip": _pip_command("numba")}
    began = time.perf_counter()
    reason = None
    folder = None
    try:
        compilation.compile_update(Adam(learning_rate=Constant(value=0.1)), "float32")
        folder = compilation.cache_folder("float32")
    except compilation.CompilationError as error:
        reason = str(error)
    return {
        "numba": _version("numba"),
        "cache": None if folder is None else str(folder.parent),
        "milliseconds": round(1000 * (time.perf_counter() - began), 3),
        "reason": reason,  # None if all is well
    }


def hdf5() -> Facts:
    """Write and read a checkpoint in a child process."""
    # the parent makes the folder, so that it is removed even if the child crashes
    with tempfile.TemporaryDirectory(
        prefix="stepctl-doctor-", ignore_cleanup_errors=True
    ) as folder:
        return child.call(checkpoint_round_trip, folder)


def checkpoint_round_trip(folder: str) -> Facts:
    """Write a checkpoint in a folder, read it back and compare the bits."""
    import h5py

    began = time.perf_counter()
    reason = None
    try:
        if not _reads_back(folder):
            reason = "a checkpoint does not read back as it was written"
    except Exception as error:
        reason = f"a checkpoint cannot be written and read back ({error})"
    return {
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
        "milliseconds": round(1000 * (time.perf_counter() - began), 3),
        "reason": reason,  # None if all is well
    }


def _reads_back(folder: str) -> bool:
    from stepctl.checkpoint import codec
    from stepctl.checkpoint.store import Store

    written = _sample_state(1)
    restored = _sample_state(0)
    step = written.counters.global_step
    image = codec.encode(written, run="doctor", run_id="0" * 32, config="seed: 0\n", numerics="{}")
    store = Store(Path(folder))
    store.publish(step, image)
    with store.open(step) as reader:
        codec.restore(reader, restored)
    return restored.same_bits(written)


def _sample_state(fill: int) -> TrainState:
    """Return a small state with values that are easily lost, or, if `fill` is 0, with zeros."""
    import numpy as np

    from stepctl.state.arena import Arena
    from stepctl.state.counters import Counters
    from stepctl.state.train_state import SavedHook, TrainState

    values = [-0.0, np.inf, np.nan, np.finfo(np.float32).smallest_subnormal, 1 / 3]
    arenas = {"params": Arena({"odd": (5,)}, np.float32), "ema": Arena({"odd": (5,)}, np.float64)}
    for arena in arenas.values():
        arena["odd"][...] = values if fill else 0
    counters = Counters({"global_step": 7, "samples_seen": 2**62 * fill})
    arrays = {"bytes": np.arange(9, dtype=np.uint8) * fill, "count": np.array(2**62 * fill)}
    return TrainState(counters, arenas, hooks=[SavedHook("doctor", arrays)])


def mpi() -> Facts:
    """Return "mpiexec" (its path), "pip" (a command), and the facts of `describe_library` or "error"."""
    # mpiexec talks to its ranks through inherited descriptors
    library = _report(lambda: child.call(describe_library, keep_descriptors=True))
    return {"mpiexec": shutil.which("mpiexec"), "pip": _pip_command("mpi"), **library}


def extras() -> Facts:
    """Return the packages of each extra, with their versions, None where not installed."""
    return {
        extra: {"packages": {name: _version(name) for name in packages}, "pip": _pip_command(extra)}
        for extra, packages in EXTRAS.items()
    }


def _pip_command(extra: str) -> str:
    return f"pip install 'stepctl[{extra}]'"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
