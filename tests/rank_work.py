"""What each rank of a test's job does: many trainings, or many sums, in one job, as a start takes seconds.

    mpiexec -n 2 python rank_work.py trainings WORK.json          # or: sums WORK.json

WORK.json is a list. A training is a dict of `path`, `config` (None: resume), `stop` (a step to be stopped at, or None)
and `messages` (whether sums go by messages on one host too); a sum has `elements`, `parts`, `dtype` and `messages`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from stepctl import comm
from stepctl.arena import Arena, TreeSum
from stepctl.comm import Comm, Order, World


def main() -> None:
    kind, path = sys.argv[1:]
    world = comm.world()
    for item in json.loads(Path(path).read_text()):
        if isinstance(world, World):
            world._one_host = not item["messages"]
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
    with opened as segment:
        segment.train(stop=[] if item["stop"] is None else [StopAtStep(item["stop"])])
    world.lead(Order.END)


def check_sum(world: Comm, item: dict[str, Any]) -> None:
    """Raise AssertionError, in any rank, if it has other bits than the sum by one process alone; print the sum's kind.

    Twice, with a sum between them that is given up.
    """
    parts, layout = item["parts"], Arena({"a": (item["elements"],)}, item["dtype"])
    alone, together = TreeSum(layout), world.tree_sum(layout, parts)
    for number in range(3):
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
        expected = alone.total()
        assert number == 1 or together.total().same_bits(expected), f"rank {world.rank}: {item}"
    if world.rank == 0:
        print(type(together).__name__)


def fill(leaf: Arena, number: int, part: int) -> None:
    """Values whose sum depends on the order in which they are added."""
    generator = np.random.default_rng((number, part))
    leaf["a"][:] = generator.normal(size=leaf["a"].shape) * 10.0 ** generator.integers(-4, 5, leaf["a"].shape)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        comm.end(1, failed=True)
