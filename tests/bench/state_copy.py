"""The time that a save holds the training thread for the copy of a program's state.

    PYTHONPATH=. python tests/bench/state_copy.py

Timed is `TrainState.snapshot` of float64 arrays: once a save, in milliseconds: median (least..most), beside
`array.copy()` of the same arrays. The copy of the previous save is released before the next one, as in training.
`--objects N` divides the state into N arrays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from stepctl.state.counters import Counters
from stepctl.state.program_state import ProgramState
from stepctl.state.train_state import TrainState

MEGABYTES = (8, 80, 400)


def measure(call: Callable[[], Any], rounds: int) -> str:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        copy = call()
        times.append((time.perf_counter() - start) * 1e3)
        del copy
    return f"{statistics.median(times):.2f} ({min(times):.2f}..{max(times):.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    for megabytes in MEGABYTES:
        size = megabytes * 1_000_000 // 8 // options.objects
        arrays = [generator.normal(size=size) for _ in range(options.objects)]
        counters = Counters({"global_step": 0, "samples_seen": 0})
        state = TrainState(counters, {}, program=ProgramState({"arrays": arrays, "accepted": 3}))
        snapshot = measure(state.snapshot, options.rounds)
        copies = measure(lambda: [array.copy() for array in arrays], options.rounds)  # noqa: B023
        print(f"{megabytes:4} MB: snapshot {snapshot} ms; array.copy() {copies} ms")


if __name__ == "__main__":
    main()
