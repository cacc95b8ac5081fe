"""A segment in progress: its trainer, its saves, its last ledger line, and what its errors mean."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepctl.checkpoint import names
from stepctl.checkpoint.background import Background
from stepctl.checkpoint.store import Store
from stepctl.config.model import TaskConfig
from stepctl.errors import (
    NonFiniteError,
    RunMovedError,
    StepctlError,
    TornUpdate,
    UnreadableError,
)
from stepctl.hooks.base import Hook
from stepctl.hooks.save import Save
from stepctl.runs.messages import Messages
from stepctl.runs.publisher import Publisher
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason, StopRule
from stepctl.stopping.signals import Signals
from stepctl.system.shell import command
from stepctl.system.text import in_one_line
from stepctl.training.ranks import leader
from stepctl.training.trainer import Trainer

if TYPE_CHECKING:
    from stepctl.runs.mirroring import Mirroring
    from stepctl.runs.segment import Segment


@dataclass(frozen=True)
class Outcome:
    """How a segment ended. `waits` counts the saves that waited for the previous one."""

    reason: StopReason
    start: int
    step: int
    saves: int
    waits: int
    wait_seconds: float


class OpenSegment:
    """A segment in progress: its trainer, its saves, and its lines in the ledger."""

    def __init__(
        self,
        segment: Segment,
        number: int,
        publisher: Publisher,
        signals: Signals,
        messages: Messages,
        mirroring: Mirroring | None,
        *,
        own_hooks: Sequence[Hook],
        hooks: Sequence[Hook],
        stop: Sequence[StopRule],
    ) -> None:
        self._segment = segment
        self._number = number
        self._publisher = publisher
        self._messages = messages
        self._mirroring = mirroring
        self.background = Background()
        rows = segment.assembly.rows
        series = segment.assembly.series
        config = segment.config

        def flush() -> None:
            rows.flush()
            series.flush()

        def publish(state: TrainState) -> None:
            rows.sync()  # rows up to this step must be as durable as the checkpoint
            series.sync()
            publisher.publish(state, self.background.abandoned)

        self.saver = Save(
            config.checkpoint,
            publish,
            flush=flush,
            background=self.background,
            requested=signals.take_save_request,
            report=self.report_saved,
            say=messages.say,
            note=messages.note,
            saved_step=publisher.newest_step,
            target=segment.target,
        )
        self.trainer: Trainer = leader(
            segment.assembly,
            rules=[*segment.rules, signals, *stop],
            hooks=[*own_hooks, self.saver, *hooks],
            signals=signals,
            skip=self._report_skipped if config.skips_non_finite else None,
            target=segment.target,
        )

    def finish(self, reason: StopReason) -> Outcome:
        """Record the end of the segment, after it was closed."""
        saver = self.saver
        waits: dict[str, Any] = {}
        if saver.waits:
            waits = {"waits": saver.waits, "wait_seconds": round(saver.wait_seconds, 3)}
        self.record_end(reason.text, done=reason.done, **waits, **self.trainer.facts)
        step = self._segment.state.counters.global_step
        start = self._segment.start
        return Outcome(reason, start, step, saver.saves, saver.waits, saver.wait_seconds)

    def record_end(self, reason: str, *, done: bool = False, **facts: Any) -> None:
        """Add the segment's last line to the ledger, and wait for the mirror."""
        step = self._segment.state.counters.global_step
        try:
            self._segment.directory.append_ledger(
                "end",
                segment=self._number,
                step=step,
                local_step=step - self._segment.start,
                reason=reason,
                done=done,
                **facts,
            )
        finally:
            self.close_mirror()

    def close_mirror(self, seconds: float | None = None) -> None:
        """Wait for the mirror, by default as long as the config says; a second call does nothing."""
        if self._mirroring is not None:
            self._mirroring.close(seconds)

    def report_saved(self) -> None:
        """Report the checkpoints that became durable since the last call, and warnings about them."""
        for file in self._publisher.take_saved():
            self._messages.report_saved(f"saved {file}")
        for warning in self._publisher.take_warnings():
            self._messages.say(warning)

    def _report_skipped(self, why: str) -> None:
        self._messages.say(f"{why}; this batch is skipped")

    def record_failure(self, error: BaseException) -> None:
        """Save the state if the last step is complete, and write the error to the ledger."""
        if isinstance(error, RunMovedError):
            return  # the directory is gone
        if isinstance(error, TornUpdate):
            with contextlib.suppress(Exception):  # an error of the save in flight
                self.saver.wait()
        else:
            self.save_complete_state()
        with contextlib.suppress(StepctlError):  # the disk may be what failed
            self.record_end(f"{type(error).__name__}: {error}")

    def save_complete_state(self) -> None:
        """Publish the state if the last step is complete; report the saved or the lost steps."""
        with contextlib.suppress(Exception):  # an error of the save in flight; another came first
            self.saver.wait()
        path = self._segment.directory.path
        state = self._segment.state
        step = state.counters.global_step
        say = self._messages.say
        if not self.trainer.complete:
            newest = self._publisher.newest_step
            if newest is not None and newest < step:
                say(f"{path}: {self._how_to_continue()}")
            return
        try:
            self.saver.save_now(state)
        except Exception as error:
            say(
                f"{path}: the state of global step {step} could not be saved ({error}): "
                f"{self._how_to_continue()}"
            )
        else:
            say(f"{path}: the state of global step {step} is saved")

    def explain(self, error: BaseException) -> BaseException:
        """Return an error that adds how to continue to the message, or the error itself."""
        if isinstance(error, NonFiniteError):
            return NonFiniteError(f"{error}; {self._how_to_stay_finite()}")
        if isinstance(error, TornUpdate):
            text = in_one_line(str(error))
            return TornUpdate(f"{text}; the state cannot be saved: {self._how_to_continue()}")
        return error

    def _how_to_continue(self) -> str:
        """Return the lost steps, and the command that continues from the newest checkpoint."""
        step = self._segment.state.counters.global_step
        newest = self._publisher.newest_step
        if newest is None:
            return "there is no checkpoint yet; start again with: stepctl train"
        remedy = f"continue from {names.file_name(newest)} {self._segment.how_to_resume}"
        if step == newest:
            return remedy
        lost = f"step {step} is" if step == newest + 1 else f"steps {newest + 1} to {step} are"
        return f"{lost} lost; {remedy}"

    def _how_to_stay_finite(self) -> str:
        if not has_checkpoints(self._segment.store):
            return "fix the model's initial values, then start again with: stepctl train"
        path = self._segment.directory.path
        config = self._segment.config
        assert isinstance(config, TaskConfig)  # the numbers of a program may be anything
        key = "optimizer.clip_norm" if config.optimizer.name else "optimizer"
        clip = command("resume", path, "--set", f"{key}=...", "--allow-change", key)
        remedy = f"lower the learning rate or clip the gradient: {clip}"
        if not config.skips_non_finite:
            skip = command("resume", path, "--set", "on_nonfinite=skip")
            remedy += f", or skip such batches: {skip}"
        return remedy


def has_checkpoints(store: Store) -> bool:
    """Tell whether a run has a checkpoint; a directory that cannot be listed now may have one."""
    try:
        return bool(store.steps())
    except UnreadableError:
        return True
