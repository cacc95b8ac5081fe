"""What decides the last bits of a result: BLAS threads, BLAS kernel, library versions, CPU features.

`pin` must run before NumPy is imported, so this module imports neither NumPy nor threadpoolctl at its top.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from stepctl.errors import StepctlError

AUTO: Literal["auto"] = "auto"
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Below it, threads cost more than they give; on a busy machine they then cost a hundred times more.
_WORTH_THREADS = 1 << 24
_given = [0]  # threads that BLAS, one for the whole process, was last given
_PROBE_SECONDS = 0.02  # of timing, after which a probe goes no further
_KERNEL_VARIABLE = "OPENBLAS_CORETYPE"

# OpenBLAS does not check that the CPU can run a kernel that is asked for by name: a wrong one is a crash.
_AVX2, _AVX512 = {"avx2", "fma"}, {"avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl"}
_KERNEL_NEEDS: dict[str, dict[str, set[str]]] = {
    "x86_64": {
        "prescott": set(),
        "katmai": set(),  # what OpenBLAS calls Prescott once it is loaded
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

# The revision of the rules that turn (seed, stream, index) into random numbers and into the order of the data.
# A run records it; raise it with every change of these bits. Runs without it are of revision 1.
STREAMS = 2

_LABELS = {
    "streams": "random streams",
    "threads": "BLAS threads",
    "blas_kernel": "BLAS kernel",
    "blas": "BLAS",
    "numpy": "NumPy",
    "simd": "CPU features",
    "functions": "elementary functions",
    "machine": "machine",
}


def pin(threads: object, kernel: object, *, neighbours: int = 1) -> int:
    """Set the environment that BLAS reads when NumPy is imported; without effect once it is.

    Values that no config allows are passed over here: the config check reports them. Threads that are not asked for
    are what the cores are to each of so many neighbours. Return the threads.
    """
    count = threads if isinstance(threads, int) and threads >= 1 else default_threads(neighbours)
    if "numpy" in sys.modules:
        return count
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)
    if isinstance(kernel, str) and kernel != AUTO and _cpu_runs(kernel):
        os.environ[_KERNEL_VARIABLE] = kernel
    return count


def asked_for(plain: Mapping[str, Any]) -> tuple[object, object]:
    """Return (threads, kernel) of an unchecked config."""
    section = plain.get("numerics")
    return (section.get("threads"), section.get("blas_kernel")) if isinstance(section, dict) else (None, None)


def threads_for(work: int) -> int:
    """Return what "auto" means for a model: one thread where a step has too little work for more.

    `work` is rows times parameters: the multiplications of one forward pass.
    """
    return 1 if work < _WORTH_THREADS else default_threads()


def default_threads(neighbours: int = 1) -> int:
    """Return the thread count that the environment asks for, or a neighbour's share of the cores it may use."""
    asked = threads_asked()
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    if quota is not None:
        cores = min(cores, max(1, int(quota)))
    return max(1, cores // neighbours)


def cgroup_quota(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> float | None:
    """Return the cores that this process's cgroup, or one above it, allows (versions 1 and 2); None without a limit."""
    quotas = []
    for line in _text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = os.path.join(root, "cpu") if controllers else root
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            folder = os.path.join(base, *parts[:depth])
            if controllers:
                words = [_text(f"{folder}/cpu.cfs_quota_us"), _text(f"{folder}/cpu.cfs_period_us")]
            else:
                words = _text(f"{folder}/cpu.max").split()
            numbers = [word.strip() for word in words]
            if len(numbers) == 2 and all(number.isdecimal() and int(number) for number in numbers):
                quotas.append(int(numbers[0]) / int(numbers[1]))
    return min(quotas, default=None)


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


def slowdown(threads: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how many times longer a matrix product takes with so many BLAS threads than with one.

    On a machine whose cores are busy, BLAS waits for a thread that does not get a core. The results are discarded.
    It takes a few milliseconds, and on a busy machine little more than _PROBE_SECONDS.
    """
    import numpy as np

    left = np.ones((256, 256), np.float32)
    out = np.empty_like(left)
    blas = loaded_blas()
    times: dict[int, list[float]] = {1: [], threads: []}
    end = clock() + _PROBE_SECONDS
    try:
        for _ in range(7):
            if times[threads] and clock() > end:
                break
            for count, found in times.items():
                blas.limit(limits=count)
                began = clock()
                np.dot(left, left, out=out)
                np.dot(left, left, out=out)
                found.append(clock() - began)
    finally:
        _give(blas, threads)
    medians = {count: sorted(found)[len(found) // 2] for count, found in times.items()}
    return medians[threads] / medians[1]


def threads_asked() -> int | None:
    """Return the thread count that the environment asks for, if it does."""
    for variable in _THREAD_VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdecimal() and int(value) >= 1:
            return int(value)
    return None


def settle(threads: int) -> dict[str, Any]:
    """Give BLAS its number of threads, and return the fingerprint of the numerics as they now are."""
    blas = loaded_blas()
    _give(blas, threads)
    return fingerprint(blas.info())


def give_again(threads: int) -> None:
    """Give BLAS its number of threads where another run of this process has changed it since; quick if none has."""
    if threads != _given[0]:
        _give(loaded_blas(), threads)


def _give(blas: Any, threads: int) -> None:
    blas.limit(limits=threads)
    _given[0] = threads


def load_numpy() -> None:
    """Import NumPy; StepctlError if OpenBLAS cannot start its threads: it then sends its own process a SIGINT."""
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
    raise StepctlError(f"OpenBLAS cannot start its threads: no memory or processes are left for them; {remedy}")


def loaded_blas() -> Any:
    """Return threadpoolctl's controller of the BLAS libraries that NumPy has loaded."""
    import numpy as np  # noqa: F401  (it loads them)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def fingerprint(libraries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what decides the last bits, as it is now; `libraries` is the `info()` of the loaded BLAS."""
    import numpy as np

    build: Any = np.show_config(mode="dicts")
    dependency = build["Build Dependencies"]["blas"]
    simd = build.get("SIMD Extensions", {})
    return {
        "streams": STREAMS,
        "threads": libraries[0]["num_threads"] if libraries else 1,
        "blas_kernel": (libraries[0].get("architecture") if libraries else None) or "unknown",
        "blas": f"{dependency['name']} {dependency['version']}",
        "numpy": np.__version__,
        "simd": " ".join(simd.get("baseline", []) + simd.get("found", [])),
        "functions": _probe(),
        "machine": platform.machine(),
    }


@functools.cache
def _probe() -> str:
    """Return a digest of elementary functions at fixed points: libm and NumPy choose their kernels by CPU too."""
    import numpy as np

    # many points, since two kernels differ in few; about 4 ms
    points = np.random.Generator(np.random.Philox(0)).uniform(0.01, 20.0, 1 << 14)
    few = points[: 1 << 12].tolist()
    digest = hashlib.sha256(np.array([[math.cos(x), math.exp(x), 0.97**x] for x in few]).tobytes())
    for dtype in (np.float32, np.float64):
        values = points.astype(dtype)
        for function in (np.exp, np.log, np.tanh, np.log1p):
            digest.update(function(values).tobytes())
    return digest.hexdigest()[:16]


def differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, in words: "BLAS kernel SkylakeX -> Haswell"."""
    recorded = {"streams": 1} | dict(recorded)
    return [
        f"{label} {recorded.get(key, '?')} -> {here.get(key, '?')}"
        for key, label in _LABELS.items()
        if recorded.get(key) != here.get(key)
    ]


def _cpu_runs(kernel: str) -> bool:
    needs = _KERNEL_NEEDS.get(platform.machine(), {}).get(kernel.lower())
    return needs is not None and needs <= _cpu_flags()


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()
