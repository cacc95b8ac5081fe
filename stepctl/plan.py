"""What people want to know about a run before it starts, or goes on; nothing here lists all steps of a far target."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from stepctl import config as configs
from stepctl import registry, rundir, yamlio
from stepctl.assembly import Assembly, assemble
from stepctl.checkpoint import codec, userblock
from stepctl.checkpoint.store import Store
from stepctl.config import Checkpoint, Config
from stepctl.errors import ConfigError
from stepctl.problems import in_one_line, reason
from stepctl.run import ResumeOptions, changed_config, check_same_run, excused_keys, horizon_notes, target_of
from stepctl.rundir import RunDirectory
from stepctl.schedules import Schedule

_SHOWN = 8  # steps listed of an event before the rest is left out
_BETWEEN = 5  # steps between the first and the last whose learning rate is shown


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
    notes = horizon_notes(config, span.last, locked=False)
    return _plan(assembly, directory, span) | {"notes": notes + _notes(config)}


def plan_resume(
    directory: RunDirectory, options: ResumeOptions, say: Callable[[str], None]
) -> tuple[dict[str, Any], Config]:
    """Return what a resume of a run would do: as `plan`, with "from" (a file) and "plain_target" (a step); its config.

    A locked key may be among what the options change: a note says what the resume needs then. Errors as in a resume.
    """
    base, ledger = configs.parse(directory.newest_config()), directory.read_ledger()
    config = changed_config(base, options, directory)
    changed = configs.changes(base, config)
    assembly = assemble(config)
    store = Store(directory.checkpoints, directory.acknowledged())

    def accept(reader: codec.Reader) -> None:
        check_same_run(reader, base, excused_keys(ledger, changed))
        codec.restore(reader, assembly.state)
        assembly.task.check_counters(assembly.state.counters, config.initial_step)

    with store.newest(say, accept) as reader:
        start, name = reader.header.global_step, reader.name
    stop_changed = any(change["key"].startswith("stop.") for change in changed)
    target = target_of(config, options, ledger, start, stop_changed)
    saved = [step for step in store.steps() if step <= start]
    found = _plan(assembly, directory, Span(start, target, saved, rundir.forks(ledger)))
    notes = horizon_notes(config, target, locked=True) + _notes(config) + _unlocking(changed, options.assignments)
    plain = target_of(base, ResumeOptions(), ledger, start, False)
    return found | {"from": name, "plain_target": plain, "notes": notes}, config


def _unlocking(changed: list[dict[str, Any]], assignments: Iterable[str]) -> list[str]:
    locked = [change["key"] for change in changed if configs.policy(change["key"]) == "locked"]
    asked = dict.fromkeys(assignment.partition("=")[0] for assignment in assignments)
    keys = [key for key in asked if any(f"{name}.".startswith(f"{key}.") for name in locked)]
    options = " ".join(f"--allow-change {key}" for key in keys)
    return [f"a resume makes these changes with {options}"] if keys else []


def _notes(config: Config) -> list[str]:
    seconds = config.checkpoint.every_seconds
    return [] if seconds is None else [f"a checkpoint is also saved when {seconds:g} s have passed since the last"]


def _plan(assembly: Assembly, directory: RunDirectory, span: Span) -> dict[str, Any]:
    config, state = assembly.config, assembly.state
    image = codec.encode(
        state, run=directory.name, config=yamlio.dumps(config.plain()), numerics=json.dumps(assembly.numerics)
    )
    size, n_sums = userblock.SIZE + image.n_bytes, config.data.shards.bit_length()
    return {
        "run_dir": str(directory.path),
        "samples": {
            "training": assembly.training.part.n,
            "validation": assembly.validation.part.n if assembly.validation else 0,
            "shape": list(assembly.sources[0].sample_shape),
        },
        "parameters": {name: list(shape) for name, shape in state.params.shapes.items()},
        "n_parameters": state.params.n_elements,
        "bytes": {"state": state.n_bytes, "gradients": state.params.n_bytes * n_sums, "checkpoint": size},
        "steps": [span.start, span.last],
        **_events(config, span, validated=assembly.validation is not None),
        "checkpoints": _checkpoints(config, span, size),
        "learning_rate": learning_rates(config, span.start, span.last),
    }


# --- the steps of each event


def firing(every: int | None, offset: int, start: int, last: int) -> range:
    """Return the steps after `start`, up to `last`, where step % every == offset."""
    if every is None:
        return range(0)
    return range(start + 1 + (offset - start - 1) % every, last + 1, every)


def _events(config: Config, span: Span, *, validated: bool) -> dict[str, dict[str, Any]]:
    log, evaluate = config.log, config.evaluate
    end = [span.last] if span.last > span.start else []
    first = [config.initial_step + 1] if span.start == config.initial_step else []
    saves, before = _saves(config.checkpoint, span), [] if span.saved else [span.start]
    evaluations = firing(evaluate.every, evaluate.offset, span.start, span.last) if validated else range(0)
    return {
        "log": _event(firing(log.every, log.offset, span.start, span.last), [*first, *end] if end else []),
        "evaluate": _event(evaluations, end if validated else []),
        "save": _event(saves, [*before, *end]),
    }


def _saves(keep: Checkpoint, span: Span) -> range:
    return firing(keep.every, 0, span.start, span.last)


def _event(grid: range, others: Iterable[int]) -> dict[str, Any]:
    """Return the "first", "every", "count" and "last" of the steps on the grid; "also" are the others."""
    first, every, last = (grid[0], grid.step, grid[-1]) if grid else (None, None, None)
    also = sorted({step for step in others if step not in grid})
    return {"first": first, "every": every, "count": len(grid), "last": last, "also": also}


def steps_of(event: dict[str, Any]) -> range:
    """Return the steps of an event that are on its grid."""
    return range(event["first"], event["last"] + 1, event["every"]) if event["count"] else range(0)


def abbreviate(event: dict[str, Any]) -> str:
    """Return the steps of an event in few words: "1, 10, 20, ..., 100 (12 times)"."""
    grid, also = steps_of(event), event["also"]
    count, steps = len(grid) + len(also), sorted([*grid[:_SHOWN], *also])
    if count <= _SHOWN:
        return ", ".join(map(str, steps)) or "never"
    return f"{', '.join(map(str, steps[: _SHOWN - 2]))}, ..., {max(grid[-1], *also, 0)} ({count:,} times)"


# --- the checkpoints that are kept


def _checkpoints(config: Config, span: Span, size: int) -> dict[str, Any]:
    keep = config.checkpoint
    at_end, at_most = kept(span, keep)
    return {
        "at_end": at_end,
        "at_most": at_most,
        "bytes_at_end": at_end * size,
        "bytes_at_most": at_most * size,
        "keep_last": keep.keep_last,
        "keep_every": keep.keep_every,
        "keep_best": keep.keep_best.model_dump() if keep.keep_best else None,
    }


def kept(span: Span, keep: Checkpoint) -> tuple[int, int]:
    """Return how many checkpoints are kept at the end, and how many are there at a time at most.

    One goes only once the next is there. With `keep_best`, whose steps nobody knows yet, the first is an upper bound.
    """
    before, grid = span.saved or [span.start], _saves(keep, span)
    after = [span.last] if span.last > span.start and span.last not in grid else []
    total = len(before) + len(grid) + len(after)
    if keep.keep_last is None or not (grid or after):
        return total, total
    newest = min(keep.keep_last, total)
    edge = _element(total - newest, before, grid, after)  # the oldest of the newest
    older = {step for step in [*before, *after] if step < edge}
    stay = older & set(span.forked)
    if keep.keep_every is not None:
        stay |= {step for step in older if step % keep.keep_every == 0}
        on_grid = multiples(range(grid.start, min(grid.stop, edge), grid.step), keep.keep_every)
        newest += len(on_grid)
    best = keep.keep_best.n if keep.keep_best else 0
    at_end = min(total, newest + len(stay) + best)
    return at_end, min(total, max(at_end, len(before)) + 1)


def _element(index: int, before: list[int], grid: range, after: list[int]) -> int:
    if index < len(before):
        return before[index]
    index -= len(before)
    return grid[index] if index < len(grid) else after[index - len(grid)]


def multiples(grid: range, n: int) -> range:
    """Return those numbers of a rising range that n divides."""
    common = math.gcd(grid.step, n)
    if grid.start % common:
        return range(0)
    period = n // common  # every so many of the grid's numbers is one, the first after `ahead` of them
    ahead = -(grid.start // common) * pow(grid.step // common, -1, period) % period
    return range(grid.start + ahead * grid.step, grid.stop, grid.step * period)


# --- the learning rate


def schedules(config: Config) -> dict[str, Schedule]:
    """Return the schedule of each learning rate in the config by its key; an optimizer of one's own may have none."""
    spec = config.optimizer.spec()
    _, hint = registry.parameters(registry.resolve("optimizers", spec["name"])).get("learning_rate", (None, None))
    mark = registry.nested(hint)
    return {"optimizer.learning_rate": registry.build(mark.family, spec["learning_rate"])} if mark else {}


def learning_rates(config: Config, start: int, last: int) -> dict[str, dict[str, Any]]:
    """Return for each key "landmarks" (steps where the schedule turns) and "rates": some steps N, and the rate at N.

    The rate at N is that of the update N -> N + 1, so the last one is at last - 1.
    """
    return {
        key: {
            "landmarks": schedule.landmarks(),
            "rates": [{"step": step, "value": rate_at(key, schedule, step)} for step in _shown(schedule, start, last)],
        }
        for key, schedule in schedules(config).items()
    }


def _shown(schedule: Schedule, start: int, last: int) -> list[int]:
    return sorted({*spread(start, last, _BETWEEN + 2), *inside(schedule.landmarks(), start, last)})


def inside(steps: Iterable[int], start: int, last: int) -> list[int]:
    """Return those steps that an update between `start` and `last` begins at."""
    return [step for step in steps if start <= step < last]


def spread(start: int, last: int, n: int) -> list[int]:
    """Return up to n evenly spaced steps from `start` to last - 1; none if no update lies between."""
    width = last - 1 - start
    return sorted({start + width * i // (n - 1) for i in range(n)}) if width >= 0 else []


def rate_at(key: str, schedule: Schedule, step: int) -> float:
    """Return the learning rate of the update step -> step + 1; ConfigError if a schedule of one's own fails there."""
    try:
        return float(schedule(step))
    except registry.FOREIGN as error:
        raise ConfigError(in_one_line(f"{key}: fails at step {step}: {reason(error)}")) from error
