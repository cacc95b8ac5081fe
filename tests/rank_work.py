"""What each rank of a test's job does: many trainings, or many sums, in one job, as a start takes seconds.

    mpiexec -n 2 python rank_work.py trainings WORK.json          # or: sums WORK.json

WORK.json is a list. Each item says `how` the ranks are joined: "shared" (memory), or on one host too as if there were
several "hosts", no "room" for shared memory, room for "some" of it (the state), or some that the last rank has "not
seen". A training has `path`, `config` (None: resume), `stop` (a step to be stopped at, or None) and `slow` (seconds
that it takes to begin to write a checkpoint); a sum has `elements`, `parts` and `dtype`.
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

from stepctl import comm, shared
from stepctl.arena import SOLE, Arena, TreeSum, same_bits
from stepctl.checkpoint import codec
from stepctl.comm import Comm, Order, World
from stepctl.optimizers.base import global_norm

CREATED, MAPPED = shared._created, shared._mapped


def main() -> None:
    kind, path = sys.argv[1:]
    world = comm.world()
    for item in json.loads(Path(path).read_text()):
        if isinstance(world, World):
            world._one_host = item["how"] != "hosts"
        made = itertools.count()
        most = {"room": 0, "some": 1}.get(item["how"], 1000)
        shared._created = lambda n_bytes, made=made, most=most: CREATED(n_bytes) if next(made) < most else None
        unseen = item["how"] == "not seen" and world.rank == world.size - 1
        shared._mapped = (lambda place, n_bytes: None) if unseen else MAPPED
        {"trainings": training, "sums": check_sum}[kind](world, item)


def training(world: Comm, item: dict[str, Any]) -> None:
    from stepctl import config as configs
    from stepctl import ranks, run, yamlio
    from stepctl.hooks.stop import StopAtStep
    from stepctl.rundir import RunDirectory

    if isinstance(world, World) and world.rank:
        ranks.follow(world)
        return
    directory = RunDirectory(item["path"])
    if item["config"] is None:
        opened = run.resume(directory, run.ResumeOptions(), comm=world)
    else:
        opened = run.create(configs.parse(yamlio.Document(item["config"])), directory, comm=world)
    with opened as segment, slow_writing(item["slow"]):
        segment.train(stop=[] if item["stop"] is None else [StopAtStep(item["stop"])])
    in_common = any(arena.owners is not SOLE for arena in segment.state.arenas.values())
    assert in_common == (world.size > 1 and item["how"] in ("shared", "some") and segment.assembly.task.sliced), item
    world.lead(Order.END)


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


def check_sum(world: Comm, item: dict[str, Any]) -> None:
    """Raise AssertionError, in any rank, if it has other bits than the sum by one process alone; print the sum's kind.

    Three times, with a sum between them that is given up; the last time it is not finite.
    """
    parts, layout = item["parts"], Arena({"a": (item["elements"],), "b": (item["elements"] // 2 + 1,)}, item["dtype"])
    world.in_common([layout])
    alone, together = TreeSum(layout), world.tree_sum(layout, parts)
    for number in range(4):
        for part in range(parts):
            fill(alone.leaf(), number, part)
            alone.add()
        mine = world.mine(parts)
        for part in mine:
            fill(together.leaf(), number, part)
            if number == 1 and part == mine[:2][-1]:  # begun, and not added
                together.drop()
                break
            together.add()
        world.collect(None)
        expected, mine = alone.total(), layout.part
        if number != 1:
            found = together.total()
            assert same_bits(found.flat[mine], expected.flat[mine]), f"rank {world.rank}: {item}"
            assert same_bits(np.float64(global_norm(found)), np.float64(global_norm(expected))), item
            assert found.first_non_finite() == expected.first_non_finite() == (None, "a")[number == 3], item
            with layout.owners.updating():
                layout.flat[mine] = found.flat[mine]
            assert same_bits(layout.flat, expected.flat), f"rank {world.rank} sees another state: {item}"
    if world.rank == 0:
        print(type(together).__name__)


def fill(leaf: Arena, number: int, part: int) -> None:
    """Values whose sum depends on the order in which they are added."""
    generator = np.random.default_rng((number, part))
    for array in leaf.values():
        array[:] = generator.normal(size=array.shape) * 10.0 ** generator.integers(-4, 5, array.shape)
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
        comm.end(1, failed=True)
