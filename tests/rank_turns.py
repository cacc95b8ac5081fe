"""Ranks that count in a window, in two halves that another rank could come between: `rank_turns.py N`."""

import sys

from stepctl import comm
from stepctl.comm import World
from stepctl.window import Cell

world = comm.world()
assert isinstance(world, World)
window = world.window(0)
if world.rank == 0:
    window.clear()
world.collect(None)
for _ in range(int(sys.argv[1])):
    with window.exclusive():
        window.set(Cell.DONE, window.add(Cell.DONE) + 1)
world.collect(None)
if world.rank == 0:
    print(window.add(Cell.DONE))
else:
    world.follow()  # rank 0's word that it is over
comm.end(0, failed=False)
