"""Repeating the training between two checkpoints of a run in memory, to compare the results."""

import contextlib
import json

from stepctl.checkpoint import codec
from stepctl.config.registry import is_builtin
from stepctl.errors import ConfigError
from stepctl.hooks.base import has_state
from stepctl.hooks.stop_request import HookStop
from stepctl.reports import diff
from stepctl.rundir.series import series_folder
from stepctl.runs.at_step import RunFiles, open_at_step, read_run
from stepctl.runs.compatibility import check_locked_keys, config_for_watches
from stepctl.runs.messages import Say
from stepctl.runs.records import RunRecords
from stepctl.state.train_state import TrainState
from stepctl.stopping.rules import StopAtStep
from stepctl.system import blas
from stepctl.training.assembly import Assembly
from stepctl.training.build import assemble
from stepctl.training.trainer import Trainer

_KEY_CHANGED = (
    "{key} was changed later, and a replay uses the newest config: replay from a checkpoint that was "
    "saved after the change"
)


def replay(records: RunRecords, first: int, last: int, say: Say) -> diff.Replayed:
    """Yield each saved step after `first`, up to `last`, with the differences from its checkpoint.

    Nothing is written. CheckpointError if a checkpoint is refused, or was made with another config.
    """
    run = read_run(records)
    config = run.config
    if config.is_async:
        raise ConfigError(
            f"{run.directory.path}: was trained asynchronously, which is not deterministic, so it cannot be replayed"
        )
    with contextlib.closing(assemble(config)) as assembly:
        yield from _replayed(run, assembly, first, last, say)


def _replayed(run: RunFiles, assembly: Assembly, first: int, last: int, say: Say) -> diff.Replayed:
    config = run.config
    _check_data(assembly, run, first, last)
    data_files = config.data_files()
    at = open_at_step(
        run,
        lambda step: assembly,
        step=first,
        say=say,
        may_differ=data_files,
        counters_may_differ=True,
        remedy=_KEY_CHANGED,
    )
    assembly.reset_changed_watches(config_for_watches(at.header, config))
    for words in blas.numerics_differences(json.loads(at.header.numerics), assembly.numerics):
        say(f"warning: the bits may differ on this machine: {words}")
    store = run.store
    store.open(last).close()  # an unusable one is refused before the training

    def skip(why: str) -> None:
        say(f"{why}; this batch is skipped")

    for step in [step for step in store.steps() if first < step <= last]:
        Trainer(
            assembly.task,
            assembly.training,
            assembly.state,
            stop=[StopAtStep(step)],
            hooks=[hook for hook in assembly.hooks if is_builtin(hook) or has_state(hook)],
            hook_stop=assembly.hook_stop,
            skip=skip if config.skips_non_finite else None,
        ).run()
        with store.open(step) as reader:
            check_locked_keys(
                reader.name, reader.header.config, config.plain(), data_files, _KEY_CHANGED
            )
            differences = compare_replayed(reader, assembly.state)
        recorded = series_folder(run.directory)
        rows = assembly.series
        differences += diff.compare_series(
            recorded, rows.held, rows.names(), after=first, last=step
        )
        yield step, differences


def compare_replayed(reader: codec.Reader, state: TrainState) -> list[diff.ArrayDifference]:
    """Return the differences of a replayed state, apart from the stop that a hook requested.

    Only hooks with state are replayed, and any hook may have requested it.
    """
    folder = f"hooks/{HookStop.name}/"
    differences = diff.compare_state(reader, state)
    return [item for item in differences if not item["path"].startswith(folder)]


def _check_data(assembly: Assembly, run: RunFiles, first: int, last: int) -> None:
    """Raise ConfigError unless the steps were trained on these data, wherever their files are."""
    ledger = run.ledger
    path = run.directory.path
    if ledger.data is not None and not assembly.has_data(ledger.data):
        raise ConfigError(
            f"{assembly.origins}: not the data that {path} was trained on; restore the original data"
        )
    if not all(assembly.has_data(data) for data in ledger.data_between(first, last)):
        raise ConfigError(
            f"{path}: the data was changed after step {first}, and a replay uses the newest data: "
            "replay from a checkpoint that was saved after the change"
        )
