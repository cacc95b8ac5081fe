"""The ranks of a test's job: many trainings or sums in one job, because a start takes seconds.

    mpiexec -n 2 python -m tests.support.rank_work trainings WORK.json          # or: sums WORK.json

WORK.json is a list. `how` of an item tells how ranks share memory: "shared", as if on several "hosts", without "room"
for shared memory, with room for "some" of it (the state), or with some that the last rank has "not seen". A training
has `path`, `config` (None: resume), `stop` (a step to be stopped at, or None) and `slow` (seconds that it waits before
it writes a checkpoint). A sum has `elements`, `parts` and `dtype`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stepctl.checkpoint import codec
from stepctl.distributed import shared_memory
from stepctl.distributed.comm import Comm, Order, communicator, finalize
from stepctl.distributed.mpi import MPIComm
from stepctl.optimizers.base import global_norm
from stepctl.state.arena import UNDIVIDED, Arena, same_bits
from stepctl.state.tree_sum import TreeSum

CREATED = shared_memory._create_file
MAPPED = shared_memory._map_file


def at_most(count: int) -> Any:
    """Return a replacement of `_create_file` that fails after some calls."""
    made = itertools.count()
    return lambda n_bytes: CREATED(n_bytes) if next(made) < count else None


def map_nothing(identity: object, n_bytes: int) -> Any:
    """Replace `_map_file` where a rank does not see the shared file."""


def main() -> None:
    kind, path = sys.argv[1:]
    comm = communicator()
    for item in json.loads(Path(path).read_text()):
        if isinstance(comm, MPIComm):
            comm._one_host = item["how"] != "hosts"
        most = {"room": 0, "some": 1}.get(item["how"], 1000)
        shared_memory._create_file = at_most(most)
        unseen = item["how"] == "not seen" and comm.rank == comm.size - 1
        shared_memory._map_file = map_nothing if unseen else MAPPED
        {"trainings": training, "sums": check_sum}[kind](comm, item)


def training(comm: Comm, item: dict[str, Any]) -> None:
    from stepctl.config import yaml
    from stepctl.config.model import parse_config
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.at_step import ResumeOptions
    from stepctl.runs.open import create_run, resume_run
    from stepctl.stopping.rules import StopAtStep
    from stepctl.training import ranks

    if isinstance(comm, MPIComm) and comm.rank:
        ranks.follow_rank_zero(comm)
        return
    directory = RunDirectory(item["path"])
    if item["config"] is None:
        opened = resume_run(directory, ResumeOptions(), comm=comm)
    else:
        opened = create_run(parse_config(yaml.Document(item["config"])), directory, comm=comm)
    with opened as segment, slow_writing(item["slow"]):
        segment.train(stop=[] if item["stop"] is None else [StopAtStep(item["stop"])])
    in_common = any(arena.partition is not UNDIVIDED for arena in segment.state.arenas.values())
    assert in_common == (
        comm.size > 1 and item["how"] in ("shared", "some") and segment.assembly.task.sliced
    ), item
    comm.send_order(Order.END)


@contextlib.contextmanager
def slow_writing(seconds: float) -> Iterator[None]:
    """Let each checkpoint be made so much later than it is asked for."""
    encode = codec.encode

    def slowly(*arguments: Any, **more: Any) -> Any:
        time.sleep(seconds)
        return encode(*arguments, **more)

    codec.encode = slowly
    try:
        yield
    finally:
        codec.encode = encode


def check_sum(comm: Comm, item: dict[str, Any]) -> None:
    """Raise AssertionError in any rank whose sum has other bits than that of one process; print its kind.

    Three times, with a sum between them that is given up; the last time it is not finite.
    """
    parts = item["parts"]
    layout = Arena({"a": (item["elements"],), "b": (item["elements"] // 2 + 1,)}, item["dtype"])
    comm.share_arenas([layout])
    alone = TreeSum(layout)
    together = comm.tree_sum(layout, parts)
    for number in range(4):
        for part in range(parts):
            fill(alone.leaf(), number, part)
            alone.add()
        mine = comm.mine(parts)
        for part in mine:
            fill(together.leaf(), number, part)
            if number == 1 and part == mine[:2][-1]:  # begun, and not added
                together.reset()
                break
            together.add()
        comm.all_gather(None)
        expected = alone.total()
        owned = layout.owned_slice
        if number != 1:
            found = together.total()
            assert same_bits(found.flat[owned], expected.flat[owned]), f"rank {comm.rank}: {item}"
            assert same_bits(np.array(global_norm(found)), np.array(global_norm(expected))), item
            assert (
                found.first_non_finite() == expected.first_non_finite() == (None, "a")[number == 3]
            ), item
            with layout.partition.synchronized_update():
                layout.flat[owned] = found.flat[owned]
            assert same_bits(layout.flat, expected.flat), (
                f"rank {comm.rank} sees another state: {item}"
            )
    if comm.rank == 0:
        print(type(together).__name__)


def fill(leaf: Arena, number: int, part: int) -> None:
    """Values whose sum depends on the order in which they are added."""
    generator = np.random.default_rng((number, part))
    for array in leaf.values():
        array[:] = generator.normal(size=array.shape) * 10.0 ** generator.integers(
            -4, 5, array.shape
        )
    if number == 2:
        leaf["b"][-1] = np.finfo(leaf.dtype).max / 1e3  # the square of which is infinite
    if (number, part) == (3, 0):
        for array in leaf.values():
            array[-1] = np.nan


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        finalize(1, failed=True)
