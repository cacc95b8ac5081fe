"""Compiled updates give the bits of NumPy, for any values; numba is only loaded where that pays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl import optimizers
from stepctl.config import registry
from stepctl.optimizers import base, compilation, kernels
from stepctl.optimizers.base import Optimizer, UpdateInfo
from stepctl.optimizers.compilation import CompilationError
from stepctl.optimizers.kernels import CompiledUpdate
from stepctl.optimizers.moving_average import MovingAverage
from stepctl.optimizers.schedules import Constant
from stepctl.optimizers.sgd import SGD
from stepctl.rundir.directory import RunDirectory
from stepctl.state.arena import PARTITION_BLOCK, Arena, Array, Partition
from stepctl.training import compile_updates as decision
from stepctl.training.build import assemble
from stepctl.training.compile_updates import compile_updates, seconds_saved
from tests.optimizers.test_groups import grouped
from tests.optimizers.test_optimizers import CASES, gradients, start
from tests.support.counting_optimizer import Counting
from tests.support.runs import make_config, resume, rows, train

DTYPES = ("float32", "float64")
# Longer than a copied block and than a block of the partition, with gaps and short arrays.
SHAPES = {
    "embedding/weight": (12_345, 2),
    "dense0/weight": (64, 3),
    "dense0/bias": (3,),
    "head/weight": (3, 5),
    "head/bias": (5,),
}


class Half(Partition):
    """The second of two processes."""

    def owned_slice(self, n: int) -> slice:
        return slice(PARTITION_BLOCK, n)


OPTIONS: list[dict[str, Any]] = [
    {"special": False},
    {"special": True},
    {"special": True, "partition": Half()},
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def compiled_update(optimizer: Optimizer, dtype: str) -> CompiledUpdate:
    pytest.importorskip("numba")
    compiled = compilation.compile_update(optimizer, dtype)
    assert compiled is not None
    return compiled


def awkward(n: int, dtype: str, seed: int) -> Array:
    """Return random values, a third of them subnormal, infinite, NaN, signed zeros, or the extremes."""
    random = np.random.default_rng(seed)
    limits = np.finfo(dtype)
    tiny = float(limits.smallest_subnormal)
    special = [np.inf, np.nan, 0.0, tiny, 77 * tiny, float(limits.tiny), float(limits.max), 1.0]
    values = random.standard_normal(n) * 10.0 ** random.integers(-12, 12, n)
    signed = random.choice(special, n) * random.choice([-1, 1], n)
    return np.where(random.random(n) < 1 / 3, signed, values).astype(dtype)


def same_bits_or_nan(a: Array, b: Array) -> bool:
    """Tell whether all bits are equal, except for those of NaNs at equal positions."""
    bits = f"u{a.dtype.itemsize}"
    return bool(np.array_equal(np.isnan(a), np.isnan(b))) and bool(
        (np.isnan(a) | (a.view(bits) == b.view(bits))).all()
    )


def updated(
    optimizer: Optimizer,
    dtype: str,
    compiled: CompiledUpdate | None,
    *,
    special: bool,
    partition: Partition | None = None,
) -> list[Array]:
    """Return parameters and slots after each of four updates, in place and out of place."""
    params = Arena(SHAPES, dtype)
    arenas = [params, *optimizer.initial_slots(params).values()]
    found = []
    for number, arena in enumerate(arenas):
        arena.flat[:] = awkward(len(arena.flat), dtype, number) if special else 0
        if not special and number == 0:
            arena.flat[:] = np.random.default_rng(0).standard_normal(len(arena.flat))
    arenas = [
        Arena(SHAPES, dtype, arena.flat, read_only=True, partition=partition or arena.partition)
        for arena in arenas
    ]
    slots = dict(zip(optimizer.slots, arenas[1:], strict=True))
    for number in range(1, 5):
        grads = params.like()
        grads.flat[:] = np.random.default_rng(number).standard_normal(len(grads.flat))
        if special:
            grads.flat[:] = awkward(len(grads.flat), dtype, 10 + number)
        if number % 2 == 0:
            for arena in arenas[: number - 1]:  # one arena alone, then all of them
                arena.snapshot()
        info = UpdateInfo(0.05 / number, number)
        optimizer.update(arenas[0], slots, grads, info, compiled=compiled)
        found += [arena.flat.copy() for arena in arenas]
    return found


def test_there_is_a_kernel_for_every_optimizer_and_for_none_of_a_user() -> None:
    known = {registry.resolve("optimizer", name) for name in optimizers.NAMES}
    assert {type(case[0]) for case in CASES.values()} == known
    assert all(kernels.kernel_of(case[0]) is not None for case in CASES.values())
    assert kernels.kernel_of(Counting(learning_rate=Constant(value=0.1))) is None

    class Mine(SGD):
        def update_block(self, *arguments: Any) -> None:
            raise AssertionError

    assert kernels.kernel_of(Mine(learning_rate=Constant(value=0.1))) is None


@pytest.mark.training
@pytest.mark.usefixtures("kernel_cache")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_numpy_s(case: str, dtype: str) -> None:
    for optimizer in (CASES[case][0], grouped(CASES[case][0])):
        compiled = compiled_update(optimizer, dtype)
        for options in OPTIONS:
            expected = updated(optimizer, dtype, None, **options)
            found = updated(optimizer, dtype, compiled, **options)
            assert all(map(same_bits_or_nan, found, expected))
            assert any(np.isnan(array).any() for array in expected) == options["special"]


@pytest.mark.usefixtures("kernel_cache")
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "THREADED", 0)
    monkeypatch.setattr(base, "BLOCK", 1 << 12)
    optimizer = grouped(CASES["adamw, clipped"][0])
    compiled = compiled_update(optimizer, "float32")
    found = []
    for threads in (1, 3):
        params, slots = start(optimizer, SHAPES, "float32")
        for number, grads in enumerate(gradients(params, 2), 1):
            info = UpdateInfo(0.1, number)
            optimizer.update(params, slots, grads, info, threads=threads, compiled=compiled)
        found.append([arena.flat.tobytes() for arena in (params, *slots.values())])
    assert found[0] == found[1]


@pytest.mark.usefixtures("kernel_cache")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_moving_average_has_numpy_s_bits(dtype: str) -> None:
    pytest.importorskip("numba")
    kernel = compilation.compile_average(dtype)
    found = []
    for compiled in (kernel, None):
        average = Arena(SHAPES, dtype)
        average.flat[:] = awkward(len(average.flat), dtype, 0)
        average = average.to_read_only(copy=True)
        for number in range(1, 4):
            params = average.like()
            params.flat[:] = awkward(len(params.flat), dtype, number)
            if number == 2:
                average.snapshot()
            params = params.to_read_only(copy=False)
            MovingAverage(0.9, warmup=True).update(average, params, number, compiled)
        found.append(average.flat)
    assert same_bits_or_nan(*found)
    assert np.isnan(found[0]).any()


def test_a_weight_decay_that_rounds_to_zero_still_adds_its_zero() -> None:
    """g = -0 and p = 1: NumPy's path computes -0 + 0, which is +0, and not -0."""
    optimizer = SGD(learning_rate=Constant(value=1.0), weight_decay=1e-60, momentum=0.5)
    compiled = CompiledUpdate(optimizer, kernels._momentum)  # not compiled, but run by Python
    signs = []
    for update in (compiled, None):
        params = Arena({"x": (1,)}, "float32")
        params["x"] = 1
        velocity = params.like()
        velocity["x"] = -0.0
        grads = params.like()
        grads["x"] = -0.0
        optimizer.update(params, {"momentum": velocity}, grads, UpdateInfo(1, 1), compiled=update)
        signs.append(bool(np.signbit(velocity["x"][0])))
    assert signs == [False, False]


# --- loading


@pytest.mark.training
@pytest.mark.parametrize("damage", ["nothing", "garbage", "read-only", "a file", "of others"])
def test_the_cache_folder_is_used_if_it_is_sound(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numba = pytest.importorskip("numba")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = numba.config.CACHE_DIR
    compilation._compile.cache_clear()
    folder = compilation.cache_folder("float32")
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    if damage == "garbage":
        compilation.compile_average("float32")
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        for path in files:
            path.write_bytes(b"garbage")
    elif damage == "read-only":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    elif damage == "a file":
        folder.rmdir()
        folder.write_text("")
    elif damage == "of others":
        folder.chmod(0o777)
    usable = damage in ("nothing", "garbage")
    assert (compilation.cache_folder("float32") is not None) == usable
    compilation._compile.cache_clear()
    compilation.compile_average("float32")  # it compares the bits
    assert before == numba.config.CACHE_DIR
    assert any(path.suffix == ".nbi" for path in tmp_path.rglob("*")) == usable


def idle(bounds: Array, numbers: Array, grads: Array, params: Array) -> None:
    """Take the arguments of a kernel and do nothing."""


@pytest.mark.usefixtures("kernel_cache")
def test_a_kernel_with_other_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(kernels, "_sgd", idle)
    with pytest.raises(CompilationError, match=r"the compiled SGD differs from NumPy's"):
        compilation.compile_update(SGD(learning_rate=Constant(value=0.1)), "float32")


@pytest.mark.process
def test_processes_that_compile_at_a_time_agree(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    code = "from stepctl.optimizers import compilation; compilation.compile_average('float32')"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    jobs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert len(list(tmp_path.rglob("*.nbi"))) == 1


# --- where it pays


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch, kernel_cache: Path) -> None:
    """Compile the updates of every run, however short."""
    monkeypatch.setattr(decision, "_WORTHWHILE", 0.0)


def test_only_a_long_run_with_numba_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(compilation, "compile_update", lambda *arguments: calls.append("") or None)
    monkeypatch.setattr(compilation, "is_available", lambda: True)
    assembly = assemble(make_config())
    assert seconds_saved(assembly, 2000) == pytest.approx(1000 * 2 * 16e-6, rel=0.2)
    assert compile_updates(assembly, 100) is None
    assert calls == []
    assert compile_updates(assembly, 10**6) is None
    assert calls == [""]
    assert compile_updates(assemble(make_config(numerics={"compiled": "off"})), 10**6) is None
    monkeypatch.setattr(compilation, "is_available", lambda: False)
    assert compile_updates(assembly, 10**6) is None
    assert calls == [""]


@pytest.mark.training
@pytest.mark.usefixtures("eager")
def test_a_run_may_switch_at_any_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    used: list[type] = []
    original = CompiledUpdate.__call__

    def spy(self: CompiledUpdate, *arguments: Any) -> None:
        used.append(type(self))
        original(self, *arguments)

    monkeypatch.setattr(CompiledUpdate, "__call__", spy)
    options: dict[str, Any] = {
        "optimizer": {
            "name": "adamw",
            "learning_rate": 0.01,
            "clip_norm": 0.1,
            "weight_decay": {"default": 0.1, "*/bias": 0.0},
            "learning_rate_multipliers": {"dense1/*": 3.0},
        },
        "ema": {"decay": 0.9},
        "checkpoint": {"every": 4},
    }
    off = {"numerics": {"threads": 1, "compiled": "off"}}
    expected = train(make_config(**options, **off), tmp_path / "off")
    assert not used
    path = tmp_path / "switched"
    train(make_config(**options, stop={"last_step": 11}), path)
    n_used = len(used)
    assert n_used >= 11
    resume(path, last_step=23, assignments=("numerics.compiled=off",))
    assert len(used) == n_used
    state = resume(path, last_step=40, assignments=("numerics.compiled=auto",))
    assert len(used) > n_used
    assert state.same_bits(expected)
    assert rows(path)[-1] == rows(tmp_path / "off")[-1]
    starts = RunDirectory(path).read_ledger().starts
    assert len({str(start["numerics"]) for start in starts}) == 1


@pytest.mark.usefixtures("eager")
def test_a_run_says_so_once_and_goes_on_if_numba_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise CompilationError("ImportError: no LLVM")

    monkeypatch.setattr(compilation, "is_available", lambda: True)
    monkeypatch.setattr(compilation, "compile_update", fail)
    expected = train(make_config(numerics={"threads": 1, "compiled": "off"}), tmp_path / "off")
    train(make_config(stop={"last_step": 10}), tmp_path / "run")
    said: list[str] = []
    state = resume(tmp_path / "run", last_step=40, say=said.append)
    assert state.same_bits(expected)
    (line,) = (line for line in said if "compiled" in line)
    assert line.startswith("note: the updates are not compiled (ImportError: no LLVM)")


@pytest.mark.process
def test_a_short_run_does_not_import_numba(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(make_config().text)
    code = (
        "import sys; from stepctl.cli.main import cli\n"
        "try: cli(sys.argv[1:])\n"
        "except SystemExit as end: print('LOADED', end.code, *{'numba', 'llvmlite'} & set(sys.modules))"
    )
    for command in (["train", "--config", "c.yaml", "--run-dir", "run", "-q"], ["inspect", "run"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.endswith("LOADED 0\n")


def test_a_relative_cache_folder_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("numba")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    folder = compilation.cache_folder("float32")
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "home" / ".cache")
