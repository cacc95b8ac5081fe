"""The cost of a mirror: the time that a save blocks the training thread, and memory, with and without one.

    PYTHONPATH=. python tests/bench/mirror.py
    PYTHONPATH=. python tests/bench/mirror.py --store s3    # a server on this machine, which needs its processors

An MLP of 21 million parameters with Adam saves 252 MB every 8 steps. Each run is a process of its own, and runs with
and without a mirror take turns. Printed are the time in the hooks that save and that mirror, from save to save, in
milliseconds, without the first save, which maps memory; the length of a step; and the peak resident memory, in
checkpoints: median (least..most). The store is a directory, whose writes share the disk with the run's own. On a busy
machine, prefix `nice -n -15`; a real-time priority would keep the threads of one process from each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.save import UNSET, spread
from tests.support.mirror_site import BUCKET
from tests.support.object_store import s3_server

WAYS = ("without", "with")
EVERY = 8  # steps from save to save


def run_once(folder: Path, url: str | None, n_saves: int, batch_size: int) -> dict[str, Any]:
    """Train in this process, and return what was measured."""
    import numpy as np

    from stepctl.hooks.base import Hook
    from stepctl.hooks.save import Save
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.mirroring import Mirroring
    from stepctl.runs.open import create_run
    from tests.support.runs import make_config

    generator = np.random.default_rng(0)
    np.savez(
        folder / "x.npz",
        x=generator.normal(size=(4096, 1024)).astype("f4"),
        y=generator.integers(0, 10, 4096),
    )
    seconds = [0.0]  # in the hooks, by step

    def timed(hook: type[Hook]) -> None:
        real = hook.after_step

        def after_step(self: Any, *arguments: Any) -> None:
            began = time.perf_counter()
            real(self, *arguments)
            seconds[-1] += time.perf_counter() - began

        hook.after_step = after_step  # type: ignore[method-assign]

    class Steps(Hook):
        name = "steps"
        ends: list[float] = []  # noqa: RUF012

        def after_step(self, *_: object) -> None:
            self.ends.append(time.perf_counter())
            seconds.append(0.0)

    timed(Save)
    timed(Mirroring)
    config = make_config(
        data={
            "name": "arrays",
            "path": str(folder / "x.npz"),
            "batch_size": batch_size,
            "n_classes": 10,
        },
        model={"name": "mlp", "hidden": [4096, 4096]},
        evaluate={"every": None},
        log={"every": 1000},
        checkpoint={"every": EVERY, "keep_last": 1},
        mirror=None if url is None else {"url": url, "keep_last": 1},
        stop={"last_step": EVERY * (n_saves + 1)},
        numerics={"threads": "auto"},
    )
    steps = Steps()
    peak = PeakMemory()
    with peak, create_run(config, RunDirectory(folder / "run")) as segment:
        segment.train(hooks=[steps])
        n_bytes = segment.state.n_bytes
    by_save = [sum(seconds[i : i + EVERY]) for i in range(EVERY - 1, len(seconds) - EVERY, EVERY)]
    lengths = [after - before for before, after in zip(steps.ends, steps.ends[1:], strict=False)]
    return {
        "stall": [1e3 * value for value in by_save[1:]],
        "step": lengths[EVERY:],
        "peak": peak.most / n_bytes,
    }


class PeakMemory:
    """The most memory that was resident in a block, in bytes."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.most = max(self.most, pages * os.sysconf("SC_PAGE_SIZE"))


@contextlib.contextmanager
def store(kind: str, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Provide a new mirror: its URL, and the environment for its users."""
    if kind == "file":
        yield (folder / "mirror").as_uri(), {}
        return
    with s3_server() as server:
        server.create_bucket(BUCKET)
        yield f"s3://{BUCKET}/run", server.environment


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run once in a new process."""
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        with store(options.store, folder) as (url, variables):
            command = [sys.executable, "-W", "ignore", __file__, "once", "--folder", name]
            command += ["--saves", str(options.saves), "--batch-size", str(options.batch_size)]
            if way == "with":
                command += ["--url", url]
            output = subprocess.run(
                command, env=environment | variables, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> None:
    """Measure in turns, and print."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in WAYS if number % 2 else WAYS[::-1]:
            found[way].append(measure(way, options))
    for way in WAYS:
        stalls = [value for one in found[way] for value in one["stall"]]
        steps = [value for one in found[way] for value in one["step"]]
        peaks = [one["peak"] for one in found[way]]
        print(
            f"{way} a mirror: a save {spread(stalls)} ms ({len(stalls)} saves); a step "
            f"{spread(steps, 2)} s; peak memory {spread(peaks, 2)} checkpoints"
        )
    pairs = list(zip(found["with"], found["without"], strict=True))
    stall = [statistics.median(a["stall"]) - statistics.median(b["stall"]) for a, b in pairs]
    step = [statistics.median(a["step"]) / statistics.median(b["step"]) for a, b in pairs]
    peak = [a["peak"] - b["peak"] for a, b in pairs]
    print(
        f"by round, a mirror adds {spread(stall)} ms per save and {spread(peak, 2)} checkpoints of "
        f"memory; a step takes {spread(step, 2)} of one without"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["all", "once"], default="all", nargs="?")
    parser.add_argument("--store", choices=["file", "s3"], default="file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--directory", type=Path, help="for runs and mirrors; default: temporary")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "once":
        result = run_once(options.folder, options.url, options.saves, options.batch_size)
        print(json.dumps(result))
    else:
        compare(options)


if __name__ == "__main__":
    main()
