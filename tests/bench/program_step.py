"""The cost per step of a stepctl.Program and of stepctl.loop, against the plain loop, in one process.

    PYTHONPATH=. python tests/bench/program_step.py
    PYTHONPATH=. python tests/bench/program_step.py --rounds 100

A step changes four numbers of a small state, draws from 0, 1 or 2 streams, and returns one metric. Stretches of steps
in a run and of the same steps in a plain loop take turns. "log 100" writes a row every 100 steps, "saves 100" a
checkpoint; "log 1, saves 100" are the defaults of stepctl.loop. Printed is first what stepctl adds to an empty step,
then its share of steps that compute longer: the median over the rounds, the quartiles, and the difference of the least
times. Times are of the process's own, background thread included, so that busy neighbors count little.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import stepctl

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
STREAMS = ("first", "second")
STRETCH = 1000  # steps without work between two turns
TURN = 0.02  # seconds between two turns, of steps with work
FAR = 10**9
WORK = np.linspace(0.0, 1.0, 10_000)
OUT = np.empty_like(WORK)
TARGET_BASE, TARGET_STREAM, TARGET_SHARE = 10, 2, 0.02  # us, us a stream


class Case(NamedTuple):
    """What is compared: the streams and the work of a step, the cadences of the run, and the turns."""

    streams: tuple[str, ...]
    repeats: int  # of the work in a step
    log_every: int
    checkpoint_every: int
    stretch: int  # steps of a turn
    rounds: int

    @property
    def last_step(self) -> int:
        return self.stretch * (self.rounds + 2)


def initial_state() -> dict[str, Any]:
    return {"x": np.ones(4), "count": 0}


def compute(state: dict[str, Any], rng: Callable[[str], np.random.Generator], case: Case) -> float:
    """Make one step; return a metric."""
    x = state["x"]
    x *= 0.999
    for name in case.streams:
        x += rng(name).standard_normal(4)
    for _ in range(case.repeats):
        np.sin(WORK, out=OUT)
    state["count"] += 1
    return x[0]


def plain_streams(case: Case) -> Callable[[str], np.random.Generator]:
    return {name: np.random.default_rng() for name in case.streams}.__getitem__


class Turns:
    """Times stretches of steps of a run, and after each as many steps in a plain loop."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.in_run: list[float] = []  # seconds per step, one a round
        self.plain: list[float] = []
        self._state = initial_state()
        self._rng = plain_streams(case)
        self._began = 0.0

    def begin_step(self, step: int) -> None:
        """At the first step of a stretch, end the previous one, and make the plain steps."""
        if step % self.case.stretch != 0:
            return
        ended = time.process_time()
        for _ in range(self.case.stretch):
            compute(self._state, self._rng, self.case)
        plain_ended = time.process_time()
        if step >= 2 * self.case.stretch:  # the first stretch warms up
            self.in_run.append((ended - self._began) / self.case.stretch)
            self.plain.append((plain_ended - ended) / self.case.stretch)
        self._began = time.process_time()


class Small(stepctl.Program):
    """The step as a program."""

    turns: Turns

    def initial_state(self, rng: Any) -> dict[str, Any]:
        return initial_state()

    def step(self, state: dict[str, Any], step: int, rng: Any) -> Mapping[str, float]:
        self.turns.begin_step(step)
        return {"x": compute(state, rng, self.turns.case)}


def run_program(run_dir: Path, case: Case) -> Turns:
    turns = Small.turns = Turns(case)
    config = {
        "program": {"name": "__main__:Small"},
        "stop": {"last_step": case.last_step},
        "log": {"every": case.log_every},
        "checkpoint": {"every": case.checkpoint_every},
        "check_determinism": False,
    }
    with stepctl.create(config, run_dir, say=lambda message: None) as run:
        run.train()
    return turns


def run_script(run_dir: Path, case: Case) -> Turns:
    turns = Turns(case)
    state = initial_state()
    with stepctl.loop(
        run_dir,
        state,
        last_step=case.last_step,
        log_every=case.log_every,
        checkpoint_every=case.checkpoint_every,
    ) as run:
        for step in run:
            turns.begin_step(step)
            run.log(x=compute(state, run.rng, case))
    return turns


def run_plain(run_dir: Path, case: Case) -> Turns:
    """Compare the plain loop with itself: what this prints is the error of the others."""
    turns = Turns(case)
    rng = plain_streams(case)
    state = initial_state()
    for step in range(case.last_step):
        turns.begin_step(step)
        compute(state, rng, case)
    return turns


FORMS: dict[str, Callable[[Path, Case], Turns]] = {
    "Program": run_program,
    "loop": run_script,
    "plain": run_plain,
}
CADENCES = {
    "log 100": (100, FAR),
    "log 100, saves 100": (100, 100),
    "log 1, saves 100": (1, 100),
}


def measure(form: str, case: Case) -> Turns:
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        return FORMS[form](Path(folder, "run"), case)


def print_costs(form: str, rounds: int, cadences: str) -> None:
    """Print what stepctl adds to a step that computes almost nothing."""
    for n_streams in range(len(STREAMS) + 1):
        turns = measure(form, Case(STREAMS[:n_streams], 0, *CADENCES[cadences], STRETCH, rounds))
        added = [(a - b) * 1e6 for a, b in zip(turns.in_run, turns.plain, strict=True)]
        low, middle, high = statistics.quantiles(added, n=4)
        best = (min(turns.in_run) - min(turns.plain)) * 1e6
        plain = statistics.median(turns.plain) * 1e6
        target = TARGET_BASE + TARGET_STREAM * n_streams
        print(
            f"{form:8} {cadences:19} {n_streams} streams: {middle:5.1f} us a step ({low:.1f} to {high:.1f}, "
            f"best {best:.1f}) beside {plain:.1f} of its own; target {target}",
            flush=True,
        )


def print_shares(form: str, rounds: int, cadences: str) -> None:
    """Print the share of stepctl in steps of 1, 2 and 5 ms."""
    began = time.process_time()
    for _ in range(1000):
        np.sin(WORK, out=OUT)
    one_repeat = (time.process_time() - began) / 1000
    for milliseconds in (1, 2, 5):
        seconds = milliseconds * 1e-3
        repeats = round(seconds / one_repeat)
        case = Case(STREAMS[:1], repeats, *CADENCES[cadences], round(TURN / seconds), 5 * rounds)
        turns = measure(form, case)
        shares = [a / b - 1 for a, b in zip(turns.in_run, turns.plain, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        best = min(turns.in_run) / min(turns.plain) - 1
        plain = statistics.median(turns.plain) * 1e3
        print(
            f"{form:8} {cadences:19} steps of {plain:.2f} ms: {middle:6.2%} ({low:.2%} to {high:.2%}, "
            f"best {best:.2%}); "
            f"target {TARGET_SHARE:.0%}",
            flush=True,
        )


def main() -> None:
    """Measure in a process in which OpenBLAS chooses its kernel, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    if set(UNSET) & set(os.environ):
        environment = {key: value for key, value in os.environ.items() if key not in UNSET}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    for form in options.forms:
        for cadences in CADENCES:
            print_costs(form, options.rounds, cadences)
        for cadences in CADENCES:
            print_shares(form, options.rounds, cadences)
    print(
        f"{options.rounds} rounds, Python {platform.python_version()}, numpy {np.__version__}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
