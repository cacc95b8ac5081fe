"""What people want to know about a run before it starts, or goes on; nothing here lists all steps of a far target."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from stepctl import config as configs
from stepctl import rates, rundir, shell
from stepctl.assembly import Assembly, assemble
from stepctl.checkpoint import codec, userblock
from stepctl.checkpoint.store import Store
from stepctl.config import Cadence, Checkpoint, Config
from stepctl.run import (
    ResumeOptions,
    changed_config,
    check_counters,
    check_same_run,
    excused_keys,
    horizon_notes,
    moved_files,
    report_missing,
    target_of,
)
from stepctl.rundir import RunDirectory
from stepctl.state import GLOBAL_STEP

_LOOKED_AT = 10_000  # steps of an event
_SHOWN = 8  # steps listed of an event before the rest is left out


class Span(NamedTuple):
    """Training from global step `start` to `last`; `saved` are the steps that have a checkpoint already."""

    start: int
    last: int
    saved: list[int]
    forked: Collection[int] = ()  # those among them that stay for a fork


def plan(assembly: Assembly, directory: RunDirectory) -> dict[str, Any]:
    """Return what a fresh run would do, without doing it: shapes, sizes in bytes, events, checkpoints, rates."""
    config = assembly.config
    span = Span(config.initial_step, config.target(config.initial_step), [])
    notes = horizon_notes(assembly, span.last, locked=False)
    return _plan(assembly, directory, span) | {"notes": [*notes, *best_notes(assembly, span), *_notes(config)]}


def plan_resume(
    directory: RunDirectory, options: ResumeOptions, say: Callable[[str], None]
) -> tuple[dict[str, Any], Assembly]:
    """Return what a resume of a run would do, and the assembly, restored.

    As `plan`, with "from" (a file) and "plain_target" (a step). A locked key may be among what the options change: a
    note says what the resume needs then. Otherwise errors as in a resume.
    """
    base, ledger = configs.parse(directory.newest_config()), directory.read_ledger()
    config = changed_config(base, options, directory)
    changed = configs.changes(base, config)
    assembly = assemble(config)
    store = Store(directory.checkpoint_folder, directory.records)

    def accept(reader: codec.Reader) -> None:
        excused = excused_keys(ledger, changed) | base.data_files()
        check_same_run(reader.name, reader.header.config, base.plain(), excused)
        codec.restore(reader, assembly.state)
        check_counters(assembly, excused)

    with store.newest(say, accept) as reader:
        start, name = reader.header.global_step, reader.name
    report_missing(directory, store, start, say)
    target = target_of(config, options, ledger, start, changed)
    saved = [step for step in store.steps() if step <= start]
    span = Span(start, target, saved, rundir.forks(ledger))
    found = _plan(assembly, directory, span)
    notes = [*horizon_notes(assembly, target, locked=True), *best_notes(assembly, span), *_notes(config)]
    recorded = rundir.newest_data(ledger)
    moved = moved_files(changed, config, ledger) if recorded is not None and assembly.has_data(recorded) else []
    notes += _unlocking([change for change in changed if change not in moved], options.assignments)
    plain = target_of(base, ResumeOptions(), ledger, start, [])
    return found | {"from": name, "plain_target": plain, "notes": notes}, assembly


def _unlocking(changed: list[dict[str, Any]], assignments: Iterable[str]) -> list[str]:
    locked = [change["key"] for change in changed if configs.policy(change["key"]) == "locked"]
    asked = dict.fromkeys(assignment.partition("=")[0] for assignment in assignments)
    keys = [key for key in asked if any(f"{name}.".startswith(f"{key}.") for name in locked)]
    options = " ".join(shell.options("--allow-change", key) for key in keys)
    return [f"a resume makes these changes with {options}"] if keys else []


def _notes(config: Config) -> list[str]:
    seconds = config.checkpoint.every_seconds
    saves = [] if seconds is None else [f"a checkpoint is also saved when {seconds:g} s have passed since the last"]
    watched = [key for key in ("early_stopping", "target_metric") if getattr(config.stop, key) is not None]
    return saves + [f"the run may end before its target, by stop.{key}" for key in watched]


def _plan(assembly: Assembly, directory: RunDirectory, span: Span) -> dict[str, Any]:
    config, state = assembly.config, assembly.state
    texts = {"run": directory.name, "config": config.text, "numerics": json.dumps(assembly.numerics)}
    image = codec.encode(state, run_id="0" * 32, **texts)  # for its size
    params = {folder: arena for folder, arena in state.arenas.items() if folder.partition("/")[0] == "params"}
    shapes = {f"{folder}/{name}": shape for folder, arena in params.items() for name, shape in arena.shapes.items()}
    n_bytes, n_sums = sum(arena.n_bytes for arena in params.values()), config.data.shards.bit_length()
    size = userblock.SIZE + image.n_bytes
    events = _events(assembly, span)
    return {
        "run_dir": str(directory.path),
        "samples": {
            "training": assembly.training.part.n,
            "validation": assembly.validation.part.n if assembly.validation else 0,
            "shape": list(assembly.sources[0].sample_shape),
        },
        "parameters": {name.removeprefix("params/"): list(shape) for name, shape in shapes.items()},
        "buffers": {name: list(shape) for name, shape in state.buffers.shapes.items()},
        "n_parameters": sum(arena.n_elements for arena in params.values()),
        "bytes": {"state": state.n_bytes, "gradients": n_bytes * n_sums, "checkpoint": size},
        "steps": [span.start, span.last],
        "events": {name: event.facts() for name, event in events.items()},
        "checkpoints": _checkpoints(_effective(assembly, span), span, events["save"].grid, size),
        "learning_rate": rates.table(assembly, span.start, span.last),
    }


# --- the steps of each event


class Crossings:
    """The steps after `start`, up to `last`, at which a count comes to value % every == offset, or past such a value.

    The count rises with the step, by less than `every` at each. Found by bisection: nothing is listed.
    """

    def __init__(self, count: Callable[[int], int], every: int, offset: int, start: int, last: int) -> None:
        self._count, self._every, self._offset = count, every, offset
        self._steps = range(start + 1, max(start, last) + 1)
        self._passed = self._number(start)

    def _number(self, step: int) -> int:
        return (self._count(step) - self._offset) // self._every

    def __len__(self) -> int:
        return self._number(self._steps[-1]) - self._passed if self._steps else 0

    def __getitem__(self, index: int) -> int:
        number = self._passed + 1 + (index if index >= 0 else len(self) + index)
        value = self._offset + self._every * number
        return self._steps[bisect.bisect_left(self._steps, value, key=self._count)]

    def __contains__(self, step: int) -> bool:
        return step in self._steps and self._number(step) > self._number(step - 1)


Grid = range | Crossings


def firing(cadence: Cadence, count: Callable[[int], int], start: int, last: int) -> Grid:
    """Return the steps after `start`, up to `last`, at which a cadence fires; `count` is its counter's at a step."""
    if cadence.every is None or last <= start:
        return range(0)
    if cadence.counter == GLOBAL_STEP:
        return range(start + 1 + (cadence.offset - start - 1) % cadence.every, last + 1, cadence.every)
    if count(last) - count(start) >= cadence.every * (last - start):
        return range(start + 1, last + 1)  # it rises by `every` or more at each step
    return Crossings(count, cadence.every, cadence.offset, start, last)


class Event(NamedTuple):
    """Something that is done on a grid, and on the steps of `also`, which are off it."""

    cadence: Cadence
    grid: Grid
    also: list[int]

    def facts(self) -> dict[str, Any]:
        """Return "first", "count" and "last" on the grid, "every" (of its "counter"), "also", and all in "words"."""
        there = bool(len(self.grid))
        return {
            "first": self.grid[0] if there else None,
            "every": self.cadence.every if there else None,
            "count": len(self.grid),
            "last": self.grid[-1] if there else None,
            "counter": self.cadence.counter,
            "also": self.also,
            "words": in_words(self.grid, self.also),
        }


def _events(assembly: Assembly, span: Span) -> dict[str, Event]:
    config = assembly.config
    end = [span.last] if span.last > span.start else []
    first = [config.initial_step + 1] if span.start == config.initial_step and end else []
    asked = {
        "log": (config.log, [*first, *end]),
        "evaluate": (
            config.evaluate if assembly.validation else Cadence(every=None),
            end if assembly.validation else [],
        ),
        "save": (config.checkpoint, [*([] if span.saved else [span.start]), *end]),
    }
    if config.samples is not None:
        asked["samples"] = (config.samples, [])
    events = {}
    for name, (cadence, others) in asked.items():
        grid = firing(cadence, rates.counting(assembly, cadence.counter), span.start, span.last)
        events[name] = Event(cadence, grid, sorted({step for step in others if step not in grid}))
    return events


def in_words(grid: Grid, also: list[int]) -> str:
    """Return steps in few words: "1, 10, 20, ..., 100 (12 times)"."""
    count = len(grid) + len(also)
    steps = sorted([*(grid[index] for index in range(min(len(grid), _SHOWN))), *also])
    if count <= _SHOWN:
        return ", ".join(map(str, steps)) or "never"
    return f"{', '.join(map(str, steps[: _SHOWN - 2]))}, ..., {max(grid[-1], *also, 0)} ({count:,} times)"


# --- the checkpoints that are kept


def _checkpoints(keep: Checkpoint, span: Span, grid: Grid, size: int) -> dict[str, Any]:
    at_end, at_most = kept(span, keep, grid)
    return {
        "at_end": at_end,
        "at_most": at_most,
        "bytes_at_end": at_end * size,
        "bytes_at_most": at_most * size,
        "keep_last": keep.keep_last,
        "keep_every": keep.keep_every,
        "keep_best": keep.keep_best.model_dump() if keep.keep_best else None,
    }


def best_notes(assembly: Assembly, span: Span) -> list[str]:
    """Return what to say if `keep_best` keeps nothing: no step of the run has both an evaluation and a save."""
    config = assembly.config
    if config.checkpoint.keep_best is None or config.checkpoint.every_seconds is not None or span.last <= span.start:
        return []
    # of the whole run: what was saved before may be the best
    evaluated = firing(config.evaluate, _counting(assembly, config.evaluate), config.initial_step, span.last)
    saved = firing(config.checkpoint, _counting(assembly, config.checkpoint), span.start, span.last)
    if any(step in evaluated for step in (*span.saved, span.last)) or _meet(evaluated, saved):
        return []
    cadences = {"evaluate": config.evaluate, "checkpoint": config.checkpoint}
    grids = [f"{key}.every {each.every}, offset {each.offset}" for key, each in cadences.items()]
    return [f"checkpoint.keep_best keeps nothing: no evaluation falls on a save up to step {span.last} "
            f"({'; '.join(grids)}); let one fall on the other's steps"]  # fmt: skip


def _counting(assembly: Assembly, cadence: Cadence) -> Callable[[int], int]:
    return rates.counting(assembly, cadence.counter)


def _meet(a: Grid, b: Grid) -> bool:
    """Tell whether two grids have a step in common; what would take too long to tell is taken for a yes."""
    few, many = sorted((a, b), key=len)
    # of two ranges all that can happen happens within so many
    n = min(len(few), many.step) if isinstance(few, range) and isinstance(many, range) else len(few)
    return n > _LOOKED_AT or any(few[index] in many for index in range(n))


def _effective(assembly: Assembly, span: Span) -> Checkpoint:
    keep = assembly.config.checkpoint
    return keep.model_copy(update={"keep_best": None}) if best_notes(assembly, span) else keep


def kept(span: Span, keep: Checkpoint, grid: Grid) -> tuple[int, int]:
    """Return how many checkpoints are kept at the end, and how many are there at a time at most; `grid`: of the saves.

    One goes only once the next is there. The first is an upper bound with `keep_best`, whose steps nobody knows yet,
    and with `keep_every` where the saves follow another counter.
    """
    before = span.saved or [span.start]
    after = [span.last] if span.last > span.start and span.last not in grid else []
    total = len(before) + len(grid) + len(after)
    if keep.keep_last is None or not (len(grid) or after):
        return total, total
    newest = min(keep.keep_last, total)
    edge = _element(total - newest, before, grid, after)  # the oldest of the newest
    older = {step for step in before if step < edge}
    stay, on_grid = older & set(span.forked), 0
    if keep.keep_every is not None:
        stay |= {step for step in older if step % keep.keep_every == 0}
        on_grid = _n_multiples(grid, keep.keep_every, span.start, edge)
    best = keep.keep_best.n if keep.keep_best else 0
    at_end = min(total, newest + on_grid + len(stay) + best)
    return at_end, min(total, max(at_end, len(before)) + 1)


def _element(index: int, before: list[int], grid: Grid, after: list[int]) -> int:
    if index < len(before):
        return before[index]
    index -= len(before)
    return grid[index] if index < len(grid) else after[index - len(grid)]


def _n_multiples(grid: Grid, n: int, start: int, edge: int) -> int:
    if isinstance(grid, range):
        return len(multiples(range(grid.start, min(grid.stop, edge), grid.step), n))
    return min(len(grid), len(multiples(range(start + 1, edge), n)))


def multiples(grid: range, n: int) -> range:
    """Return those numbers of a rising range that n divides."""
    common = math.gcd(grid.step, n)
    if grid.start % common:
        return range(0)
    period = n // common  # every so many of the grid's numbers is one, the first after `ahead` of them
    ahead = -(grid.start // common) * pow(grid.step // common, -1, period) % period
    return range(grid.start + ahead * grid.step, grid.stop, grid.step * period)
