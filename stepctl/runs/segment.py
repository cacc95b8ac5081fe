"""One invocation of train or resume: what it trains, and how it starts and ends."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stepctl import __version__
from stepctl.checkpoint.expected import skipped_checkpoints
from stepctl.checkpoint.store import Store
from stepctl.config.model import Config, ScriptConfig
from stepctl.errors import (
    StoppedAtOnce,
)
from stepctl.hooks.base import Hook
from stepctl.hooks.histograms import histogram_hooks
from stepctl.hooks.samples import Samples
from stepctl.hooks.slow_threads import SlowThreads
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger
from stepctl.rundir.mirror_status import is_mirrored
from stepctl.rundir.series import series_folder
from stepctl.runs.compatibility import StartFacts, report_inexact
from stepctl.runs.messages import Messages, Say
from stepctl.runs.open_segment import OpenSegment, Outcome, has_checkpoints
from stepctl.runs.publisher import Publisher
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopRule, first_reason
from stepctl.stopping.rules import StopAtStep, StopFile
from stepctl.stopping.signals import Signals
from stepctl.system import blas
from stepctl.system.closing import close_on_error
from stepctl.system.shell import command
from stepctl.system.text import counted
from stepctl.training.assembly import Assembly, TaskAssembly
from stepctl.training.compile_updates import compile_updates
from stepctl.training.ranks import start_ranks
from stepctl.writers.base import Writer
from stepctl.writers.evaluation_history import EvaluationHistory
from stepctl.writers.from_config import open_writers
from stepctl.writers.jsonl import JSONLines

if TYPE_CHECKING:
    from stepctl.mirror.claimed import ClaimedMirror
    from stepctl.runs.mirroring import Mirroring


class Segment:
    """A restored or fresh assembly, its locked run directory, and the step to train to.

    `ledger` are the run's parsed lines, `restored` the name of the restored checkpoint (None in a
    fresh run), and `facts` go into the segment's first ledger line. With `going_back` later
    checkpoints are set aside; with `strict` ranks that compute other bits are refused. With
    `take_over` the mirror is claimed even if its owner may be alive; `claimed` is a mirror that was
    claimed before.
    """

    def __init__(
        self,
        directory: RunDirectory,
        assembly: Assembly,
        say: Say,
        *,
        run_id: str,
        target: int,
        ledger: Ledger | None = None,
        restored: str | None = None,
        facts: StartFacts | None = None,
        going_back: bool = False,
        strict: bool = False,
        take_over: bool = False,
        claimed: ClaimedMirror | None = None,
    ) -> None:
        self.directory = directory
        self.assembly = assembly
        self.target = target
        self.restored = restored
        self.start = assembly.state.counters.global_step
        self.store = Store(directory.checkpoint_folder)
        stop_file = StopFile(directory.stop, shown=directory.display_path(directory.stop))
        at_target = StopAtStep(target)
        if isinstance(assembly.config, ScriptConfig):
            at_target = StopAtStep(target, remedy="more: raise last_step")
        self.rules: list[StopRule] = [at_target, stop_file, *assembly.stop_rules()]
        self._say = say
        self._run_id = run_id
        self._ledger = ledger or Ledger()
        self._facts = facts or {}
        self._going_back = going_back
        self._strict = strict
        self._take_over = take_over
        self._claimed = claimed

    @property
    def config(self) -> Config:
        """The resolved config."""
        return self.assembly.config

    @property
    def state(self) -> TrainState:
        """The training state."""
        return self.assembly.state

    @property
    def how_to_resume(self) -> str:
        """The end of a sentence that says how to continue the run."""
        if isinstance(self.config, ScriptConfig):
            return "by running the script again"
        return f"with: {command('resume', self.directory.path)}"

    @functools.cached_property
    def nothing_to_do(self) -> str | None:
        """The message of a segment that makes no step: why, and how to continue; None if it has work.

        The stop rules are asked once. A fresh run always has work: its initial checkpoint.
        """
        if self.restored is None:
            return None
        reason = first_reason(self.rules, self.state.counters)
        if reason is None:
            return None
        return reason.describe_nothing_to_do(self.start, self.target)

    def mirror_finished(self) -> None:
        """Mirror a run that has nothing to do, if its last segment did not: it was killed before."""
        newest = self._ledger.newest_checkpoint(self.start)
        if self.config.mirror is None or newest is None:
            return
        if is_mirrored(self.directory.folder, self.config.mirror.url, newest["sha256"]):
            return
        mirroring = self._start_mirroring(Messages(self._say))
        assert mirroring is not None
        with contextlib.closing(mirroring):
            mirroring.start(self.state)

    def train(
        self,
        writers: Sequence[Writer] = (),
        hooks: Sequence[Hook] = (),
        stop: Sequence[StopRule] = (),
        messages: Messages | None = None,
    ) -> Outcome:
        """Train to the target; all rows, checkpoints and ledger lines are on disk at the end.

        `writers` receive the rows too, `hooks` run after the segment's own, and `stop` are further
        stop rules.
        """
        running = None
        with Signals() as signals:
            try:
                with self.open(signals, writers, hooks, stop, messages) as running:
                    reason = running.trainer.run()
                outcome = running.finish(reason)
                signals.ignore_interrupts()
                return outcome
            except KeyboardInterrupt as error:
                if not has_checkpoints(self.store):
                    raise  # training has not begun
                if running is not None:
                    running.record_end("a second SIGINT")
                remedy = f"continue from the newest checkpoint {self.how_to_resume}"
                raise StoppedAtOnce(f"{self.directory.path}: stopped at once; {remedy}") from error

    @contextlib.contextmanager
    def open(
        self,
        signals: Signals,
        writers: Sequence[Writer] = (),
        hooks: Sequence[Hook] = (),
        stop: Sequence[StopRule] = (),
        messages: Messages | None = None,
    ) -> Iterator[OpenSegment]:
        """Record the segment's start, and yield it ready to train; close its files at the end.

        On an error the state is saved if the last step is complete, and the error is written to the
        ledger.
        """
        messages = messages or Messages(self._say)
        with close_on_error(self._start_mirroring(messages)) as mirroring:
            running = self._start(signals, writers, hooks, stop, messages, mirroring)
        process = os.getpid()
        try:
            yield running
            self.assembly.series.flush()
            self.assembly.rows.flush()
        except KeyboardInterrupt:
            running.background.abandon()
            running.close_mirror(0)
            raise
        except BaseException as error:
            if os.getpid() != process:  # a forked child leaves the run to its parent
                raise
            running.record_failure(error)
            running.close_mirror(0)  # if there was no last line
            explained = running.explain(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            if os.getpid() == process:
                running.background.close()
                running.report_saved()
                self.assembly.series.close()
                self.assembly.rows.close()

    def _start(
        self,
        signals: Signals,
        writers: Sequence[Writer],
        hooks: Sequence[Hook],
        stop: Sequence[StopRule],
        messages: Messages,
        mirroring: Mirroring | None,
    ) -> OpenSegment:
        """Start the other ranks, record the start, remove rows past it, and build the trainer."""
        facts = self._facts | self._start_ranks(messages)
        failure = compile_updates(self.assembly, self.target - self.start)
        if failure is not None:
            messages.say(
                f"note: the updates are not compiled ({failure}); NumPy gives the same bits. To "
                "remove this note: --set numerics.compiled=off"
            )
        later = {
            step: self.store.aside_name(step) for step in self.store.steps() if step > self.start
        }
        if self._going_back:
            facts["set_aside"] = list(later.values())
        # an error here comes before any change
        later_rows = self.directory.metrics_after(self.start)
        evaluations = self._earlier_evaluations()
        number = 1 + len(self._ledger.starts)
        if mirroring is not None:
            facts["mirror"] = mirroring.facts
        self._record_start(number, facts)
        if self._going_back and later:
            # recorded first: after a kill, the next resume sets aside the rest
            self.store.set_aside_all(later)
            names_aside = ", ".join(later.values())
            messages.say(
                f"going back to step {self.start}: later checkpoints are kept as {names_aside}"
            )
        later_rows.cut(messages.say)
        self._open_series(messages)
        beside = open_writers(
            self.directory,
            self.config.log,
            segment=number,
            start=self.start,
            batch_size=self.assembly.training.samples,
        )
        self.assembly.rows.open([JSONLines(self.directory), evaluations, *beside, *writers])
        publisher = Publisher(
            self.directory,
            self.store,
            self.assembly,
            run_id=self._run_id,
            evaluations=evaluations,
            protected=self._ledger.forks,  # no new fork while this process holds the run
            passed_over=skipped_checkpoints(self._ledger) | later.keys(),
            newest_step=None if self.restored is None else self.start,
            mirroring=mirroring,
        )
        own_hooks = [
            *self.assembly.hooks,
            *histogram_hooks(self.config.log, beside),
            *_samples_hooks(self.directory, self.assembly),
            *_slow_threads_hooks(self.directory, self.assembly, messages.say),
            *([] if mirroring is None else [mirroring]),
        ]
        return OpenSegment(
            self,
            number,
            publisher,
            signals,
            messages,
            mirroring,
            own_hooks=own_hooks,
            hooks=hooks,
            stop=stop,
        )

    def _start_mirroring(self, messages: Messages) -> Mirroring | None:
        """Claim the mirror, if the config has one."""
        if self.config.mirror is None:
            return None
        from stepctl.runs.mirroring import start_mirroring  # other runs do not load it

        return start_mirroring(
            self.directory,
            self.config.mirror,
            messages.say,
            run_id=self._run_id,
            ledger=self._ledger,
            start=None if self.restored is None else self.start,
            going_back=self._going_back,
            take_over=self._take_over,
            claimed=self._claimed,
        )

    def _earlier_evaluations(self) -> EvaluationHistory:
        """Return the evaluations of the checkpoints, if the best ones are to be kept."""
        if self.config.checkpoint.keep_best is None:
            return EvaluationHistory(())
        steps = {step for step in self.store.steps() if step <= self.start}
        rows = self.directory.read_metrics("eval")
        return EvaluationHistory(row for row in rows if row["step"] in steps)

    def _open_series(self, messages: Messages) -> None:
        """Cut the series back to the start, and report rows that are missing."""
        expected = self._ledger.series_rows(self.start)
        missing = self.assembly.series.open(series_folder(self.directory), expected)
        for name, n_rows in missing.items():
            messages.say(
                f"{self.directory.path}: series {name!r} lacks {counted(n_rows, 'row')} up to step "
                f"{self.start}; restore series/{name}.bin from a copy if there is one"
            )

    def _start_ranks(self, messages: Messages) -> StartFacts:
        """Give the other ranks rank 0's state, and return the facts about them for the ledger."""
        facts: StartFacts = {}
        differences = start_ranks(self.assembly, self.target - self.start)
        if differences:
            facts = report_inexact(differences, messages.say, strict=self._strict)
        if self.assembly.comm.size == 1:
            return facts
        mode = "async" if self.config.is_async else "sync"
        facts |= {"ranks": self.assembly.comm.size, "mode": mode}
        if mode == "async":
            messages.note(
                "note: asynchronous training: the order of the ranks' updates depends on timing, so "
                "no two runs end with the same bits"
            )
            facts |= {"exact": False, "inexact_because": ["asynchronous"]}
        return facts

    def _record_start(self, number: int, facts: StartFacts) -> None:
        if self._ledger.run_id is None:
            facts["run_id"] = self._run_id
        self.directory.append_ledger(
            "start",
            segment=number,
            step=self.start,
            target=self.target,
            restored=self.restored,
            host=os.uname().nodename,
            pid=os.getpid(),
            argv=sys.orig_argv if isinstance(self.config, ScriptConfig) else sys.argv,
            version=__version__,
            numerics=self.assembly.numerics,
            data=self.assembly.data_fingerprint(),
            **facts,
        )


def _slow_threads_hooks(directory: RunDirectory, assembly: Assembly, say: Say) -> list[Hook]:
    threads = assembly.numerics["threads"]
    if threads == 1 or isinstance(assembly.config, ScriptConfig):  # which sets its threads itself
        return []

    def warn(ratio: float) -> None:
        remedy = command("resume", directory.path, "--set", "numerics.threads=1")
        say(
            f"warning: {threads} BLAS threads are {ratio:.1f} times slower than one on this busy "
            "machine: start new runs with --set numerics.threads=1; on this run, no longer exact: "
            f"{remedy} --allow-change numerics.threads"
        )

    return [SlowThreads(lambda: blas.slowdown(threads), warn)]


def _samples_hooks(directory: RunDirectory, assembly: Assembly) -> list[Hook]:
    if not isinstance(assembly, TaskAssembly) or assembly.config.samples is None:
        return []
    task = assembly.task
    average = assembly.config.has_average

    def generate(state: TrainState, n: int) -> Array:
        samples = task.generate(state, n, average=average)
        assert samples is not None
        return samples

    folder = directory.folder.subfolder(directory.samples.name)
    return [
        Samples(
            assembly.config.samples, generate, folder, sample_shape=assembly.sources[0].sample_shape
        )
    ]
