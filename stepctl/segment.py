"""One invocation of train or resume, from its first line in the ledger to its last."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stepctl import __version__, numerics, rundir
from stepctl.arena import Array
from stepctl.assembly import Assembly
from stepctl.checkpoint import codec, names
from stepctl.checkpoint.background import Background
from stepctl.checkpoint.expected import passed_over
from stepctl.checkpoint.store import Store
from stepctl.errors import (
    NonFiniteError,
    NumericsError,
    RunMovedError,
    StepctlError,
    StoppedAtOnce,
    TornUpdate,
    UnreadableError,
)
from stepctl.hooks.base import Hook, StopReason
from stepctl.hooks.histograms import histograms_of
from stepctl.hooks.samples import Samples
from stepctl.hooks.save import Save
from stepctl.hooks.signals import Signals
from stepctl.hooks.slow_threads import SlowThreads
from stepctl.hooks.stop import StopAtStep, StopFile
from stepctl.problems import in_one_line
from stepctl.ranks import leader, muster
from stepctl.rundir import RunDirectory
from stepctl.shell import command
from stepctl.state import TrainState
from stepctl.trainer import StopRule, Trainer
from stepctl.writers.base import Writer
from stepctl.writers.beside import open_beside
from stepctl.writers.evaluations import Evaluations
from stepctl.writers.jsonl import JSONLines

Say = Callable[[str], None]


def silent(message: str) -> None:
    """Say nothing."""


def inexact(differences: list[str], strict: bool, say: Say) -> dict[str, Any]:
    """Warn that other bits result here, and return the ledger's facts; NumericsError if strict."""
    words = "; ".join(differences)
    if strict:
        raise NumericsError(f"not exact here: {words}; resume where they agree, or drop --strict-numerics")
    say(f"warning: no longer exact: other bits result here ({words}); the ledger records it")
    return {"exact": False, "inexact_because": differences}


@dataclass(frozen=True)
class Outcome:
    """How a segment ended; `saves`, and the `waits` of training for a save before."""

    reason: StopReason
    start: int
    step: int
    saves: int
    waits: int
    wait_seconds: float


class Segment:
    """An assembly, its run directory (locked), and its target."""

    def __init__(
        self, directory: RunDirectory, assembly: Assembly, say: Say, *, run_id: str, target: int, restored: str | None
    ) -> None:
        self.directory, self.assembly, self.say, self.target = directory, assembly, say, target
        self.config, self.state = assembly.config, assembly.state
        self.start = assembly.state.counters.global_step
        self.store = Store(directory.checkpoint_folder)
        self.restored = restored
        stop_file = StopFile(directory.stop, shown=directory.shown(directory.stop))
        self.rules: list[StopRule] = [StopAtStep(target), stop_file, *assembly.stop_rules()]
        self.facts: dict[str, Any] = {}  # for the ledger
        self.strict = False  # whether other last bits than the checkpoint's are refused
        self.goes_back = False  # whether later checkpoints are set aside as it begins
        self.note: Say = silent  # told what is good to know
        self.report: Say = silent  # told of each checkpoint
        self._background, self._saved, self._number = Background(), deque[str](), 0  # anew for each `train`
        self._newest: int | None = None  # the step of the newest checkpoint that is good
        self._unsaid = deque[dict[str, Any]]()  # lines of checkpoints that the ledger does not have yet
        self._forked: Collection[int] = ()  # steps that forks began at
        self._passed_over: set[int] = set()  # steps whose files a resume did not use
        self._texts = {
            "run": directory.name,
            "run_id": run_id,
            "config": self.config.text,
            "numerics": json.dumps(assembly.numerics),
        }

    def nothing_to_do(self) -> str | None:
        """Return why a stop rule lets this segment make no step, and how to go on all the same; None if it has work.

        The rules are asked once, so that all who ask hear the same. A fresh run has its first checkpoint to make.
        """
        return self._nothing_to_do

    @functools.cached_property
    def _nothing_to_do(self) -> str | None:
        if self.restored is None:
            return None
        reasons = (rule.reason(self.state.counters) for rule in self.rules)
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None:
            return None
        text = "" if self.start >= self.target else reason.text  # the target is said anyway
        return "; ".join(filter(None, (text, reason.remedy)))

    def train(
        self, writers: Sequence[Writer] = (), hooks: Sequence[Hook] = (), stop: Sequence[StopRule] = ()
    ) -> Outcome:
        """Run to the target; every row, checkpoint and end is on disk when this returns.

        `writers` get the rows beside metrics.jsonl; `hooks` run after the segment's own; `stop` are further
        reasons to stop before the target.
        """
        with Signals() as signals:
            try:
                outcome = self._train(signals, writers, hooks, stop)
                signals.ignore()
                return outcome
            except KeyboardInterrupt as error:
                if not self._has_checkpoints():
                    raise  # nothing was begun
                self.record_end("a second SIGINT")
                path = self.directory.path
                remedy = f"go on from the newest checkpoint with: {command('resume', path)}"
                raise StoppedAtOnce(f"{path}: stopped at once; {remedy}") from error

    def _train(
        self, signals: Signals, writers: Sequence[Writer], hooks: Sequence[Hook], stop: Sequence[StopRule]
    ) -> Outcome:
        with self.opened(signals, writers, hooks, stop) as trainer:
            reason = trainer.run()
        return self.ended(trainer, reason)

    @contextlib.contextmanager
    def opened(
        self,
        signals: Signals | None = None,
        writers: Sequence[Writer] = (),
        hooks: Sequence[Hook] = (),
        stop: Sequence[StopRule] = (),
    ) -> Iterator[Trainer]:
        """Begin: record it, open the writers, and yield the trainer; close them whatever happens.

        What is raised in between saves the state, if it is that of a whole step, and is recorded.
        """
        self._background = Background()
        self._newest = None if self.restored is None else self.start
        if differences := muster(self.assembly):
            self.facts |= inexact(differences, self.strict, self.say)
        if self.assembly.comm.size > 1:
            mode = self.config.distributed.mode
            self.facts |= {"ranks": self.assembly.comm.size, "mode": mode}
            if mode == "async":
                self.note("note: asynchronous: the ranks' updates come in another order each time, and so do the bits")
                self.facts |= {"exact": False, "inexact_because": ["asynchronous"]}
        asides = {step: self.store.aside_name(step) for step in self.store.steps() if step > self.start}
        if self.goes_back:
            self.facts["set_aside"] = list(asides.values())
        earlier_rows = self.directory.read_metrics()  # what cannot be read is found before anything is written
        self._record_start()
        self._passed_over |= asides.keys()
        if self.goes_back and asides:  # recorded first: a resume after a kill sets aside what is left of them
            self.store.set_aside_all(asides)
            self.say(f"going back to step {self.start}: later checkpoints are kept as {', '.join(asides.values())}")
        self.directory.cut_metrics(self.start, self.say)
        evaluations = Evaluations(row for row in earlier_rows if row["step"] <= self.start)
        beside = self._writers_beside()
        rows = self.assembly.rows
        rows.open([JSONLines(self.directory), evaluations, *beside, *writers])
        signals = signals or Signals()
        self.saver = self._save_hook(evaluations, signals)
        asked = [*histograms_of(self.config.log, beside), *self._samples(), *self._slow_threads()]
        trainer = leader(
            self.assembly,
            rules=[*self.rules, signals, *stop],
            hooks=[*self.assembly.hooks, *asked, self.saver, *hooks],
            signals=signals,
            skip=self._skip if self.config.on_nonfinite == "skip" else None,
            target=self.target,
        )
        process = os.getpid()
        try:
            yield trainer
            rows.flush()
        except KeyboardInterrupt:
            self._background.abandon()
            raise
        except NonFiniteError as error:
            self._failed(trainer, self.saver, error)
            raise NonFiniteError(f"{error}; {self._without_non_finite()}") from error
        except TornUpdate as error:
            self._failed(trainer, self.saver, error)
            raise TornUpdate(f"{in_one_line(str(error))}; no whole state is left to save: {self._go_on()}") from error
        except BaseException as error:
            if os.getpid() == process:  # a forked child that ends in here leaves the run to its parent
                self._failed(trainer, self.saver, error)
            raise
        finally:
            if os.getpid() == process:
                self._background.close()
                self._report_saved()
                rows.close()

    def _failed(self, trainer: Trainer, save: Save, error: BaseException) -> None:
        if isinstance(error, RunMovedError):
            return  # there is nothing left to write in
        if isinstance(error, TornUpdate):
            with contextlib.suppress(Exception):  # of a save in flight
                save.finish()
        else:
            self.save_what_stands(trainer, save)
        with contextlib.suppress(StepctlError):  # the disk may be what failed
            self.record_end(f"{type(error).__name__}: {error}")

    def _go_on(self) -> str:
        """Return from which checkpoint the run goes on, and with it what steps are lost."""
        step, newest = self.state.counters.global_step, self._newest
        if newest is None:
            return "no checkpoint is there yet: start again with: stepctl train"
        go_on = f"go on from {names.file_name(newest)} with: {command('resume', self.directory.path)}"
        if step == newest:
            return go_on
        lost = f"step {step} is" if step == newest + 1 else f"steps {newest + 1} to {step} are"
        return f"{lost} lost; {go_on}"

    def _has_checkpoints(self) -> bool:
        """Tell whether the run has a checkpoint; what cannot be listed now may hold one."""
        try:
            return bool(self.store.steps())
        except UnreadableError:
            return True

    def _without_non_finite(self) -> str:
        if not self._has_checkpoints():
            return "mend what the model begins with, then start again with: stepctl train"
        path = self.directory.path
        skip = ""
        if self.config.on_nonfinite != "skip":
            skip = f", or pass over such batches: {command('resume', path, '--set', 'on_nonfinite=skip')}"
        key = "optimizer.clip_norm" if self.config.optimizer.name else "optimizer"
        clip = command("resume", path, "--set", f"{key}=...", "--allow-change", key)
        return f"lower the learning rate or clip the gradient: {clip}{skip}"

    def ended(self, trainer: Trainer, reason: StopReason) -> Outcome:
        """Record the end of what was `opened`, once it is closed."""
        save = self.saver
        waits = {"waits": save.waits, "wait_seconds": round(save.wait_seconds, 3)} if save.waits else {}
        self.record_end(reason.text, done=reason.done, **waits, **trainer.facts)
        step = self.state.counters.global_step
        return Outcome(reason, self.start, step, save.saves, save.waits, save.wait_seconds)

    def _slow_threads(self) -> list[Hook]:
        threads = self.assembly.numerics["threads"]
        if threads == 1:
            return []

        def warn(ratio: float) -> None:
            remedy = command("resume", self.directory.path, "--set", "numerics.threads=1")
            self.say(
                f"warning: {threads} BLAS threads are {ratio:.1f} times slower than one on this busy machine: start "
                f"new runs with --set numerics.threads=1; on this run, no longer exact: {remedy} "
                "--allow-change numerics.threads"
            )

        return [SlowThreads(lambda: numerics.slowdown(threads), warn)]

    def _writers_beside(self) -> list[Writer]:
        log, samples = self.config.log, self.assembly.training.samples
        return open_beside(self.directory, log, segment=self._number, start=self.start, batch_size=samples)

    def _samples(self) -> list[Hook]:
        if self.config.samples is None:
            return []
        task, average = self.assembly.task, self.config.ema is not None

        def generate(state: TrainState, n: int) -> Array:
            made = task.generate(state, n, average=average)
            assert made is not None
            return made

        folder = self.directory.folder.subfolder(self.directory.samples.name)
        shape = self.assembly.sources[0].sample_shape
        return [Samples(self.config.samples, generate, folder, sample_shape=shape)]

    def _save_hook(self, evaluations: Evaluations, signals: Signals) -> Save:
        def save(state: TrainState) -> None:
            # rows up to this step must survive whatever the checkpoint survives
            self.assembly.rows.sync()
            self._publish(state, evaluations)

        return Save(
            self.config.checkpoint,
            save,
            flush=self.assembly.rows.flush,
            background=self._background,
            requested=signals.save_requested,
            report=self._report_saved,
            say=self.say,
            note=self.note,
            saved_step=self.start if self.restored else None,
            target=self.target,
        )

    def _report_saved(self) -> None:
        while self._saved:
            self.report(f"saved {self._saved.popleft()}")

    def _publish(self, state: TrainState, evaluations: Evaluations) -> None:
        # on the background's thread
        step = state.counters.global_step
        if (bad := state.first_non_finite()) is not None:
            raise NonFiniteError(f"step {step}: /{bad} holds NaN or infinity; not saved")
        if not any(line["step"] == step for line in self._unsaid):  # else it is published, and has no line yet
            digest = self.store.publish(step, codec.encode(state, **self._texts), self._background.abandoned)
            self._passed_over.discard(step)
            pruned = self.store.to_prune(
                step, self.config.checkpoint, evaluations.rows, self._forked, self._passed_over
            )
            self._unsaid.append({"step": step, "file": names.file_name(step), "sha256": digest, "pruned": pruned})
        while self._unsaid:  # first of those whose line found no room on the disk
            self.directory.append_ledger("checkpoint", **self._unsaid[0])
            line = self._unsaid.popleft()
            self._newest = line["step"]
            self._saved.append(line["file"])
            self.store.remove(line["pruned"])

    def save_what_stands(self, trainer: Trainer, save: Save) -> None:
        """Publish the state if it is that of a whole step; say what is saved, or which steps are lost."""
        with contextlib.suppress(Exception):  # of a save in flight; the first error is the one to tell
            save.finish()
        path, step = self.directory.path, self.state.counters.global_step
        if not trainer.complete:
            if self._newest is not None and self._newest < step:
                self.say(f"{path}: {self._go_on()}")
            return
        try:
            save.now(self.state)
        except Exception as error:
            self.say(f"{path}: the state of global step {step} could not be saved ({error}): {self._go_on()}")
        else:
            self.say(f"{path}: the state of global step {step} is saved")

    def _skip(self, why: str) -> None:
        self.say(f"{why}; this batch is skipped")

    def _record_start(self) -> None:
        ledger = self.directory.read_ledger()
        self._number = 1 + sum(row["event"] == "start" for row in ledger)
        self._passed_over = passed_over(ledger)
        self._forked = rundir.forks(ledger).keys()  # none can come while this process holds the run
        if self.directory.records().run_id is None:
            self.facts["run_id"] = self._texts["run_id"]
        holder = {"host": os.uname().nodename, "pid": os.getpid(), "argv": sys.argv, "version": __version__}
        self.directory.append_ledger(
            "start",
            segment=self._number,
            step=self.start,
            target=self.target,
            restored=self.restored,
            **holder,
            numerics=self.assembly.numerics,
            data=self.assembly.data_fingerprint,
            **self.facts,
        )

    def record_end(self, reason: str, *, done: bool = False, **facts: Any) -> None:
        """Add the line of this segment's end to the ledger."""
        step = self.state.counters.global_step
        facts = {"step": step, "local_step": step - self.start, "reason": reason, "done": done, **facts}
        self.directory.append_ledger("end", segment=self._number, **facts)
