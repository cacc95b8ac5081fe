"""The share of its wall time that a training thread spends on a mirror whose store fails.

    PYTHONPATH=. python tests/bench/mirror_faults.py
    PYTHONPATH=. python tests/bench/mirror_faults.py --seconds 30 --faults HANG STATUS_503

For each fault of the proxy, every tenth request of a run meets it. The run is a loop whose steps wait for 5 ms and
whose state, 400 KB, is saved every 20 steps. The time in the code of the mirror is counted in the process, on the
training thread, until the loop ends.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import stepctl
from stepctl.runs.mirroring import Mirroring
from tests.support.fault_proxy import Fault
from tests.support.mirror_site import Site, object_store_site

STEP = 0.005  # seconds
EVERY = 20  # steps from save to save


def measure(site: Site, fault: Fault, seconds: float, folder: Path) -> tuple[float, float]:
    """Return the seconds on the training thread and the wall time of one run."""
    spent = [0.0]
    close = Mirroring.close

    def noting_close(mirroring: Mirroring, limit: float | None = None) -> None:
        spent[0] = mirroring.seconds_on_training_thread
        close(mirroring, 1.0 if limit is None else limit)

    site.proxy.restart()
    site.proxy.inject(fault, lambda request: request.number % 10 == 0)
    never = threading.Event()
    state: dict[str, Any] = {"x": np.zeros(50_000)}
    Mirroring.close = noting_close  # type: ignore[method-assign]
    try:
        began = time.perf_counter()
        with stepctl.loop(
            folder / fault.name,
            state,
            last_step=round(seconds / STEP),
            checkpoint_every=EVERY,
            log_every=100,
            mirror=site.new_url(),
        ) as run:
            for step in run:
                never.wait(STEP)
                state["x"] += step
                ended = time.perf_counter()
        return spent[0], ended - began
    finally:
        Mirroring.close = close  # type: ignore[method-assign]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a run")
    parser.add_argument("--faults", nargs="+", default=[fault.name for fault in Fault])
    options = parser.parse_args()
    with object_store_site(rate=200_000) as site, tempfile.TemporaryDirectory() as name:
        os.environ.update(site.environment())
        for fault in options.faults:
            spent, wall = measure(site, Fault[fault], options.seconds, Path(name))
            met = sum(request.fault is not None for request in site.proxy.requests)
            print(
                f"{fault:<15} {1e3 * spent:6.2f} ms of {wall:5.1f} s: {spent / wall:.4%}; {met} of "
                f"{site.proxy.n_requests} requests met the fault",
                flush=True,
            )


if __name__ == "__main__":
    main()
