"""The functions and classes of `import stepctl`, for notebooks and programs."""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from stepctl.checkpoint.codec import Reader
from stepctl.config import yaml
from stepctl.config.model import Config, StopConfig, TaskConfig, parse_config
from stepctl.distributed.launcher import refuse_job
from stepctl.errors import ConfigError, StepctlError
from stepctl.hooks.base import Hook
from stepctl.hooks.progress import OptionalProgress
from stepctl.inference import load
from stepctl.inference.load import Selection
from stepctl.inference.trained_model import TrainedModel
from stepctl.programs.base import Metrics, as_numbers
from stepctl.reports import html, inspect
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.messages import Say
from stepctl.runs.open import create_run, resume_locked
from stepctl.runs.open_segment import OpenSegment, Outcome
from stepctl.runs.progress import display_for
from stepctl.runs.records import lock_records
from stepctl.runs.segment import Segment
from stepctl.state.arena import Array
from stepctl.state.read_only import explain_read_only
from stepctl.state.train_state import TrainState
from stepctl.state.value_decoder import decode
from stepctl.stopping.base import StopReason, first_reason
from stepctl.stopping.signals import DeferredInterrupt, Signals
from stepctl.system import blas
from stepctl.system.arguments import MAX_STEP, whole_number
from stepctl.system.files import expand_path
from stepctl.system.text import in_one_line
from stepctl.training.assembly import TaskAssembly

PathLike = str | os.PathLike[str]


class NamedMetrics(dict[str, float]):
    """Metrics by name; a notebook shows them as a table."""

    def _repr_html_(self) -> str:
        return html.table(self.items())


class Run:
    """A run that this process holds until it is closed; a context manager.

    All calls of `step` and `train` together are one segment. `state` is live: the next step changes
    its arrays, so copy what you want to keep.
    """

    def __init__(self, segment: Segment, stack: contextlib.ExitStack) -> None:
        """`stack` releases the run when it is closed."""
        self._segment = segment
        self._stack = stack
        self._running: OpenSegment | None = None
        self._is_fresh = segment.restored is None
        self._open_segment = contextlib.ExitStack()
        self._progress = OptionalProgress()
        self._last_metrics: NamedMetrics | None = None
        self._closed = False
        self._process = os.getpid()
        atexit.register(self._close_at_exit)  # for a program that does not close it

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        return f"Run({str(self.path)!r}, global step {self.global_step} of {self.target}{closed})"

    def _repr_html_(self) -> str:
        """Return the run as a notebook shows it: step, newest metrics, curve, config."""
        facts: dict[str, object] = {"global step": f"{self.global_step} of {self.target}"}
        reason = None if self._closed else self.stop_reason
        if reason is not None:
            facts["stopped"] = reason.text
        if self._last_metrics is not None:
            facts |= self._last_metrics
        return html.run_html(str(self.path), repr(self), facts, self.config.plain())

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
        """The counters and arrays, as they are now."""
        return self._segment.state

    @property
    def global_step(self) -> int:
        """The number of completed updates since step 0."""
        return self.state.counters.global_step

    @property
    def target(self) -> int:
        """The global step to train to."""
        return self._segment.target

    @property
    def stop_reason(self) -> StopReason | None:
        """Why no further step will be made; None if there are steps to make."""
        if self._running is not None:
            return self._running.trainer.stop_reason()
        return first_reason(self._segment.rules, self.state.counters)

    def step(self, n: int = 1) -> Metrics | None:
        """Make up to `n` updates, fewer if a stop rule ends the run; return the last one's metrics.

        None if no update was made. Rows, evaluations and checkpoints are written as in `train`. On
        Ctrl-C the step in flight finishes, then KeyboardInterrupt is raised, and the run can
        continue. A second Ctrl-C raises it at once.
        """
        if self._finished():
            return None
        with DeferredInterrupt() as interrupt:
            trainer = self._begin().trainer
            before = self.global_step
            trainer.train(n, lambda: interrupt.received)
            self._segment.assembly.rows.flush()
        if self.global_step == before:
            return None
        self._last_metrics = NamedMetrics(trainer.last_metrics or {})
        return self._last_metrics

    def train(self, *, progress: bool = False) -> StopReason:
        """Train to the target, or until another stop rule ends the run; return the reason.

        `progress`: show a bar, in a terminal or a notebook; elsewhere print a line every 10 seconds.
        Ctrl-C is handled as in `step`.
        """
        finished = self._finished()
        if finished is not None:
            return finished
        with DeferredInterrupt() as interrupt:
            trainer = self._begin().trainer
            shown: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if progress:
                shown = self._progress.show(display_for(self._segment), self.state)
            with shown:
                reason = trainer.train(interrupted=lambda: interrupt.received)
            self._segment.assembly.rows.flush()
        self._last_metrics = NamedMetrics(trainer.last_metrics or {})
        assert reason is not None  # else the interrupt was raised
        return reason

    def save(self) -> None:
        """Publish a checkpoint, if this step has none yet, and wait until it is durable."""
        self._check_not_closed()
        if self._is_fresh or self._running is not None:  # a restored state has a checkpoint
            with DeferredInterrupt():
                self._begin().saver.save_now(self.state)

    def evaluate(self, *, average: bool = False) -> Metrics:
        """Return the metrics over the validation rows.

        `average`: with the moving average of the weights.
        """
        assembly = self._segment.assembly
        blas.restore_threads(assembly.numerics["threads"])
        if assembly.validation is None:
            if isinstance(self.config, TaskConfig):
                problem = "data: there is no validation part; set data.validation_fraction"
            else:
                problem = "the program cannot evaluate; give it a method evaluate(self, state, rng)"
            raise ConfigError(problem)
        if average and not self.config.has_average:
            raise ConfigError("average=True: there is no moving average; set ema, or leave it out")
        with explain_read_only(self.state):
            return NamedMetrics(
                as_numbers(
                    assembly.task.evaluate(self.state, assembly.validation, average=average),
                    "task: evaluate returned",
                )
            )

    def predict(self, x: npt.ArrayLike, *, average: bool = False) -> Array:
        """Return the class or the values of each row of x, as `TrainedModel.predict` does.

        `average`: with the moving average of the weights. ConfigError if the run has no model.
        """
        assembly = self._segment.assembly
        if not isinstance(assembly, TaskAssembly):
            raise ConfigError(f"{self.path}: is of a program, which has no model")
        model = TrainedModel(
            assembly.task,
            self.state,
            assembly.config,
            config=assembly.config.plain(),
            origin=str(self.path),
            threads=assembly.numerics["threads"],
            average=average,
        )
        return model.predict(x)

    def close(self) -> Outcome | None:
        """Write the last row and checkpoint, and release the run; None if no segment was started.

        A fresh run always starts one, for its initial checkpoint. If the last step failed halfway
        (an error in an update, a second Ctrl-C) nothing is written, and a message names the
        checkpoint that a resume continues from.
        """
        if self._closed:
            return None
        atexit.unregister(self._close_at_exit)
        self._closed = True
        with DeferredInterrupt(), self._stack:
            if self._is_fresh:
                self._begin()
            running = self._running
            self._running = None
            if running is None:
                return None
            if not running.trainer.complete:
                self._fail(StepctlError("closed after a step that failed"))
                return None
            reason = running.trainer.stop_reason() or StopReason("closed", done=False)
            with self._open_segment:
                running.trainer.end(reason)
            return running.finish(reason)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
            return
        atexit.unregister(self._close_at_exit)
        self._closed = True
        with DeferredInterrupt(), self._stack:
            running = self._running
            self._running = None
            if running is not None and isinstance(error, KeyboardInterrupt):
                running.save_complete_state()
                running.record_end("KeyboardInterrupt")
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End the open segment with an error: the state of a complete step is saved."""
        with contextlib.suppress(type(error)):
            self._open_segment.__exit__(type(error), error, error.__traceback__)

    def _close_at_exit(self) -> None:
        if os.getpid() == self._process:  # not in a forked child
            self.close()

    def _check_not_closed(self) -> None:
        if self._closed:
            raise StepctlError(
                f"{self.path}: is closed, and no longer held; continue with: "
                f"stepctl.resume({str(self.path)!r})"
            )

    def _finished(self) -> StopReason | None:
        """Return why a restored run has no step to make; None once a segment is started."""
        self._check_not_closed()
        if self._is_fresh or self._running is not None:
            return None
        # not started: a segment without a step would remove the previous one's final rows
        return self.stop_reason

    def _begin(self) -> OpenSegment:
        """Return the open segment; start it at the first call."""
        self._is_fresh = False
        blas.restore_threads(self._segment.assembly.numerics["threads"])
        if self._running is None:
            self._running = self._open_segment.enter_context(
                self._segment.open(Signals(), hooks=[self._progress])
            )
            self._running.trainer.start()
        trainer = self._running.trainer
        if not trainer.complete or trainer.interrupted_in_step:
            raise StepctlError(
                f"{self.path}: the last step failed halfway; close this run, and resume it"
            )
        return self._running


def create(
    config: PathLike | Mapping[str, Any],
    run_dir: PathLike,
    *,
    overrides: Mapping[str, Any] | None = None,
    hooks: Sequence[Hook] = (),
    say: Say = print,
) -> Run:
    """Create a run from a config, which is a YAML file or a mapping, and hold it.

    `overrides` maps dotted keys to values. `hooks` are your own; their `state` is saved with the
    run's. `say` receives messages on the training thread, which waits for it. ConfigError if
    something is wrong, RunExistsError if a run is there, RunInUseError if another process holds it.
    """
    refuse_job()
    document = _document(config, overrides)
    return _hold(create_run(parse_config(document), RunDirectory(_expand(run_dir)), say, hooks))


def resume(
    run_dir: PathLike,
    *,
    last_step: SupportsIndex | None = None,
    num_steps: SupportsIndex | None = None,
    from_step: SupportsIndex | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_change: str | Sequence[str] = (),
    hooks: Sequence[Hook] = (),
    say: Say = print,
) -> Run:
    """Hold a run, restored from its newest good checkpoint or from the one of `from_step`.

    The arguments are the options of `stepctl resume`. `hooks` must be those that the run was
    created with: their state is in the checkpoint.
    """
    refuse_job()
    allowed = (allow_change,) if isinstance(allow_change, str) else tuple(allow_change)
    stop = _stop(_step("last_step", last_step), _step("num_steps", num_steps))
    options = ResumeOptions(
        stop=stop,
        from_step=_step("from_step", from_step),
        allow_change=allowed,
    )
    return _hold(_resumed(RunDirectory(_expand(run_dir)), options, overrides, hooks, say))


@contextlib.contextmanager
def _resumed(
    directory: RunDirectory,
    options: ResumeOptions,
    overrides: Mapping[str, Any] | None,
    hooks: Sequence[Hook],
    say: Say,
) -> Iterator[Segment]:
    with lock_records(directory, say) as records:
        if overrides:
            document = copy.deepcopy(records.document)
            _override(document, overrides)
            options = options._replace(document=document)
        with resume_locked(records, options, say, hooks) as segment:
            yield segment


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """The content of a checkpoint; `arrays` by path, such as "params/dense0/weight".

    `values` is the state of a program as its steps had it, None for a task: numbers, text and
    containers, its arrays (in their memory order; those of `arrays` are in C order), new NumPy
    generators in the saved state, and for an object the dict that its `state_dict` returned.
    """

    global_step: int
    counters: dict[str, int]
    arrays: dict[str, Array]
    values: dict[str, Any] | None
    config: dict[str, Any]
    run: str
    run_id: str | None  # None in a checkpoint of format version 1
    created_by: str
    sha256: str

    def __repr__(self) -> str:
        n_bytes = sum(array.nbytes for array in self.arrays.values())
        return (
            f"Checkpoint(run {self.run!r}, global step {self.global_step}, {len(self.arrays)} "
            f"arrays of {n_bytes:,} bytes, sha256 {self.sha256[:12]}...)"
        )

    def _repr_html_(self) -> str:
        """Return the checkpoint as a notebook shows it: counters, arrays, config."""
        facts: dict[str, object] = {"run": self.run, **self.counters}
        facts |= {"created by": self.created_by, "sha256": self.sha256}
        arrays = {path: (array.shape, str(array.dtype)) for path, array in self.arrays.items()}
        title = f"Checkpoint of global step {self.global_step}"
        return html.checkpoint_html(title, facts, arrays, self.config)


def load_checkpoint(path: PathLike) -> Checkpoint:
    """Read a checkpoint, or a run's newest good one; CheckpointError if it is refused."""
    with inspect.open_path(_expand(path), print) as reader:
        header = reader.header
        arrays = {
            name: _read(reader, name, shape, dtype)
            for name, (shape, dtype) in reader.array_shapes().items()
        }
        reader.check_unchanged()
        values = None
        if header.values is not None:
            of_program = {
                path.removeprefix("state/"): array
                for path, array in arrays.items()
                if path.startswith("state/")
            }
            values = decode(header.values, of_program, make_object=dict)
        config = yaml.loads(header.config, f"{reader.name}:/config").value
        return Checkpoint(
            global_step=header.global_step,
            counters=header.counters,
            arrays=arrays,
            values=values,
            config=config,
            run=header.run,
            run_id=header.run_id,
            created_by=header.created_by,
            sha256=header.sha256,
        )


def load_model(
    path: PathLike,
    *,
    step: SupportsIndex | None = None,
    best: bool = False,
    ema: bool = False,
    imports: Sequence[str] = (),
    say: Say = print,
) -> TrainedModel:
    """Load the model of a run, or of a checkpoint file alone, to predict with it.

    Of a run: the newest good checkpoint, the one of `step`, or the `best` one, which
    `checkpoint.keep_best` keeps. `ema`: the moving average of the weights. A file may come from
    elsewhere, so the import path of a model of your own must be in `imports`. ConfigError if there
    is no model, CheckpointError if the checkpoint is refused.
    """
    selection = Selection(step=_step("step", step), best=best, average=ema, imports=tuple(imports))
    return load.load_model(_expand(path), selection, say)


def global_step(path: PathLike) -> int:
    """Return the global step of a checkpoint, or of a run's newest good one."""
    with inspect.open_path(_expand(path), print) as reader:
        return reader.header.global_step


def _read(reader: Reader, name: str, shape: tuple[int, ...], dtype: str) -> Array:
    array = np.empty(shape, dtype)
    reader.read_into(name, array)
    return array


def _document(
    config: PathLike | Mapping[str, Any], overrides: Mapping[str, Any] | None
) -> yaml.Document:
    if isinstance(config, Mapping):
        # through YAML, so that it is checked as a file is
        document = yaml.loads(yaml.dumps(_plain(config, "config")), "config")
    else:
        document = yaml.load(_expand(config))
    _override(document, overrides)
    return document


def _override(document: yaml.Document, overrides: Mapping[str, Any] | None) -> None:
    for key, value in (overrides or {}).items():
        document.put(str(key), _plain(value, f"overrides: {key}"), "overrides")


def _plain(value: Any, key: str) -> Any:
    """Return a value as a YAML file has it: NumPy values, paths and enums become plain."""
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
    raise ConfigError(
        in_one_line(f"{key}: {value!r} has type {kind}, which YAML cannot hold; use a plain value")
    )


def _step(name: str, value: SupportsIndex | None) -> int | None:
    """Return a number of steps as an int; ConfigError if it is not one."""
    return None if value is None else whole_number(name, value, 0, MAX_STEP)


def _stop(last_step: int | None, num_steps: int | None) -> StopConfig | None:
    if last_step is not None and num_steps is not None:
        raise ConfigError(
            "last_step and num_steps: give one (an absolute step, or steps from here)"
        )
    if last_step is None and num_steps is None:
        return None
    return StopConfig(last_step=last_step, num_steps=num_steps)


def _expand(path: PathLike) -> str:
    try:
        return expand_path(os.fspath(path))
    except ValueError as error:
        raise ConfigError(in_one_line(str(error))) from error


def _hold(context: contextlib.AbstractContextManager[Segment]) -> Run:
    with contextlib.ExitStack() as stack:
        segment = stack.enter_context(context)
        return Run(segment, stack.pop_all())
