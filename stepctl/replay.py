"""Training again, in memory, from one checkpoint of a run to a later one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from stepctl import compare, numerics, rundir
from stepctl import config as configs
from stepctl.assembly import Assembly, assemble
from stepctl.checkpoint import codec
from stepctl.checkpoint.store import Store
from stepctl.errors import ConfigError
from stepctl.hooks.stop import StopAtStep
from stepctl.run import check_same_run
from stepctl.rundir import RunDirectory
from stepctl.trainer import Trainer

_ANOTHER = "its {key} was changed on the way: replay from a checkpoint after the change, or up to one before it"


def replay(
    directory: RunDirectory, first: int, last: int, say: Callable[[str], None]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield each stored step after `first` up to `last`, and what differs there from the stored checkpoint.

    CheckpointError if a checkpoint is refused, or was made with another config; nothing is written.
    """
    if first >= last:
        raise ConfigError(f"--replay {first}:{last}: goes from a step to a later one")
    base = configs.parse(directory.newest_config())
    if base.distributed.mode == "async":
        raise ConfigError(f"{directory.path}: was trained asynchronously, which gives other bits each time: no replay")
    assembly = assemble(base)
    _check_data(assembly, directory, first, last)
    state, store = assembly.state, Store(directory.checkpoint_folder, directory.records)

    def restore(reader: codec.Reader) -> None:
        check_same_run(reader.name, reader.header.config, base.plain(), base.data_files(), _ANOTHER)
        codec.restore(reader, state)

    with store.open(first, restore) as reader:
        for words in numerics.differences(json.loads(reader.header.numerics), assembly.numerics):
            say(f"warning: other bits may result here: {words}")
    store.open(last, lambda reader: None).close()
    skip = (lambda why: say(f"{why}; this batch is skipped")) if base.on_nonfinite == "skip" else None
    for step in [step for step in store.steps() if first < step <= last]:
        stop = [StopAtStep(step)]
        Trainer(assembly.task, assembly.training, state, stop=stop, hooks=assembly.hooks, skip=skip).run()
        with store.open(step) as reader:
            check_same_run(reader.name, reader.header.config, base.plain(), base.data_files(), _ANOTHER)
            yield step, compare.state(reader, state)


def _check_data(assembly: Assembly, directory: RunDirectory, first: int, last: int) -> None:
    """Raise ConfigError unless the steps after `first` up to `last` were trained on these data, under whatever path."""
    ledger = directory.read_ledger()
    newest = rundir.newest_data(ledger)
    if newest is not None and not assembly.has_data(newest):
        lost = f"the data are not those that {directory.path} was trained on; bring them back"
        raise ConfigError(f"{assembly.origins}: {lost}")
    if not all(assembly.has_data(data) for data in rundir.data_between(ledger, first, last)):
        raise ConfigError(f"{directory.path}: {_ANOTHER.format(key='data')}")
