"""BLAS threads: what `auto` counts, and the warning where a busy machine makes them slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepctl.hooks import slow_threads
from stepctl.hooks.slow_threads import SlowThreads
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.system import blas, cpus
from tests.support.runs import make_config

two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: BLAS runs one thread")


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 3.0),
        ({"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "400000 100000\n"}, "0::/a/b\n", 1.0),
        (
            {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            "4:cpu,cpuacct:/a\n",
            2.0,
        ),
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
    assert cpus.cgroup_cpus(str(tmp_path), str(tmp_path / "membership")) == quota


@pytest.mark.parametrize(("quota", "threads"), [(None, 8), (3.5, 3), (0.5, 1), (64.0, 8)])
def test_auto_uses_no_more_threads_than_the_quota(
    quota: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(blas, "cgroup_cpus", lambda: quota)
    monkeypatch.setattr(blas, "environment_threads", lambda: None)
    assert blas.default_threads() == threads


class Probes:
    """A clock that each step moves on by a second, and a probe that takes 10 ms and finds the given slowdowns."""

    def __init__(self, ratios: list[float]) -> None:
        self.now, self.ratios, self.calls, self.warnings = 0.0, iter(ratios), 0, list[float]()
        self.hook = SlowThreads(self.probe, self.warnings.append, lambda: self.now)

    def probe(self) -> float:
        self.now += 0.01
        self.calls += 1
        return next(self.ratios)

    def steps(self, n: int) -> None:
        state = TrainState(counters=Counters({"global_step": 0, "samples_seen": 0}), arenas={})
        self.hook.start(state)
        for _ in range(n):
            self.hook.after_step(state, {})
            self.now += 1.0


def test_a_machine_that_is_slow_now_and_then_is_warned_of_once() -> None:
    probes = Probes([0.6, 6.0, 0.6, 0.7, 80.0, 0.6, 5.0, *[6.0] * 100])
    probes.steps(200)
    assert probes.warnings == [6.0]
    assert probes.calls == 7


def test_a_hiccup_is_no_warning_and_probing_takes_half_a_percent_at_most() -> None:
    probes = Probes(([9.0, 9.0] + [0.6] * 10) * 100)
    probes.steps(1000)
    assert probes.warnings == []
    assert 10 < probes.calls * 0.01 / probes.now * 20_000 <= 100


def test_a_run_of_less_than_a_second_is_not_probed() -> None:
    probes = Probes([])
    probes.steps(1)
    assert probes.calls == 0


@pytest.mark.training
@two_cores
def test_the_warning_says_what_to_do_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "slowdown", lambda threads: 6.0)
    monkeypatch.setattr(slow_threads, "_FIRST_PROBE", 0.0)
    monkeypatch.setattr(slow_threads, "_MIN_INTERVAL", 0.0)
    said: list[str] = []
    with create_run(
        make_config(numerics={"threads": 2}), RunDirectory(tmp_path / "run"), said.append
    ) as segment:
        segment.train()
    assert len(said) == 1
    assert "2 BLAS threads are 6.0 times slower than one" in said[0]
    assert "--set numerics.threads=1 --allow-change numerics.threads" in said[0]


@two_cores
def test_the_probe_leaves_the_threads_as_they_were() -> None:
    blas.set_threads(2)
    ticks = iter(range(10**6))
    assert blas.slowdown(2, lambda: float(next(ticks))) == 1.0
    assert {library["num_threads"] for library in blas.loaded_blas().info()} == {2}
    blas.set_threads(1)
