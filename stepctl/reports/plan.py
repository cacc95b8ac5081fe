"""The plan of a run: its sizes, the steps of its events, its checkpoints and learning rates.

Steps are computed, not listed, so that a far target costs nothing.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NotRequired, TypedDict

from stepctl.checkpoint import codec, user_block
from stepctl.config.cadence import Cadence, Steps
from stepctl.config.changes import HOOKS, find_changes, is_locked_change
from stepctl.config.model import MODEL, CheckpointConfig
from stepctl.config.yaml import is_below
from stepctl.reports.columns import described_columns
from stepctl.reports.kept_checkpoints import (
    PlannedSteps,
    count_kept,
    firing_steps,
    keep_best_notes,
)
from stepctl.reports.learning_rates import RateTable, rate_tables
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import (
    ResumeOptions,
    RunFiles,
    changed_config,
    horizon_notes,
    open_at_step,
    read_run,
    target_of,
)
from stepctl.runs.compatibility import Changes, changed_keys, counters_may_differ, moved_files
from stepctl.runs.messages import Say
from stepctl.runs.records import RunRecords
from stepctl.system import shell
from stepctl.system.closing import close_on_error
from stepctl.training.assembly import Assembly, TaskAssembly
from stepctl.training.build import assemble

_SHOWN = 8  # steps of an event that are listed


class PlannedEvent(TypedDict):
    """The steps of one event: a grid, and `also`, the steps off the grid."""

    first: int | None  # None, as `every` and `last`, if the grid has no step
    every: int | None  # of `counter`
    count: int
    last: int | None
    counter: str
    also: list[int]
    words: str


class KeptCheckpoints(TypedDict):
    """The number and size of the checkpoints, and the retention rules."""

    at_end: int
    at_most: int  # at any time
    bytes_at_end: int
    bytes_at_most: int
    keep_last: int | None
    keep_every: int | None
    keep_best: dict[str, Any] | None


class GroupSettings(TypedDict):
    """How an optimizer updates one parameter."""

    weight_decay: float
    learning_rate_multiplier: float
    frozen: bool


# "from" is a keyword in Python
Plan = TypedDict(
    "Plan",
    {
        "run_dir": str,
        # numbers of "training" and "validation" samples, and the "shape" of one; not of a program
        "samples": NotRequired[dict[str, Any]],
        "columns": NotRequired[list[str]],  # of a table with names
        "class_names": NotRequired[list[str]],
        "state": NotRequired[dict[str, list[int]]],  # of a program's run: shapes of its arrays
        "parameters": dict[str, list[int]],  # shapes
        # by parameter, if they differ between the parameters of an optimizer
        "groups": NotRequired[dict[str, GroupSettings]],
        "buffers": dict[str, list[int]],
        "n_parameters": int,
        "bytes": dict[str, int],  # of "state" and "gradients" in memory, and of "checkpoint"
        "steps": list[int],  # the first and the last global step
        "events": dict[str, PlannedEvent],
        "checkpoints": KeptCheckpoints,
        "learning_rate": dict[str, RateTable],
        "from": NotRequired[str],  # of a resume: the checkpoint's file
        "plain_target": NotRequired[int],  # of a resume: the target without options
        "notes": list[str],
    },
)


def plan(assembly: Assembly, directory: RunDirectory) -> Plan:
    """Return the plan of a new run."""
    config = assembly.config
    planned = PlannedSteps(config.initial_step, config.target(config.initial_step))
    notes = [*horizon_notes(assembly, planned.last, locked=False), *_notes(assembly, planned)]
    return _plan(assembly, directory, planned, notes)


def plan_resume(records: RunRecords, options: ResumeOptions, say: Say) -> tuple[Plan, Assembly]:
    """Return the plan of a resume, and the restored assembly.

    Unlike in a resume, the options may change locked keys; a note names the --allow-change options.
    """
    run = read_run(records)
    config = changed_config(run, options)
    changes = find_changes(run.config, config)
    assembly = assemble(config)
    with close_on_error(assembly):
        return _plan_resume(run, options, assembly, changes, say), assembly


def _plan_resume(
    run: RunFiles, options: ResumeOptions, assembly: Assembly, changes: Changes, say: Say
) -> Plan:
    config = assembly.config
    may_differ = changed_keys(run.ledger, changes) | run.config.data_files()
    at = open_at_step(
        run,
        lambda step: assembly,
        step=None,
        say=say,
        may_differ=may_differ,
        counters_may_differ=counters_may_differ(may_differ),
    )
    target = target_of(run, config, options.stop, at.step, changes)
    saved = [step for step in run.store.steps() if step <= at.step]
    planned = PlannedSteps(at.step, target, saved, run.ledger.forks)
    moved = []
    if run.ledger.data is not None and assembly.has_data(run.ledger.data):
        moved = moved_files(changes, config, run.ledger)
    locked = [
        change["key"]
        for change in changes
        if change not in moved and is_locked_change(change["key"], change["old"], change["new"])
    ]
    notes = [
        *horizon_notes(assembly, target, locked=True),
        *_notes(assembly, planned),
        *_unlocking_notes(locked, options.assignments),
    ]
    found = _plan(assembly, run.directory, planned, notes)
    found["from"] = at.file
    found["plain_target"] = target_of(run, run.config, None, at.step, [])
    return found


def _unlocking_notes(locked: Sequence[str], assignments: Iterable[str]) -> list[str]:
    """Return a note on the --allow-change options that a resume needs for its --set options."""
    names = [assignment.partition("=")[0] for assignment in assignments]
    assigned = dict.fromkeys(HOOKS if is_below(name, HOOKS) else name for name in names)
    keys = [key for key in assigned if any(is_below(name, key) for name in locked)]
    if not keys:
        return []
    options = " ".join(shell.options("--allow-change", key) for key in keys)
    return [f"a resume makes these changes with {options}"]


def _notes(assembly: Assembly, planned: PlannedSteps) -> list[str]:
    config = assembly.config
    notes = keep_best_notes(assembly, planned)
    seconds = config.checkpoint.every_seconds
    if seconds is not None:
        notes.append(f"a checkpoint is also saved {seconds:g} s after the last one")
    for key in ("early_stopping", "target_metric"):
        if getattr(config.stop, key) is not None:
            notes.append(f"the run may end before its target, by stop.{key}")
    if config.when is not None:
        notes.append("the run may end before its target, by stop.when")
    return notes


def _plan(
    assembly: Assembly, directory: RunDirectory, planned: PlannedSteps, notes: list[str]
) -> Plan:
    state = assembly.state
    n_parameters = n_bytes = 0
    shapes = {}
    for folder, arena in state.arenas.items():
        first, _, rest = folder.partition("/")
        if first != "params":
            continue
        n_parameters += arena.n_elements
        n_bytes += arena.n_bytes
        for name, shape in arena.shapes.items():
            shapes[f"{rest}/{name}" if rest else name] = list(shape)
    n_sums = 0  # of gradients, in the tree over the shards
    if isinstance(assembly, TaskAssembly):
        n_sums = assembly.config.data.shards.bit_length()
    checkpoint_size = _checkpoint_size(assembly, directory)
    found: Plan = {
        "run_dir": str(directory.path),
        "parameters": shapes,
        "buffers": {name: list(shape) for name, shape in state.buffers.shapes.items()}
        | {
            f"preprocessing/{name}": list(array.shape)
            for name, array in state.preprocessing.items()
        },
        "n_parameters": n_parameters,
        "bytes": {
            "state": state.n_bytes,
            "gradients": n_bytes * n_sums,
            "checkpoint": checkpoint_size,
        },
        "steps": [planned.start, planned.last],
        "events": planned_events(assembly, planned),
        "checkpoints": _kept_checkpoints(assembly, planned, checkpoint_size),
        "learning_rate": rate_tables(assembly, planned.start, planned.last),
        "notes": notes,
    }
    if isinstance(assembly, TaskAssembly):
        validation = assembly.validation
        found["samples"] = {
            "training": assembly.training.subset.n,
            "validation": validation.subset.n if validation else 0,
            "shape": list(assembly.sources[0].sample_shape),
        }
        columns = described_columns(assembly.config.data.spec())
        if columns:
            found["columns"] = columns
        if assembly.config.data.class_names is not None:
            found["class_names"] = assembly.config.data.class_names
        groups = _groups(assembly)
        if groups:
            found["groups"] = groups
    if state.program is not None:
        arrays = state.program.capture().arrays
        found["state"] = {path: list(array.shape) for path, array in arrays.items()}
    return found


def _groups(assembly: TaskAssembly) -> dict[str, GroupSettings]:
    """Return the settings of the parameters of each optimizer that has several groups."""
    found: dict[str, GroupSettings] = {}
    for learner in assembly.task.learners.values():
        settings = learner.optimizer.settings(learner.params(assembly.state))
        if len({*settings.values()}) == 1:
            continue
        prefix = "" if learner.name == MODEL else f"{learner.name}/"
        for path, setting in settings.items():
            found[f"{prefix}{path}"] = {
                "weight_decay": setting.weight_decay,
                "learning_rate_multiplier": setting.learning_rate_multiplier,
                "frozen": setting.frozen,
            }
    return found


def _checkpoint_size(assembly: Assembly, directory: RunDirectory) -> int:
    image = codec.encode(
        assembly.state,
        run=directory.name,
        run_id="0" * 32,
        config=assembly.config.text,
        numerics=json.dumps(assembly.numerics),
    )
    return user_block.SIZE + image.n_bytes


# --- events


def planned_events(assembly: Assembly, planned: PlannedSteps) -> dict[str, PlannedEvent]:
    """Return the steps of each event: "log", "evaluate", "save", and "samples" if there are some."""
    config = assembly.config
    first_row = [config.initial_step + 1] if planned.start == config.initial_step else []
    first_save = [] if planned.saved else [planned.start]
    end = [planned.last]
    if planned.last <= planned.start:
        first_row = []
        end = []

    def steps(cadence: Cadence, also: Sequence[int]) -> PlannedEvent:
        grid = firing_steps(assembly, cadence, planned.start, planned.last)
        off_grid = sorted({step for step in also if step not in grid})
        found: PlannedEvent = {
            "first": None,
            "every": None,
            "count": len(grid),
            "last": None,
            "counter": cadence.counter,
            "also": off_grid,
            "words": describe_steps(grid, off_grid),
        }
        if len(grid):
            found["first"] = grid[0]
            found["every"] = cadence.every
            found["last"] = grid[-1]
        return found

    events = {"log": steps(config.log.cadence(), [*first_row, *end])}
    if assembly.validation is not None:
        events["evaluate"] = steps(config.evaluate.cadence(), end)
    else:
        events["evaluate"] = steps(Cadence(every=None), [])
    events["save"] = steps(config.checkpoint.cadence(), [*first_save, *end])
    samples = config.cadences().get("samples")
    if samples is not None:
        events["samples"] = steps(samples, [])
    return events


def describe_steps(grid: Steps, also: Sequence[int]) -> str:
    """Return a short list of steps: "1, 10, 20, ..., 100 (12 times)"."""
    count = len(grid) + len(also)
    first = [grid[index] for index in range(min(len(grid), _SHOWN))]
    steps = [str(step) for step in sorted([*first, *also])]
    if not steps:
        return "never"
    if count <= _SHOWN:
        return ", ".join(steps)
    last = max(grid[-1], *also, 0)
    return f"{', '.join(steps[: _SHOWN - 2])}, ..., {last} ({count:,} times)"


# --- checkpoints


def _kept_checkpoints(assembly: Assembly, planned: PlannedSteps, size: int) -> KeptCheckpoints:
    keep: CheckpointConfig = assembly.config.checkpoint
    if keep_best_notes(assembly, planned):
        keep = keep.model_copy(update={"keep_best": None})  # it keeps nothing
    saves = firing_steps(assembly, keep.cadence(), planned.start, planned.last)
    at_end, at_most = count_kept(planned, keep, saves)
    return {
        "at_end": at_end,
        "at_most": at_most,
        "bytes_at_end": at_end * size,
        "bytes_at_most": at_most * size,
        "keep_last": keep.keep_last,
        "keep_every": keep.keep_every,
        "keep_best": keep.keep_best.model_dump() if keep.keep_best else None,
    }
