"""The numerics of this process: BLAS threads, BLAS kernel, library versions, CPU features.

They decide the last bits of every result. `set_environment` must run before NumPy is imported, so
this module imports neither NumPy nor threadpoolctl at its top.
"""

import functools
import hashlib
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from stepctl.errors import StepctlError
from stepctl.system.cpus import cgroup_cpus, proc_value, usable_cpus

AUTO: Literal["auto"] = "auto"
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
KERNEL_VARIABLE = "OPENBLAS_CORETYPE"
# Below this, threads cost more than they save; on a busy machine a hundred times more.
_MIN_THREADED_WORK = 1 << 24
_PROBE_SECONDS = 0.02  # `slowdown` starts no further round after this time
_PROBE_ROUNDS = 7

_current_threads = 0  # as set here last: BLAS has one thread count for the whole process

# OpenBLAS does not check whether the CPU supports a kernel requested by name, and crashes.
_AVX2 = {"avx2", "fma"}
_AVX512 = {"avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl"}
_CPU_FLAGS_OF_KERNEL: dict[str, dict[str, set[str]]] = {
    "x86_64": {
        "prescott": set(),
        "katmai": set(),  # OpenBLAS reports Prescott under this name once it is loaded
        "nehalem": {"sse4_2"},
        "sandybridge": {"avx"},
        "bulldozer": {"avx", "fma4"},
        "piledriver": {"avx", "fma4", "fma"},
        "steamroller": {"avx", "fma4", "fma"},
        "excavator": {"fma4"} | _AVX2,
        "haswell": _AVX2,
        "zen": _AVX2,
        "skylakex": _AVX2 | _AVX512,
        "cooperlake": _AVX2 | _AVX512 | {"avx512_bf16"},
        "sapphirerapids": _AVX2 | _AVX512 | {"avx512_bf16", "amx_bf16"},
    },
    "aarch64": {
        "armv8": set(),
        "neoversen1": {"asimd"},
        "neoversev1": {"sve"},
        "neoversen2": {"sve2"},
        "armv8sve": {"sve"},
        "a64fx": {"sve"},
    },
}

# Revision of the rules that map (seed, stream, index) to random numbers and data order.
# A run records it; raise it with every change of these bits. Runs without it have revision 1.
STREAMS = 2


class Numerics(TypedDict):
    """The numerics of a process, as runs and checkpoints record them."""

    streams: int
    threads: int
    blas_kernel: str
    blas: str
    numpy: str
    simd: str
    functions: str
    machine: str
    autograd: NotRequired[str]  # its version, if it computes gradients


_LABELS = {
    "streams": "random streams",
    "threads": "BLAS threads",
    "blas_kernel": "BLAS kernel",
    "blas": "BLAS",
    "numpy": "NumPy",
    "simd": "CPU features",
    "functions": "elementary functions",
    "machine": "machine",
    "autograd": "autograd",
}


# --- before NumPy is imported


def requested_numerics(plain: Mapping[str, Any]) -> tuple[object, object]:
    """Return (threads, kernel) of a config that is not validated yet."""
    section = plain.get("numerics")
    if not isinstance(section, dict):
        return None, None
    return section.get("threads"), section.get("blas_kernel")


def set_environment(threads: object, kernel: object, *, ranks_sharing_cores: int = 1) -> int:
    """Set the environment that BLAS reads when NumPy is imported; return the thread count.

    Invalid values are ignored: the validation of the config reports them. Once NumPy is imported,
    nothing is set.
    """
    if isinstance(threads, int) and threads >= 1:
        count = threads
    else:
        count = default_threads(ranks_sharing_cores)
    if "numpy" in sys.modules:
        return count
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)
    if isinstance(kernel, str) and kernel != AUTO and cpu_supports(kernel):
        os.environ[KERNEL_VARIABLE] = kernel
    return count


def default_threads(ranks_sharing_cores: int = 1) -> int:
    """Return the thread count in the environment, or the usable cores divided by the ranks."""
    requested = environment_threads()
    if requested is not None:
        return requested
    cores = usable_cpus()
    quota = cgroup_cpus()
    if quota is not None:
        cores = min(cores, max(1, int(quota)))
    return max(1, cores // ranks_sharing_cores)


def environment_threads() -> int | None:
    """Return the thread count that the environment variables request, None without one."""
    for variable in _THREAD_VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdecimal() and int(value) >= 1:
            return int(value)
    return None


def auto_threads(work: int) -> int:
    """Return the thread count of "auto": one if a step has too little work for more.

    work: rows times parameters, the multiplications of a forward pass.
    """
    if work < _MIN_THREADED_WORK:
        return 1
    return default_threads()


def cpu_supports(kernel: str) -> bool:
    """Tell whether the CPU has the instructions of an OpenBLAS kernel."""
    needed = _CPU_FLAGS_OF_KERNEL.get(platform.machine(), {}).get(kernel.lower())
    return needed is not None and needed <= _cpu_flags()


def _cpu_flags() -> set[str]:
    key = "flags" if platform.machine() == "x86_64" else "Features"
    return set(proc_value("/proc/cpuinfo", key).split())


def load_numpy() -> None:
    """Import NumPy; StepctlError if OpenBLAS cannot start its threads.

    OpenBLAS then sends SIGINT to its own process.
    """
    if not hasattr(signal, "sigtimedwait"):
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        import numpy as np  # noqa: F401
    finally:
        interrupt = signal.sigtimedwait([signal.SIGINT], 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if interrupt is None:
        return
    if interrupt.si_pid != os.getpid():  # a user's Ctrl-C
        signal.raise_signal(signal.SIGINT)
        return
    remedy = "raise the limits (ulimit -v, ulimit -u), or start with --set numerics.threads=1"
    raise StepctlError(
        f"OpenBLAS could not start its threads: out of memory or processes; {remedy}"
    )


# --- once NumPy is imported


def loaded_blas() -> Any:
    """Return threadpoolctl's controller of the BLAS libraries that NumPy has loaded."""
    import numpy as np  # noqa: F401  (it loads them)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def set_threads(threads: int) -> Numerics:
    """Set the number of BLAS threads, and return the fingerprint of the numerics."""
    blas = loaded_blas()
    _limit_threads(blas, threads)
    return fingerprint(blas.info())


def restore_threads(threads: int) -> None:
    """Set the number of BLAS threads again if another run of this process has changed it."""
    if threads != _current_threads:
        _limit_threads(loaded_blas(), threads)


def _limit_threads(blas: Any, threads: int) -> None:
    global _current_threads
    blas.limit(limits=threads)
    _current_threads = threads


def slowdown(threads: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the time of a matrix product with `threads` BLAS threads over that with one.

    On a busy machine, BLAS waits for threads that do not get a core. It takes a few milliseconds,
    or little more than _PROBE_SECONDS on such a machine.
    """
    import numpy as np

    left = np.ones((256, 256), np.float32)
    out = np.empty_like(left)
    blas = loaded_blas()
    times: dict[int, list[float]] = {1: [], threads: []}
    deadline = clock() + _PROBE_SECONDS
    try:
        for _ in range(_PROBE_ROUNDS):
            if times[threads] and clock() > deadline:
                break
            for count, seconds in times.items():
                blas.limit(limits=count)
                start = clock()
                np.dot(left, left, out=out)
                np.dot(left, left, out=out)
                seconds.append(clock() - start)
    finally:
        _limit_threads(blas, threads)
    return float(np.median(times[threads]) / np.median(times[1]))


def fingerprint(libraries: Sequence[Mapping[str, Any]]) -> Numerics:
    """Return the numerics that a run records; `libraries` is the `info()` of the loaded BLAS."""
    import numpy as np

    build: Any = np.show_config(mode="dicts")
    dependency = build["Build Dependencies"]["blas"]
    simd = build.get("SIMD Extensions", {})
    library: Mapping[str, Any] = libraries[0] if libraries else {"num_threads": 1}
    return {
        "streams": STREAMS,
        "threads": library["num_threads"],
        "blas_kernel": library.get("architecture") or "unknown",
        "blas": f"{dependency['name']} {dependency['version']}",
        "numpy": np.__version__,
        "simd": " ".join(simd.get("baseline", []) + simd.get("found", [])),
        "functions": _digest_of_functions(),
        "machine": platform.machine(),
    }


@functools.cache
def _digest_of_functions() -> str:
    """Return a digest of elementary functions: libm and NumPy choose their kernels by CPU too."""
    import numpy as np

    # Many points, since two kernels differ in few; about 4 ms.
    points = np.random.Generator(np.random.Philox(0)).uniform(0.01, 20.0, 1 << 14)
    few = points[: 1 << 12].tolist()
    digest = hashlib.sha256(np.array([[math.cos(x), math.exp(x), 0.97**x] for x in few]).tobytes())
    for dtype in (np.float32, np.float64):
        values = points.astype(dtype)
        for function in (np.exp, np.log, np.tanh, np.log1p):
            digest.update(function(values).tobytes())
    return digest.hexdigest()[:16]


def numerics_differences(recorded: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    """Return the differences of two fingerprints in words: "BLAS kernel SkylakeX -> Haswell"."""
    recorded = {"streams": 1} | dict(recorded)
    return [
        f"{label} {recorded.get(key, '?')} -> {here.get(key, '?')}"
        for key, label in _LABELS.items()
        if recorded.get(key) != here.get(key)
    ]
