"""The speed of training on several ranks against one, and of the gradient sum against MPI's Allreduce.

    PYTHONPATH=. python tests/bench/ranks.py
    PYTHONPATH=. python tests/bench/ranks.py --ranks 2 4 --size 784-256-10@128 --rounds 8

An MLP with relu and Adam, one BLAS thread a rank, the same shards for every number of ranks, so that all compute the
same bits. Jobs take turns, and ratios are taken round by round. Printed are medians (least..most). The exchange is
timed inside the job, between barriers, in turns with an Allreduce of the same bytes. It is all that a step does beside
computing and updating: it sums the gradient, agrees that this is finite, and meets before and after the update. With
--messages it goes by messages, as it would between hosts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
WARM, EXCHANGES = 5, 40  # steps before the timed ones, and exchanges


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def rank(options: argparse.Namespace) -> None:
    """Be one rank of a job; the first prints {"step": seconds, "exchange": seconds, "allreduce": seconds}."""
    from stepctl.distributed import comm as comms
    from stepctl.system import blas

    comm: Any = comms.communicator()
    blas.set_environment(1, blas.AUTO)
    import numpy as np

    from stepctl.config import model, yaml
    from stepctl.training import build, ranks
    from stepctl.training.trainer import Trainer

    if options.messages:
        comm._one_host = False
    layers, _, batch_size = options.size.partition("@")
    widths = [int(width) for width in layers.split("-")]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.npz")
        np.savez(
            path,
            x=rng.standard_normal((2048, widths[0]), np.float32),
            y=np.arange(2048) % widths[-1],
        )
        document = {
            "data": {
                "name": "arrays",
                "path": path,
                "batch_size": int(batch_size),
                "shards": options.shards,
            },
            "model": {"name": "mlp", "hidden": widths[1:-1]},
            "task": {"name": "classification"},
            "optimizer": {"name": "adam", "learning_rate": 1e-3},
            "stop": {"last_step": 1},
            "numerics": {"threads": 1},
        }
        made = build.assemble(model.parse_config(yaml.Document(document)), comm=comm)
    ranks.broadcast_state(made)
    trainer = Trainer(made.task, made.training, made.state, stop=[])
    for _ in range(WARM):
        trainer.step()
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - began)
    found = {"step": statistics.median(seconds), "bytes": made.state.params.n_bytes}
    if comm.size > 1:
        found |= exchanges(comm, made.state.params, options.shards)
    if comm.rank == 0:
        print(json.dumps(found), flush=True)
    else:
        comm.receive_order()  # END
    comms.finalize(0, failed=False)


def exchanges(comm: Any, layout: Any, shards: int) -> dict[str, float]:
    tree, mine = comm.tree_sum(layout, shards), len(comm.mine(shards))
    whole = layout.like().flat
    times: dict[str, list[float]] = {"exchange": [], "allreduce": []}

    def exchange() -> None:
        assert tree.total().first_non_finite() is None
        with layout.partition.synchronized_update():
            pass

    def allreduce() -> None:
        comm._comm.Allreduce(comm._mpi.IN_PLACE, whole)

    def timed(name: str, job: Callable[[], None]) -> None:
        comm._comm.Barrier()
        began = time.perf_counter()
        job()
        comm._comm.Barrier()
        times[name].append(time.perf_counter() - began)

    for _ in range(EXCHANGES):
        for _ in range(mine):
            tree.leaf()
            tree.add()
        timed("exchange", exchange)
        timed("allreduce", allreduce)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def job(ranks: int, options: argparse.Namespace) -> dict[str, float]:
    """Run one job of so many ranks; return what its first rank printed."""
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        sys.exit("mpiexec is not there: pip install '.[mpi]'")
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    launch = [mpiexec, "-n", str(ranks)] if ranks > 1 else []
    numbers = [
        "--size",
        options.size,
        "--shards",
        str(options.shards),
        "--steps",
        str(options.steps),
    ]
    command = [
        *launch,
        sys.executable,
        __file__,
        "--rank",
        *numbers,
        *(["--messages"] if options.messages else []),
    ]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--size", default="784-1024-1024-10@256")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--messages", action="store_true", help="no memory in common, as between hosts"
    )
    options = parser.parse_args()
    if options.rank:
        return rank(options)
    rounds = [{n: job(n, options) for n in (1, *options.ranks)} for _ in range(options.rounds)]
    print(f"1 rank: {spread([1e3 * found[1]['step'] for found in rounds])} ms a step")
    for n in options.ranks:
        steps = [1e3 * found[n]["step"] for found in rounds]
        faster = [found[1]["step"] / found[n]["step"] for found in rounds]
        times = {
            name: [1e3 * found[n][name] for found in rounds] for name in ("exchange", "allreduce")
        }
        ratio = [mine / theirs for mine, theirs in zip(*times.values(), strict=True)]
        print(f"{n} ranks: {spread(steps)} ms a step, {spread(faster)} times as fast")
        print(f"  exchange of {rounds[0][n]['bytes'] / 1e6:.1f} MB: {spread(times['exchange'])} ms; Allreduce "
              f"{spread(times['allreduce'])} ms; ratio {spread(ratio)}")  # fmt: skip
    return None


if __name__ == "__main__":
    main()
