"""A loop in a user's script that is saved and continued.

state = {"x": np.zeros(3)}
with stepctl.loop("runs/walk", state, last_step=1000) as run:
    for step in run:  # 0, 1, ... or where the run stopped
        state["x"] += run.rng("noise").standard_normal(3)
        run.log(radius=np.linalg.norm(state["x"]))
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stepctl.config import yaml
from stepctl.config.model import Config, ScriptConfig, StopConfig, parse_config
from stepctl.distributed.launcher import refuse_job
from stepctl.errors import ConfigError, Exit, RunExistsError, StepctlError, TornUpdate
from stepctl.hooks.base import Hook, has_state
from stepctl.programs.base import Metrics, as_numbers
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import resume_locked, start_segment
from stepctl.runs.open_segment import OpenSegment
from stepctl.runs.progress import show_progress
from stepctl.runs.records import lock_records
from stepctl.runs.segment import Segment
from stepctl.state.arena import Array
from stepctl.state.counters import GLOBAL_STEP, SAMPLES_SEEN
from stepctl.state.streams import Streams
from stepctl.stopping.base import StopReason
from stepctl.stopping.signals import Signals
from stepctl.system.arguments import MAX_STEP, whole_number
from stepctl.system.files import expand_path
from stepctl.system.terminal import is_notebook, say
from stepctl.system.text import a_or_an, local_step_note
from stepctl.system.user_code import describe_with_type
from stepctl.training.build_program import ProgramAssembly, assemble_script
from stepctl.training.trainer import Trainer, Update
from stepctl.writers.series import as_row

if TYPE_CHECKING:
    from stepctl.mirror.claimed import ClaimedMirror

REPLAY_VARIABLE = "STEPCTL_REPLAY"  # of the environment of a script that is replayed
_INCREMENTS = {GLOBAL_STEP: 1, SAMPLES_SEEN: 0}
_MAX_SEED = (1 << 63) - 1
_MAX_EVERY = (1 << 31) - 1
_N_WITHOUT_ROW = 10  # after how many rows without metrics there is a warning


def loop(
    run_dir: str | os.PathLike[str],
    state: dict[str, Any],
    *,
    last_step: int,
    seed: int = 0,
    checkpoint_every: int | None = 100,
    keep_last: int | None = 3,
    log_every: int = 1,
    hooks: Sequence[Hook] = (),
    mirror: str | Mapping[str, Any] | None = None,
) -> Loop:
    """Return a loop whose steps are counted, saved and continued, as a context manager.

    The script runs again to continue. `state` must hold everything that later steps depend on:
    arrays, numbers, text, lists, dicts, NumPy generators, and objects with `state_dict` and
    `load_state_dict`. A resume fills it in place, or rebinds a key where an array's shape differs.

    Args:
        run_dir: The run directory, which is created, or continued.
        state: The state before the first step.
        last_step: The global step to stop at; a later call may raise it.
        seed: Seed of `rng`.
        checkpoint_every: Number of steps between two checkpoints; None: only at the end.
        keep_last: Number of newest checkpoints to keep; None keeps all.
        log_every: Number of steps between two metrics rows.
        hooks: Your own hooks.
        mirror: URL of a copy of the run in object storage, or a mapping with the keys of the config's
            section `mirror`. A run that is not in the directory is fetched from there.

    Raises ConfigError if an argument is wrong. Entering raises ConfigError if the state is wrong,
    CheckpointError if no checkpoint can be used, RunInUseError if another process holds the run.
    """
    if checkpoint_every is not None:
        checkpoint_every = whole_number(
            "stepctl.loop: checkpoint_every", checkpoint_every, 1, _MAX_EVERY
        )
    if keep_last is not None:
        keep_last = whole_number("stepctl.loop: keep_last", keep_last, 1, _MAX_EVERY)
    config = {
        "seed": whole_number("stepctl.loop: seed", seed, 0, _MAX_SEED),
        "script": _script_name(),
        "stop": {"last_step": whole_number("stepctl.loop: last_step", last_step, 0, MAX_STEP)},
        "log": {"every": whole_number("stepctl.loop: log_every", log_every, 1, _MAX_EVERY)},
        "checkpoint": {"every": checkpoint_every, "keep_last": keep_last},
        "mirror": _mirror_section(mirror),
    }
    if not isinstance(run_dir, str | os.PathLike):
        raise ConfigError(f"stepctl.loop: run_dir is {_kind(run_dir)}; give a path")
    if not isinstance(state, dict):
        raise ConfigError(f"stepctl.loop: state is {_kind(state)}; give a dict")
    if not isinstance(hooks, list | tuple):
        raise ConfigError(f"stepctl.loop: hooks is {_kind(hooks)}; give a list of hooks")
    return Loop(run_dir, state, config, hooks)


def _mirror_section(mirror: object) -> dict[str, Any] | None:
    if mirror is None:
        return None
    if isinstance(mirror, str):
        return {"url": mirror}
    if not isinstance(mirror, Mapping):
        raise ConfigError(f"stepctl.loop: mirror is {_kind(mirror)}; give a URL")
    return dict(mirror)


def _kind(value: object) -> str:
    return a_or_an(type(value).__name__)


class Loop:
    """A run whose steps the body of a `for` statement makes.

    A step is complete when the body has ended: then it is counted, its metrics are logged, and the
    state is saved where a checkpoint is due. A step that `break` or an exception leaves is not
    complete, and nothing of it is saved. A stop signal ends the loop between two steps, after a
    checkpoint, with SystemExit(75); Ctrl-C with KeyboardInterrupt.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        state: dict[str, Any],
        config: dict[str, Any],
        hooks: Sequence[Hook],
    ) -> None:
        self._directory = RunDirectory(expand_path(os.fspath(run_dir)))
        self._config = config
        self._state = state
        self._hooks = hooks
        self._held = contextlib.ExitStack()  # the lock
        self._handled = contextlib.ExitStack()  # the signal handlers
        self._open = contextlib.ExitStack()  # the segment
        self._segment: Segment | None = None
        self._running: OpenSegment | None = None
        self._signals = Signals()
        self._in_step = False
        self._has_begun = False  # whether the loop began
        self._save_requested = False
        self._metrics: Metrics = {}
        self._rows: dict[str, Array] = {}  # of series
        self._process = os.getpid()

    def __repr__(self) -> str:
        if self._segment is None:
            return f"Loop({str(self.path)!r})"
        return f"Loop({str(self.path)!r}, global step {self.global_step} of {self._segment.target})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._directory.path

    @property
    def global_step(self) -> int:
        """The number of completed steps."""
        return self._entered().state.counters.global_step

    @property
    def rng(self) -> Streams:
        """The random streams: `rng(name)` returns the generator of one, in a step.

        Its draws depend on seed, name and step alone.
        """
        if self._segment is None:
            self._entered()  # raises an error
        return self._streams

    def log(self, metrics: Mapping[str, float] | None = None, /, **more: float) -> None:
        """Add metrics, which are numbers, to this step's row."""
        self._check_in_step("log")
        if metrics is not None:
            self._add_metrics(metrics)
        if more:
            self._add_metrics(more)

    def _add_metrics(self, added: object) -> None:
        metrics = as_numbers(added, "run.log was given")
        if self._metrics:
            repeated = self._metrics.keys() & metrics.keys()
            if repeated:
                raise ConfigError(f"run.log: {min(repeated)!r} is logged twice in this step")
        self._metrics |= metrics

    def append(self, name: str, row: Any) -> None:
        """Append a row to a series: at most one a step, all of one dtype and shape."""
        self._check_in_step("append")
        if name in self._rows:
            raise ConfigError(f"run.append: {name!r} has a row already in this step")
        self._rows[name] = as_row(name, row).copy()  # the script may change it in this step

    def save(self) -> None:
        """Publish a checkpoint when the step in flight is complete.

        Before and after the loop nothing is to be done: the state is that of the newest checkpoint.
        """
        self._entered()
        # only a request: another thread may call this while the next step begins
        self._save_requested = self._has_begun

    def stop(self, reason: str) -> None:
        """Complete this step, then end the loop; the run stays finished."""
        self._check_in_step("stop")
        if not isinstance(reason, str) or not reason.strip("\0 "):
            raise ConfigError(f"run.stop({reason!r}): give the reason as text")
        self._assembly.stop_request.request(reason)
        assert self._running is not None
        self._running.trainer.request_check()

    def __enter__(self) -> Self:
        if self._segment is not None:
            raise StepctlError(f"{self.path}: a loop is entered once; call stepctl.loop again")
        refuse_job()
        with contextlib.ExitStack() as held:
            segment = self._hold(held)
            assert isinstance(segment.assembly, ProgramAssembly)
            self._segment = segment
            self._assembly = segment.assembly
            self._streams: Streams = segment.assembly.task.step_streams
            self._start(segment)
            self._held = held.pop_all()
        return self

    def _hold(self, held: contextlib.ExitStack) -> Segment:
        """Create the run, or resume it; `held` releases it."""
        replay = _requested_replay(self._directory)
        self._is_replay = replay is not None
        if replay is not None:
            self._directory = RunDirectory(replay["directory"])
            self._config["stop"] = {"last_step": replay["last_step"]}
            self._config["checkpoint"]["keep_last"] = None
            self._config["mirror"] = None
            self._hooks = [hook for hook in self._hooks if has_state(hook)]
        claimed = None
        if not self._directory.holds_run():
            config = _parse(yaml.Document(self._config, {(): "stepctl.loop"}))
            claimed = self._fetch(config, held)
            if claimed is None:
                assembly = assemble_script(config, self._state, self._hooks, record_numerics=True)
                try:
                    return held.enter_context(start_segment(assembly, self._directory, say))
                except RunExistsError:  # another process was faster
                    if not self._directory.holds_run():
                        raise
        records = held.enter_context(lock_records(self._directory, say))
        options = self._resume_options(records.document)._replace(claimed=claimed)
        return held.enter_context(resume_locked(records, options, say, build=self._build))

    def _fetch(self, config: Config, held: contextlib.ExitStack) -> ClaimedMirror | None:
        """Fetch the run from its mirror, if there is one that holds it."""
        if config.mirror is None:
            return None
        from stepctl.mirror.claimed import pulled_run

        pulled = pulled_run(config.mirror.url, self._directory, say, take_over=False)
        return held.enter_context(pulled)

    def _resume_options(self, recorded: yaml.Document) -> ResumeOptions:
        plain = recorded.value
        if not isinstance(plain, dict) or "script" not in plain:
            raise ConfigError(
                f"{self.path}: is not the run of a script; give another directory, or continue it "
                "with stepctl.resume"
            )
        config = plain | self._config
        document = yaml.Document(config, {(): "stepctl.loop"})
        stop = StopConfig(last_step=_parse(document).stop.last_step)
        return ResumeOptions(document=document, stop=stop)

    def _build(self, config: Config) -> ProgramAssembly:
        assert isinstance(config, ScriptConfig)
        return assemble_script(config, self._state, self._hooks)

    def _start(self, segment: Segment) -> None:
        """Start the segment, unless there is no step to make."""
        if segment.nothing_to_do is not None:
            segment.mirror_finished()
            say(f"{self.path}: {segment.nothing_to_do}")
            return
        source = segment.restored or "the initial state"
        say(f"{self.path}: global step {segment.start} to {segment.target}, from {source}")
        self._unseen_metrics = _UnseenMetrics(segment)
        with contextlib.ExitStack() as handled, contextlib.ExitStack() as opened:
            handled.enter_context(self._signals)
            progress = opened.enter_context(show_progress(segment, quiet=False, verbose=False))
            self._running = opened.enter_context(
                segment.open(
                    self._signals, progress.writers, progress.hooks, messages=progress.messages
                )
            )
            self._running.trainer.start()
            self._open = opened.pop_all()
            self._handled = handled.pop_all()

    def __iter__(self) -> Iterator[int]:
        self._entered()
        if self._in_step:
            raise StepctlError(
                f"{self.path}: there is a step that did not end, so no other can begin: a loop has "
                "one `for` statement, and after a break the script must be run again"
            )
        running = self._running
        if running is None:  # there is no step to make
            return
        trainer = running.trainer
        counters = self._assembly.state.counters
        self._has_begun = True
        while True:
            if trainer.is_due:
                reason = trainer.stop_reason()
                if reason is not None:
                    self._end(running, reason)
                    return
            step = counters.global_step
            self._begin_step(step)
            yield step
            self._complete_step(running, trainer)

    def _begin_step(self, step: int) -> None:
        self._in_step = True
        self._metrics = {}
        self._rows = {}
        self._streams.begin_step(step)

    def _complete_step(self, running: OpenSegment, trainer: Trainer) -> None:
        if os.getpid() != self._process:
            raise StepctlError(
                f"{self.path}: a forked child came to the end of the step; end it in the step"
            )
        if self._rows:
            self._assembly.series.add(self.global_step + 1, self._rows)
        self._streams.end_step()
        self._in_step = False
        metrics = self._metrics
        trainer.complete_update(Update(metrics, _INCREMENTS))
        if metrics and self._unseen_metrics.may_warn:
            self._unseen_metrics.after_step()
        if self._save_requested:
            self._save_requested = False
            running.saver.save_now(self._assembly.state)

    def _end(self, running: OpenSegment, reason: StopReason) -> None:
        """End the segment; after a signal, raise SystemExit or KeyboardInterrupt."""
        running.trainer.end(reason)
        self._open.close()
        running.finish(reason)
        self._running = None
        self._handled.close()  # the code after the loop has its own
        self._report_end(reason)
        if self._is_replay:
            raise SystemExit(0)  # the code after the loop is not for a replay
        received = self._signals.received
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        if received is not None or not reason.done:
            raise SystemExit(int(Exit.STOPPED))

    def _report_end(self, reason: StopReason) -> None:
        segment = self._entered()
        step = self.global_step
        if reason.done and segment.restored is None:
            self._unseen_metrics.warn()
        if reason.done and step >= segment.target:
            note = local_step_note(step, segment.start)
            say(f"{self.path}: done at global step {step}{note}")
            return
        remedy = reason.remedy or f"continue {segment.how_to_resume}"
        say(f"{self.path}: stopped at global step {step} ({reason.text}); {remedy}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._process:
            return  # a forked child leaves the run to its parent
        with self._held, self._handled:
            running = self._running
            self._running = None
            if running is None:
                return
            if self._in_step:
                self._fail(_torn(self.global_step + 1, error))
            elif isinstance(error, KeyboardInterrupt):
                self._fail(error)
                running.record_end("a second SIGINT")
                remedy = f"continue from the newest checkpoint {self._entered().how_to_resume}"
                say(f"{self.path}: stopped at once; {remedy}")
            elif error is not None:
                self._fail(error)
            else:  # the loop was not begun
                reason = StopReason("closed", done=False)
                running.trainer.end(reason)
                self._open.close()
                running.finish(reason)

    def _fail(self, error: BaseException) -> None:
        """End the segment with an error, and say how to continue."""
        try:
            self._open.__exit__(type(error), error, error.__traceback__)
        except TornUpdate as explained:
            say(f"{self.path}: {explained}")
        except BaseException as raised:
            if raised is not error:
                raise

    def _entered(self) -> Segment:
        """Return the segment; StepctlError before the loop is entered."""
        if self._segment is None:
            raise StepctlError("a loop is used as: with stepctl.loop(...) as run: for step in run:")
        return self._segment

    def _check_in_step(self, method: str) -> None:
        if not self._in_step:
            raise StepctlError(f"run.{method} is called outside of a step; call it in the loop")


class _UnseenMetrics:
    """The steps whose metrics are in no row, because they are not multiples of log_every."""

    def __init__(self, segment: Segment) -> None:
        log = segment.config.log
        self._path = segment.directory.path
        self._counters = segment.state.counters
        self._fires = log.cadence(segment.config.initial_step + 1).fires
        self._every = log.every
        self._warn_from = segment.start + _N_WITHOUT_ROW * log.every
        self._n_steps = 0
        self.may_warn = True

    def after_step(self) -> None:
        """Count a step with metrics; warn once if there are many, and none of them has a row."""
        if self._fires(self._counters):
            self.may_warn = False
            return
        self._n_steps += 1
        is_late = self._counters.global_step >= self._warn_from
        if is_late and self._n_steps >= _N_WITHOUT_ROW:
            self.warn()

    def warn(self) -> None:
        """Warn if there were such steps and nothing else."""
        if not self.may_warn or not self._n_steps:
            return
        self.may_warn = False
        say(
            f"warning: {self._path}: no metrics of run.log are in a row so far: it was called in "
            f"{self._n_steps} steps, and never at a multiple of log_every {self._every}; call it in "
            "every step, or lower log_every"
        )


def _parse(document: yaml.Document) -> ScriptConfig:
    config = parse_config(document)
    assert isinstance(config, ScriptConfig)
    return config


def _torn(step: int, error: BaseException | None) -> TornUpdate:
    if error is None:
        return TornUpdate(f"step {step} was left before its end")
    if isinstance(error, KeyboardInterrupt):
        return TornUpdate(f"step {step} was interrupted")
    return TornUpdate(f"step {step} failed halfway: {describe_with_type(error)}")


def _script_name() -> str:
    """Return the name of the running script."""
    if is_notebook():
        return "notebook"
    return os.path.basename(sys.argv[0]) or "python"


def _requested_replay(directory: RunDirectory) -> dict[str, Any] | None:
    """Return the replay that the environment requests; ConfigError if it is of another run."""
    text = os.environ.get(REPLAY_VARIABLE)
    if text is None:
        return None
    replay: dict[str, Any] = json.loads(text)
    if os.path.realpath(replay["run"]) != os.path.realpath(directory.folder.path):
        raise ConfigError(
            f"{directory.path}: the script opens this run, and the replay is of {replay['run']}; nothing "
            "is written: give the script the run directory of the replay"
        )
    return replay
