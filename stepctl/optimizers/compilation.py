"""Compiling the kernels with numba; the machine code is kept in a folder of the user.

if is_available():
    compiled = compile_update(optimizer, "float32")  # takes a second if it is not in the folder
    optimizer.update(params, slots, grads, info, compiled=compiled)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from stepctl import __version__
from stepctl.errors import StepctlError
from stepctl.optimizers import kernels
from stepctl.optimizers.base import Optimizer, UpdateInfo
from stepctl.optimizers.groups import GroupSlice, Setting
from stepctl.optimizers.kernels import CompiledUpdate, Kernel
from stepctl.optimizers.moving_average import MovingAverage
from stepctl.state.arena import Arena, same_bits

PACKAGE = "numba"
_TRIAL_ELEMENTS = 100  # vectorised parts of a loop and a remainder


class CompilationError(StepctlError):
    """The kernels cannot be compiled, or their bits differ from NumPy's."""


def is_available() -> bool:
    """Tell whether numba is installed; it is not imported."""
    return find_spec(PACKAGE) is not None


def compile_update(optimizer: Optimizer, dtype: npt.DTypeLike) -> CompiledUpdate | None:
    """Return the compiled update of an optimizer; None for a user's own.

    CompilationError if numba fails, or if the first updates differ from NumPy's in a bit.
    """
    kernel = kernels.kernel_of(optimizer)
    if kernel is None:
        return None
    n_written = 1 + len(optimizer.slots)
    compiled = CompiledUpdate(optimizer, _compile(kernel, np.dtype(dtype), n_written))
    if _trial_bits(optimizer, dtype, compiled) != _trial_bits(optimizer, dtype, None):
        raise CompilationError(f"the compiled {type(optimizer).__name__} differs from NumPy's")
    return compiled


def compile_average(dtype: npt.DTypeLike) -> Kernel:
    """Return the compiled update of the moving average; errors as in `compile_update`."""
    kernel = _compile(kernels.moving_average, np.dtype(dtype), 1)
    found = []
    for compiled in (kernel, None):
        params = Arena({"x": (_TRIAL_ELEMENTS,)}, dtype)
        params["x"] = np.linspace(-1, 1, _TRIAL_ELEMENTS)
        average = params.like().to_read_only(copy=False)
        for number in (1, 2):
            MovingAverage(0.9).update(average, params.to_read_only(copy=True), number, compiled)
        found.append(average)
    if not same_bits(found[0].flat, found[1].flat):
        raise CompilationError("the compiled moving average differs from NumPy's")
    return kernel


def _trial_bits(
    optimizer: Optimizer, dtype: npt.DTypeLike, compiled: CompiledUpdate | None
) -> list[bytes]:
    """Return the parameters and slots after two updates of small arenas, with a weight decay."""
    params = Arena({"x": (_TRIAL_ELEMENTS,)}, dtype)
    params["x"] = np.linspace(-1, 1, _TRIAL_ELEMENTS)
    params = params.to_read_only(copy=True)
    slots = {
        slot: arena.to_read_only(copy=True)
        for slot, arena in optimizer.initial_slots(params).items()
    }
    optimizer = replace(optimizer, clip_norm=0.5)
    whole = GroupSlice(0, len(params.flat), Setting(0.3, 1.0, False))
    for number in (1, 2):
        grads = params.like()
        grads["x"] = np.linspace(0.7, -0.9, _TRIAL_ELEMENTS) / number
        info = UpdateInfo(0.1, number)
        optimizer.update(params, slots, grads, info, groups=[whole], compiled=compiled)
    return [arena.flat.tobytes() for arena in (params, *slots.values())]


@functools.cache
def _compile(kernel: Kernel, dtype: np.dtype[Any], n_written: int) -> Kernel:
    """Compile a kernel for one dtype, or load it; its last `n_written` arrays are written."""
    try:
        with warnings.catch_warnings(action="ignore"):
            numba = import_module(PACKAGE)
            scalar = numba.from_dtype(dtype)
            read_only = numba.types.Array(scalar, 1, "C", readonly=True)
            written = [scalar[::1]] * n_written
            signature = numba.void(numba.int64[:, ::1], scalar[:, ::1], read_only, *written)
            return _compiled(kernel, signature, cache_folder(dtype))
    except Exception as error:
        raise CompilationError(f"{type(error).__name__}: {error}") from error


def _compiled(kernel: Kernel, signature: Any, folder: Path | None) -> Kernel:
    numba = import_module(PACKAGE)
    options = {"nogil": True, "error_model": "numpy"}
    if folder is not None:
        # a full disk, or a damaged file there, must not prevent the compilation
        with contextlib.suppress(Exception), _numba_cache(folder):
            return cast(Kernel, numba.njit(signature, cache=True, **options)(kernel))
    return cast(Kernel, numba.njit(signature, **options)(kernel))


@contextlib.contextmanager
def _numba_cache(folder: Path) -> Iterator[None]:
    """Set the cache folder of numba for the functions that are compiled in the block."""
    numba = import_module(PACKAGE)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def cache_folder(dtype: npt.DTypeLike) -> Path | None:
    """Return the folder of the compiled kernels of a dtype; None if it cannot be written safely.

    The folder's name has all that the machine code depends on: two processes that write the same
    file at a time write the same content.
    """
    numba = import_module(PACKAGE)
    llvmlite = import_module("llvmlite")
    llvm = import_module("llvmlite.binding")
    source = os.stat(kernels.__file__)
    content = [
        __version__,
        str(source.st_mtime_ns),
        str(source.st_size),
        platform.python_version(),
        numba.__version__,
        llvmlite.__version__,
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        np.dtype(dtype).name,
    ]
    key = hashlib.sha256("\n".join(content).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG Base Directory Specification: ignore relative paths
        base = os.path.expanduser("~/.cache")
    folder = Path(base, "stepctl", "kernels", key[:16])
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    # code that others could write there would run in this process
    is_private = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    if not (is_private and os.access(folder, os.W_OK)):
        return None
    return folder
