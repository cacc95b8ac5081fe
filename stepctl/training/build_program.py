"""Building the run of a user's own program from its config."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from stepctl.checkpoint import codec
from stepctl.config import registry
from stepctl.config.model import Config, ProgramConfig, ScriptConfig
from stepctl.data.batches import NoBatches
from stepctl.data.files import reading
from stepctl.distributed.comm import SINGLE_PROCESS, Comm
from stepctl.errors import ConfigError, DataError, StepctlError
from stepctl.hooks.base import Hook, hook_states
from stepctl.hooks.evaluate import Evaluate
from stepctl.hooks.log import Log
from stepctl.hooks.stop_request import FORK_REMEDY, HookStop, StopRequest
from stepctl.programs.program import ProgramTask, Script
from stepctl.state.program_state import SavedProgramState
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopRule
from stepctl.stopping.signals import default_signal_actions
from stepctl.system import blas, files
from stepctl.system.closing import close_on_error
from stepctl.system.text import in_one_line
from stepctl.system.user_code import describe_error
from stepctl.training.assembly import Assembly, build_watches
from stepctl.training.checks import check_hooks
from stepctl.training.resolve import build_hooks, build_program, decided_numerics
from stepctl.writers.from_config import check_packages
from stepctl.writers.row_buffer import RowBuffer

_STOP_WHEN_REMEDY = "to continue: --set stop.when=null"


@dataclass(frozen=True)
class ProgramAssembly(Assembly):
    """The parts of a run of a user's program. `files` are the data files among its arguments."""

    task: ProgramTask
    stop_request: StopRequest
    files: tuple[str, ...] = ()

    def trial(self) -> None:
        return  # a program's step cannot be made without changing the state

    def check_data(self, say: Callable[[str], None]) -> None:
        self.data_fingerprint()

    @property
    def data_section(self) -> str:
        return "program"

    @property
    def origins(self) -> str:
        return ", ".join(self.files)

    def data_fingerprint(self) -> str:
        return self._data_fingerprint

    @cached_property
    def _data_fingerprint(self) -> str:
        with default_signal_actions():
            return "; ".join(_fingerprint(path) for path in self.files)

    def has_data(self, fingerprint: str) -> bool:
        return fingerprint == self.data_fingerprint()

    def stop_rules(self) -> list[StopRule]:
        return [*super().stop_rules(), self.stop_request]

    def reset_changed_watches(self, before: Config) -> list[str]:
        changed = super().reset_changed_watches(before)
        if before.when != self.config.when and self.stop_request.is_requested:
            self.stop_request.reset()
            changed.append("stop.when")
        return changed


def assemble_program(
    config: ProgramConfig, hooks: Sequence[Hook], *, comm: Comm, record_numerics: bool
) -> ProgramAssembly:
    """Build the program, its initial state and its hooks. ConfigError if they do not fit."""
    if comm.size > 1:
        raise ConfigError(
            f"program: {config.program.name} cannot be shared by {comm.size} processes; start one"
        )
    task = build_program(config)
    with close_on_error(task):
        state = _initial_state(config, task)
        config_hooks, hook_stop = build_hooks(config)
        return _assemble(
            config,
            task,
            state,
            [*config_hooks, *hooks],
            hook_stop,
            comm=comm,
            record_numerics=record_numerics,
            remedy=_STOP_WHEN_REMEDY,
            files=_files(config),
        )


def assemble_script(
    config: ScriptConfig,
    live: dict[str, Any],
    hooks: Sequence[Hook] = (),
    *,
    record_numerics: bool = False,
) -> ProgramAssembly:
    """Build the parts of a script's run; `live` is the dict that the script changes."""
    task = ProgramTask(Script(live), seed=config.seed)
    state = task.initial_state(config.initial_step)
    return _assemble(
        config,
        task,
        state,
        hooks,
        HookStop(),
        comm=SINGLE_PROCESS,
        record_numerics=record_numerics,
        remedy=FORK_REMEDY,
    )


def assemble_stored(
    config: ProgramConfig | ScriptConfig, hooks: Sequence[Hook] = ()
) -> ProgramAssembly:
    """Build the parts of a run without its program or script: nothing of the user's is imported."""
    task = ProgramTask(Script({}), seed=config.seed)
    state = replace(task.initial_state(config.initial_step), program=SavedProgramState())
    is_script = isinstance(config, ScriptConfig)
    return _assemble(
        config,
        task,
        state,
        hooks,
        HookStop(),
        comm=SINGLE_PROCESS,
        record_numerics=False,
        remedy=FORK_REMEDY if is_script else _STOP_WHEN_REMEDY,
    )


def _assemble(
    config: Config,
    task: ProgramTask,
    state: TrainState,
    hooks: Sequence[Hook],
    hook_stop: HookStop,
    *,
    comm: Comm,
    record_numerics: bool,
    remedy: str,
    files: tuple[str, ...] = (),
) -> ProgramAssembly:
    """Build the hooks around a program. `remedy` says how to continue after a requested stop."""
    check_packages(config.log)
    threads = config.numerics.threads
    numerics = blas.set_threads(blas.default_threads() if threads == blas.AUTO else threads)
    if record_numerics:
        config = config.with_values(decided_numerics(config, numerics))
    rows = RowBuffer()
    log = Log(config.log, rows, [], first_step=config.initial_step + 1, n_samples=None)
    watches = build_watches(config, task)
    stop_request = StopRequest(config.when, remedy)
    own_hooks: list[Hook] = [log]
    if task.can_evaluate:
        best = config.checkpoint.keep_best
        named = [] if best is None else [best.metric]
        own_hooks.append(Evaluate(config.evaluate, task, (), rows, watches, named))
    all_hooks = [*own_hooks, *watches, stop_request, hook_stop, *hooks]
    check_hooks(all_hooks)
    state = replace(state, hooks=hook_states(all_hooks))
    codec.check_storable(state)
    return ProgramAssembly(
        config=config,
        numerics=numerics,
        task=task,
        training=NoBatches(),
        validation=() if task.can_evaluate else None,
        rows=rows,
        watches=watches,
        hooks=all_hooks,
        state=state,
        comm=comm,
        series=task.series,
        hook_stop=hook_stop,
        stop_request=stop_request,
        files=files,
    )


def _initial_state(config: ProgramConfig, task: ProgramTask) -> TrainState:
    try:
        return task.initial_state(config.initial_step)
    except (StepctlError, MemoryError):
        raise
    except registry.USER_CODE_ERRORS as error:
        raise ConfigError(
            in_one_line(f"program: initial_state failed: {describe_error(error)}")
        ) from error


def _files(config: ProgramConfig) -> tuple[str, ...]:
    """Return the paths of the program's data files."""
    spec = config.program.spec()
    paths: list[str] = []
    for key in sorted(config.data_files()):
        paths += _paths(spec[key.removeprefix("program.")])
    return tuple(paths)


def _paths(value: Any) -> Iterator[str]:
    """Yield the paths in an argument: one, or those of a list or of a dict's values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _paths([*value.values()])
    elif value is not None:
        for item in value:
            yield from _paths(item)


def _fingerprint(path: str) -> str:
    if not files.exists(path):
        raise DataError(
            f"{in_one_line(path)}: no such file; check the path in the config's program section"
        )
    with reading(path, "a file"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
