"""The cost of a batch when the data set is a hundred times larger, and at a distant position.

Three questions, each answered by two cases that take turns in one process:

- contiguous, chunked: `TrainingBatches.batch` of an HDF5 set of 10^7 rows against one of 10^5 (32 float32 features,
  an int64 label; target 1.2). Time per batch of 256 shuffled rows, averaged over 32 batches in a row, which includes
  one look-up of their order. The files were read through once, so they come from the page cache; what remains is what
  scattered reads cost: page faults, misses of the processor's caches, and chunks to fetch (both files' chunks hold
  --chunk-rows rows, so that a batch touches almost as many chunks as it has rows once the file has many more).
- seek: 32 batches from sample 10^12 of a source that computes its rows, against 32 from sample 0.

Memory is that of a child process that reads 200 batches: what Python allocates at its peak (tracemalloc), private
memory (RssAnon), and peak resident memory (VmHWM: unlike ru_maxrss, which a child inherits), in which the mapped pages
of the file count. By hand, from the checkout:

    PYTHONPATH=. python tests/bench/scale.py
    PYTHONPATH=. python tests/bench/scale.py --rows 1000 100000 --rounds 20
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from stepctl.data.base import Source
from stepctl.data.batches import Subset, TrainingBatches
from stepctl.data.hdf5 import hdf5
from stepctl.state.arena import Array

FEATURES, BATCH, BATCHES = 32, 256, 32
FAR = 10**12


class Computed(Source):
    """Rows that are a function of their number."""

    def __init__(self, n: int) -> None:
        self.origin, self.n, self.sample_shape, self.target_shape = (
            "computed rows",
            n,
            (FEATURES,),
            (),
        )
        self._features = np.arange(FEATURES)

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        np.add(rows[:, None] % 1000, self._features, out=x, casting="unsafe")
        np.remainder(rows, 10, out=y)

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        raise NotImplementedError  # never asked for: the set is larger than any disk

    def fingerprint(self) -> str:
        return str(self.n)


def batches(source: Source) -> TrainingBatches:
    """Return the batches of all rows of a source."""
    return TrainingBatches(Subset(source, source.n), seed=0, batch_size=BATCH, dtype="float32")


def open_file(path: str) -> TrainingBatches:
    """Return the batches of a file, as a run opens it."""
    return batches(hdf5(path=path, targets="classes", dtype="float32").train)


def make_file(path: Path, n: int, chunk: int | None) -> None:
    """Write n random rows, contiguous or in chunks, and read them once so that they are in the page cache."""
    rng, at_a_time = np.random.default_rng(0), 10**5
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", (n, FEATURES), "<f4", chunks=chunk and (chunk, FEATURES))
        y = file.create_dataset("y", (n,), "<i8", chunks=chunk and (chunk,))
        for first in range(0, n, at_a_time):
            rows = min(at_a_time, n - first)
            x[first : first + rows] = rng.random((rows, FEATURES), dtype=np.float32)
            y[first : first + rows] = rng.integers(0, 10, rows)
    with path.open("rb") as raw:
        while raw.read(1 << 24):
            pass


def timed(one: TrainingBatches, start: int) -> float:
    """Return the microseconds per batch of BATCHES batches from a position."""
    begin = time.perf_counter()
    for i in range(BATCHES):
        one.batch(start + i * BATCH)
    return (time.perf_counter() - begin) / BATCHES * 1e6


def compare(
    name: str, small: tuple[TrainingBatches, int], large: tuple[TrainingBatches, int], rounds: int
) -> None:
    """Time both by turns, each round at its next position, and print a row."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(-3, rounds):
        both = [(0, small), (1, large)]
        for which, (one, start) in both if i % 2 else reversed(both):
            taken = timed(one, start + (i + 3) * BATCHES * BATCH)
            if i >= 0:
                times[which].append(taken)
    cells = [f"{statistics.median(t):.0f} ({min(t):.0f}..{max(t):.0f})" for t in times]
    low, middle, high = statistics.quantiles((b / a for a, b in zip(*times, strict=True)), n=4)
    best = min(times[1]) / min(times[0])
    print(
        f"{name:<16}{cells[0]:<22}{cells[1]:<22}{f'{middle:.2f} ({low:.2f}..{high:.2f})':<24}{best:.2f}",
        flush=True,
    )


def memory_child(path: str) -> None:
    """Read 200 batches of a file and print the memory that it took, in KiB."""
    tracemalloc.start()
    one = open_file(path)
    tracemalloc.reset_peak()
    for i in range(200):
        one.batch(i * BATCH)
    python = tracemalloc.get_traced_memory()[1] >> 10
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([python, *(int(status[key].split()[0]) for key in ("RssAnon", "VmHWM"))]))


def memory(name: str, small: Path, large: Path) -> None:
    """Print what both files cost in memory."""
    command = [sys.executable, __file__, "--memory-of"]
    found = [json.loads(subprocess.check_output([*command, str(path)])) for path in (small, large)]
    cells = [f"{a / 1024:.1f} -> {b / 1024:.1f}".ljust(22) for a, b in zip(*found, strict=True)]
    print(f"{name:<16}{''.join(cells)}", flush=True)


def main() -> None:
    """Measure and print, or be a child."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs=2, type=int, default=(10**5, 10**7), metavar=("SMALL", "LARGE")
    )
    parser.add_argument("--chunk-rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--directory", help="where the files are made for the time being (2.8 GB)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_child(options.memory_of)
        return
    header = f"{'us a batch':<16}{'small/near':<22}{'large/far':<22}{'ratio':<24}best"
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for name, chunk in (("contiguous", None), ("chunked", options.chunk_rows)):
            paths = [Path(folder) / f"{name}-{n}.h5" for n in options.rows]
            for path, n in zip(paths, options.rows, strict=True):
                make_file(path, n, chunk)
            print(header)
            small, large = (open_file(str(path)) for path in paths)
            compare(
                name,
                (small, 0),
                (large, 0),
                options.rounds if chunk is None else -(-options.rounds // 4),
            )
            print(f"{'MiB':<16}{'Python peak':<22}{'private':<22}peak resident")
            memory(name, *paths)
    print(header)
    for n in (1000, 10**13):
        one = batches(Computed(n))
        compare(f"seek, n {n:.0e}", (one, 0), (one, FAR), options.rounds)
    print(f"h5py {h5py.__version__}, NumPy {np.__version__}, Python {platform.python_version()}, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
