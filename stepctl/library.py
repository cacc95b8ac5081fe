"""Runs from Python: what `import stepctl` offers, for notebooks and programs."""

from __future__ import annotations

import atexit
import contextlib
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from stepctl import config as configs
from stepctl import launcher, numerics, report, run, yamlio
from stepctl.arena import Array
from stepctl.checkpoint.codec import Reader
from stepctl.config import Config, Stop
from stepctl.errors import ConfigError, StepctlError
from stepctl.files import expanded
from stepctl.hooks.base import Hook, StopReason
from stepctl.hooks.signals import DeferredInterrupt
from stepctl.problems import in_one_line
from stepctl.rundir import RunDirectory
from stepctl.segment import Outcome, Say, Segment
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics, as_numbers
from stepctl.tasks.read_only import explained
from stepctl.trainer import Trainer

Path_ = str | os.PathLike[str]


class Run:
    """A run that this process holds, until it is closed: use it in a `with`.

    `step` and `train` may follow one another; together they are one segment. `state` is live: what it shows is
    changed by the next step, in place or not, so copy what you want to keep.
    """

    def __init__(self, segment: Segment, stack: contextlib.ExitStack) -> None:
        self._segment, self._stack = segment, stack
        self._trainer: Trainer | None = None
        self._fresh = segment.restored is None
        self._metrics: Metrics | None = None
        self._opened = contextlib.ExitStack()
        self._closed = False
        self._process = os.getpid()
        atexit.register(self._close_at_exit)  # for whoever forgets

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        return f"Run({str(self.path)!r}, global step {self.global_step} of {self.target}{closed})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._segment.directory.path

    @property
    def config(self) -> Config:
        """The resolved config."""
        return self._segment.config

    @property
    def state(self) -> TrainState:
        """Counters and arrays as they are now."""
        return self._segment.state

    @property
    def global_step(self) -> int:
        """Completed updates since step 0."""
        return self.state.counters.global_step

    @property
    def target(self) -> int:
        """The global step to train to."""
        return self._segment.target

    @property
    def stop_reason(self) -> StopReason | None:
        """Why no further step will be made; None if there is one to make."""
        if self._trainer is not None:
            return self._trainer.stop_reason()
        return next((why for rule in self._segment.rules if (why := rule.reason(self.state.counters))), None)

    def step(self, n: int = 1) -> Metrics | None:
        """Make up to `n` updates, fewer if a stop rule says so; return the metrics of the last, None if there is none.

        Rows, evaluations and checkpoints are written as `train` would. At a Ctrl-C the step in flight finishes, and
        then KeyboardInterrupt is raised: the run can go on, and nothing is lost. A second Ctrl-C raises it at once.
        """
        if self._finished():
            return None
        with DeferredInterrupt() as interrupt:
            trainer, made = self._begin(), None
            for _ in range(n):
                found = None
                while found is None and not interrupt.received and trainer.stop_reason() is None:
                    found = trainer.make_step()  # None: a batch that was skipped
                if found is None:
                    break
                made = self._metrics = found
            self._segment.assembly.rows.flush()
        return made

    def train(self) -> StopReason:
        """Make every update to the target, or until another stop rule says so; return why it stopped.

        A Ctrl-C is answered as in `step`.
        """
        if (finished := self._finished()) is not None:
            return finished
        with DeferredInterrupt() as interrupt:
            trainer = self._begin()
            reason = None
            while not interrupt.received and (reason := trainer.stop_reason()) is None:
                self._metrics = trainer.make_step() or self._metrics
            self._segment.assembly.rows.flush()
        assert reason is not None  # else the interrupt was raised
        return reason

    def save(self) -> None:
        """Publish a checkpoint of the state as it is, if this step has none yet, and wait until it is durable."""
        self._check_held()
        if self._fresh or self._trainer is not None:  # what was restored, and not trained, has one
            with DeferredInterrupt():
                self._begin()
                self._segment.saver.now(self.state)

    def evaluate(self, *, average: bool = False) -> Metrics:
        """Return the metrics over the validation part, with the moving average's weights if asked; nothing changes."""
        assembly = self._segment.assembly
        numerics.give_again(assembly.numerics["threads"])
        if assembly.validation is None:
            raise ConfigError("data: there is no validation part; set data.validation_fraction")
        with explained(self.state):
            return as_numbers(assembly.task.evaluate(self.state, assembly.validation, average=average), "evaluate")

    def close(self) -> Outcome | None:
        """Write the last row and checkpoint, and let the run go; None if nothing was begun.

        A fresh run always is: its first checkpoint is that of no updates yet. After a step that was broken off in the
        middle (an error in an update, a second Ctrl-C) nothing is written: a line says from which checkpoint a resume
        goes on.
        """
        if self._closed:
            return None
        atexit.unregister(self._close_at_exit)
        self._closed = True
        with DeferredInterrupt(), self._stack:
            if self._fresh:
                self._begin()
            if self._trainer is None:
                return None
            trainer, self._trainer = self._trainer, None
            if not trainer.complete:
                self._fail(StepctlError("closed after a step that failed"))
                return None
            reason = trainer.stop_reason() or StopReason("closed", done=False)
            with self._opened:
                trainer.end(self._metrics, reason)
            return self._segment.ended(trainer, reason)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
            return
        atexit.unregister(self._close_at_exit)
        self._closed = True
        with DeferredInterrupt(), self._stack:
            trainer, self._trainer = self._trainer, None
            if trainer is not None and isinstance(error, KeyboardInterrupt):
                self._segment.save_what_stands(trainer, self._segment.saver)
                self._segment.record_end("KeyboardInterrupt")
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Let the segment go as the error ends it: it saves the state of a whole step, and is recorded."""
        with contextlib.suppress(type(error)):
            self._opened.__exit__(type(error), error, error.__traceback__)

    def _close_at_exit(self) -> None:
        if os.getpid() == self._process:  # and not a child that was forked off it
            self.close()

    def _check_held(self) -> None:
        if self._closed:
            raise StepctlError(
                f"{self.path}: is closed, and no longer held; go on with: stepctl.resume({str(self.path)!r})"
            )

    def _finished(self) -> StopReason | None:
        self._check_held()
        # to begin a segment that makes no step would cut the last one's final rows
        return None if self._fresh or self._trainer is not None else self.stop_reason

    def _begin(self) -> Trainer:
        self._fresh = False
        numerics.give_again(self._segment.assembly.numerics["threads"])
        if self._trainer is None:
            self._trainer = self._opened.enter_context(self._segment.opened())
            self._trainer.start()
        if not self._trainer.complete or self._trainer.broken_off:
            raise StepctlError(
                f"{self.path}: the last step was broken off in the middle; close this run, and resume it"
            )
        return self._trainer


def _check_alone() -> None:
    """Raise ConfigError in each rank of an MPI job: they would train one run each, or wait for its lock."""
    ranks = launcher.size()
    if launcher.is_rank() and ranks != 1:
        share = f"mpiexec -n {ranks or 'N'} stepctl train FILE"
        raise ConfigError(
            f"the library runs in one process, and this is one of {ranks or 'several'} that were started together; "
            f"start the script without mpiexec, or share the steps of a run among processes with: {share}"
        )


def create(
    config: Path_ | Mapping[str, Any],
    run_dir: Path_,
    *,
    overrides: Mapping[str, Any] | None = None,
    hooks: Sequence[Hook] = (),
    say: Say = print,
) -> Run:
    """Make a fresh run from a config (a YAML file, or a mapping as one holds), and hold it.

    `overrides` are dotted keys and their values; `hooks` your own, whose `state` is saved with the run's; `say` takes
    messages, on the thread that trains: one that blocks holds up training.
    ConfigError if something is wrong or a run is there already, RunInUseError if another process has it.
    """
    _check_alone()
    document = _document(config, overrides)
    return _held(run.create(configs.parse(document), RunDirectory(_expanded(run_dir)), say, hooks))


def resume(
    run_dir: Path_,
    *,
    last_step: SupportsIndex | None = None,
    num_steps: SupportsIndex | None = None,
    from_step: SupportsIndex | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_change: str | Sequence[str] = (),
    hooks: Sequence[Hook] = (),
    say: Say = print,
) -> Run:
    """Hold a run, at its newest good checkpoint or at `from_step`; what it will do is as `stepctl resume` does it.

    `hooks` must be those that it was created with: what they remember is in the checkpoint.
    """
    _check_alone()
    directory = RunDirectory(_expanded(run_dir))
    document = directory.newest_config()
    _override(document, overrides)
    allowed = (allow_change,) if isinstance(allow_change, str) else tuple(allow_change)
    stop = _stop(_step("last_step", last_step), _step("num_steps", num_steps))
    back = _step("from_step", from_step)
    options = run.ResumeOptions(document=document, stop=stop, from_step=back, allow_change=allowed)
    return _held(run.resume(directory, options, say, hooks))


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """What a checkpoint holds: `arrays` by path, such as "params/dense0/weight"."""

    global_step: int
    counters: dict[str, int]
    arrays: dict[str, Array]
    config: dict[str, Any]
    run: str
    run_id: str | None  # None in a checkpoint of format version 1
    created_by: str
    sha256: str

    def __repr__(self) -> str:
        n_bytes = sum(array.nbytes for array in self.arrays.values())
        what = f"{len(self.arrays)} arrays of {n_bytes:,} bytes"
        return f"Checkpoint(run {self.run!r}, global step {self.global_step}, {what}, sha256 {self.sha256[:12]}...)"


def load_checkpoint(path: Path_) -> Checkpoint:
    """Read a checkpoint, or a run's newest good one, into memory. CheckpointError if it is refused."""
    with report.open_path(_expanded(path), print) as reader:
        header = reader.header
        arrays = {name: _read(reader, name, shape, dtype) for name, (shape, dtype) in reader.array_shapes().items()}
        reader.check_unchanged()
        config = yamlio.loads(header.config, f"{reader.name}:/config").value
        return Checkpoint(
            global_step=header.global_step,
            counters=header.counters,
            arrays=arrays,
            config=config,
            run=header.run,
            run_id=header.run_id,
            created_by=header.created_by,
            sha256=header.sha256,
        )


def global_step(path: Path_) -> int:
    """Return the global step of a checkpoint, or of a run's newest good one."""
    with report.open_path(_expanded(path), print) as reader:
        return reader.header.global_step


def _read(reader: Reader, name: str, shape: tuple[int, ...], dtype: str) -> Array:
    array = np.empty(shape, dtype)
    reader.read_into(name, array)
    return array


def _document(config: Path_ | Mapping[str, Any], overrides: Mapping[str, Any] | None) -> yamlio.Document:
    if isinstance(config, Mapping):
        document = yamlio.loads(yamlio.dumps(_plain(config, "config")), "config")  # as a file would be read
    else:
        document = yamlio.load(_expanded(config))
    _override(document, overrides)
    return document


def _override(document: yamlio.Document, overrides: Mapping[str, Any] | None) -> None:
    for key, value in (overrides or {}).items():
        document.put(str(key), _plain(value, f"overrides: {key}"), "overrides")


def _plain(value: Any, key: str) -> Any:
    """Return a value as a YAML file would hold it: NumPy's scalars and arrays, paths and enum members made plain."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{number}]") for number, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    kind = type(value).__name__
    raise ConfigError(in_one_line(f"{key}: {value!r} is of type {kind}, which no config can hold; give a plain value"))


def _step(name: str, value: SupportsIndex | None) -> int | None:
    """Return a number of steps as a plain int; ConfigError if it is none."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number < 1 << 62:
        raise ConfigError(in_one_line(f"{name}: {value!r} is wrong; give a whole number from 0 on"))
    return number


def _stop(last_step: int | None, num_steps: int | None) -> Stop | None:
    if last_step is not None and num_steps is not None:
        raise ConfigError("last_step and num_steps: give one (an absolute step, or steps from here)")
    return None if last_step is num_steps is None else Stop(last_step=last_step, num_steps=num_steps)


def _expanded(path: Path_) -> str:
    try:
        return expanded(os.fspath(path))
    except ValueError as error:
        raise ConfigError(in_one_line(str(error))) from error


def _held(context: contextlib.AbstractContextManager[Segment]) -> Run:
    with contextlib.ExitStack() as stack:
        segment = stack.enter_context(context)
        return Run(segment, stack.pop_all())
