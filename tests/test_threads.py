"""BLAS threads: what `auto` counts, and the warning where a busy machine makes them slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers import make_config, resume, train
from stepctl import numerics

two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: BLAS runs one thread")


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 3.0),
        ({"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "400000 100000\n"}, "0::/a/b\n", 1.0),
        ({"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/a\n", 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n", None),
        ({}, "", None),
    ],
)
def test_the_quota_of_a_cgroup_is_found(
    files: dict[str, str], membership: str, quota: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert numerics.cgroup_quota(str(tmp_path), str(tmp_path / "membership")) == quota


@pytest.mark.parametrize(("quota", "threads"), [(None, 8), (3.5, 3), (0.5, 1), (64.0, 8)])
def test_auto_takes_no_more_threads_than_the_quota(
    quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(numerics, "cgroup_quota", lambda: quota)
    monkeypatch.setattr(numerics, "threads_asked", lambda: None)
    assert numerics.default_threads() == threads


@two_cores
@pytest.mark.parametrize(("ratio", "warnings"), [(6.0, 1), (1.2, 0)])
def test_slow_threads_are_told(ratio: float, warnings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "slowdown", lambda threads: ratio)
    train(make_config(stop={"last_step": 2}, numerics={"threads": 2}), tmp_path / "run")
    said: list[str] = []
    resume(tmp_path / "run", last_step=4, say=said.append)
    assert len(said) == warnings
    for line in said:
        assert "2 BLAS threads are 6.0 times slower than one" in line
        assert "--set numerics.threads=1 --allow-change numerics.threads" in line


@two_cores
def test_the_probe_leaves_the_threads_as_they_were() -> None:
    numerics.settle(2)
    ticks = iter(range(10**6))
    assert numerics.slowdown(2, lambda: float(next(ticks))) == 1.0
    assert {library["num_threads"] for library in numerics.loaded_blas().info()} == {2}
    numerics.settle(1)
