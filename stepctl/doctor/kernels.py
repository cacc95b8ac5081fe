"""The time of a matrix product with each OpenBLAS kernel that suits the CPU.

OpenBLAS chooses a kernel by the CPU's name and instructions. It is not always the fastest: on AMD
Zen 4 it chooses the kernel for AVX-512, and the one for AVX2 is faster.
"""

import time

from stepctl.doctor import child
from stepctl.doctor.child import Facts
from stepctl.system import blas

SHAPE = (256, 1024, 1024)  # rows, inputs and outputs of a layer
_CANDIDATES = ("Haswell", "SkylakeX")  # for AVX2 and for AVX-512; OpenBLAS has variants of them
_MIN_GAIN = 0.03  # fraction of the time; a smaller gain is not recommended
_ROUNDS = 2  # the kernels take turns, because the speed of a shared machine changes
_PRODUCTS = 10


def compare_kernels() -> Facts:
    """Return the times by kernel in milliseconds, the kernel in use, and a faster one or None."""
    threads = str(blas.default_threads())
    in_use = child.call(time_products, threads)
    used = in_use["kernel"]
    times = {used: in_use["milliseconds"]}
    kernels = []
    if used in _CANDIDATES:  # not an older CPU, nor another BLAS
        kernels = [name for name in _CANDIDATES if blas.cpu_supports(name)]
    for _ in range(_ROUNDS):
        for name in kernels:
            timed = child.call(time_products, threads, environment={blas.KERNEL_VARIABLE: name})
            kernel = timed["kernel"]
            times[kernel] = min(timed["milliseconds"], times.get(kernel, float("inf")))
    fastest = min(times, key=lambda kernel: times[kernel])
    is_faster = times[fastest] < (1 - _MIN_GAIN) * times[used]
    return {
        "shape": SHAPE,
        "used": used,
        "milliseconds": {kernel: round(value, 3) for kernel, value in times.items()},
        "faster": fastest if is_faster else None,
    }


def time_products(threads: str) -> Facts:
    """Return the loaded kernel, and the least time of a float32 product with it."""
    import numpy as np

    kernel = blas.set_threads(int(threads))["blas_kernel"]
    rows, n_in, n_out = SHAPE
    x = np.ones((rows, n_in), np.float32)
    weight = np.ones((n_in, n_out), np.float32)
    y = np.empty((rows, n_out), np.float32)
    times = []
    for _ in range(_PRODUCTS):
        began = time.perf_counter()
        np.dot(x, weight, out=y)
        times.append(1000 * (time.perf_counter() - began))
    return {"kernel": kernel, "milliseconds": min(times)}
