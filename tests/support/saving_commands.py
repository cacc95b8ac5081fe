"""Commands that save, prepared afresh so that each of their system calls can be attacked."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepctl.writers import row_buffer
from tests.support.call_tracer import Blow, Call, Trace, stand_still
from tests.support.file_systems import in_memory
from tests.support.isolated import command, ended, nothing
from tests.support.small_runs import (
    CONFIG,
    SERIES_CONFIG,
    Unbroken,
    acknowledged,
    checkpoints,
    temporaries,
)

LAST = 6
RESUME = ("resume", "RUN", "--set", f"stop.last_step={LAST}", "-v")
FRESH = ("train", "--config", "CONFIG", "--run-dir", "RUN", "--or-resume", "-v")
SEGMENT_START = Call("write", "ledger.jsonl")  # a resume's first line in the ledger
ROW_OF_STEP_5 = Call("write", "metrics.jsonl", 2)


@dataclass(frozen=True)
class Scene:
    """A command that saves, and what lies there when it starts."""

    words: tuple[str, ...] = RESUME
    trained: int | None = 3  # what the run had reached, if there is one
    since: Call | None = SEGMENT_START  # the first call that is struck
    signals: dict[Call, int] = field(default_factory=dict)
    code: int = 0
    damaged: int | None = None
    killed_at: Call | None = None
    on_error: str = "stop"  # what the config says of a save that fails
    config: str = CONFIG
    variation: bool = True  # whether it does what one of the first two does, but for a part of it


SCENES = {
    "saves on the grid and at the end, with pruning": Scene(variation=False),
    "the first save of a fresh run, and all after it": Scene(
        words=FRESH, trained=None, since=None, variation=False
    ),
    "the save of a stop by signal": Scene(
        since=ROW_OF_STEP_5, signals={ROW_OF_STEP_5: signal.SIGTERM}, code=75
    ),
    "a save on request": Scene(since=ROW_OF_STEP_5, signals={ROW_OF_STEP_5: signal.SIGUSR2}),
    "saves that may fail": Scene(on_error="continue", variation=False),
    "rows of series": Scene(config=SERIES_CONFIG, variation=False),
    "the first rows of series": Scene(
        words=FRESH, trained=None, since=None, config=SERIES_CONFIG, variation=False
    ),
    "a damaged file in the way": Scene(trained=4, damaged=4),
    "a resume after a kill": Scene(
        since=None,
        killed_at=Call(
            "rename", "checkpoints/.step-00000006.h5.tmp-PID -> checkpoints/step-00000006.h5"
        ),
    ),
}


class Stage:
    """A scene that can be played again and again, in a process apart."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        folder = in_memory(folder)
        self.scene = scene
        self.run = folder / "attacked" / "run"
        self.said = ""
        self.unbroken = Unbroken(
            folder, LAST, every=2, keep_last=2, on_error=scene.on_error, config=scene.config
        )
        self._start = folder / "start" / "run"
        self._damaged = b""
        if scene.trained is not None:
            self._prepare(scene.trained)
        there = checkpoints(self._start)
        self.excused = {step for step in acknowledged(self._start) if not there.get(step)}
        code, trace = self.play()
        assert code == scene.code, self.said
        if scene.signals:
            self.unbroken.admit(self.run)  # it has saved off the grid
        self._admit_every_step(trace.calls)
        self.calls = trace.calls[trace.calls.index(scene.since) if scene.since else 0 :]

    def _prepare(self, step: int) -> None:
        words = [
            "train",
            "--config",
            self.unbroken.config,
            "--run-dir",
            self._start,
            "--last-step",
            step,
            "-q",
        ]
        assert command(words) == (0, "")
        self.unbroken.admit(self._start)
        if self.scene.killed_at is not None:
            trace = Trace(self._start, {self.scene.killed_at: Blow(kill=True)})
            assert command(self.words(self._start), stand_still, trace.follow)[0] == -signal.SIGKILL
            with open(self._start / "ledger.jsonl", "a") as file:
                file.write('{"event": "checkp')
            assert temporaries(self._start)
        if self.scene.damaged is not None:
            path = self._start / "checkpoints" / f"step-{self.scene.damaged:08d}.h5"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            self._damaged = bytes(data)

    def _admit_every_step(self, calls: list[Call]) -> None:
        """Record the checkpoint of every step: after an error any last completed step may be saved."""
        rows = [call for call in calls if (call.name, call.file) == ("write", "metrics.jsonl")]
        trace = Trace(self.run, {row: Blow(signal=signal.SIGUSR2) for row in rows})
        self.set()
        assert self.go(stand_still, trace.follow) == 0, self.said
        self.unbroken.admit(self.run)

    def words(self, run: Path) -> list[Any]:
        return [
            {"RUN": run, "CONFIG": self.unbroken.config}.get(word, word)
            for word in self.scene.words
        ]

    def play(self, *blows: tuple[Call, Blow]) -> tuple[int, Trace]:
        """Run the command from the same start, traced; return its exit code, and what it did."""
        falling = {call: Blow(signal=number) for call, number in self.scene.signals.items()}
        for call, blow in blows:
            falling[call] = blow._replace(signal=self.scene.signals.get(call, 0))
        trace = Trace(self.run, falling)
        self.set()
        return self.go(stand_still, trace.follow), trace

    def set(self) -> None:
        """Put back what lay there at the start."""
        shutil.rmtree(self.run.parent, ignore_errors=True)
        if self._start.exists():
            shutil.copytree(self._start, self.run)

    def go(self, before: Callable[[], None] = nothing, follow: Callable[[int], int] = ended) -> int:
        """Run the command; return its exit code, and keep its output."""
        code, self.said = command(self.words(self.run), lambda: _rows_at_once(before), follow)
        return code

    def faults(self) -> list[str]:
        """Return the problem of the run in its present state."""
        seen = {
            int(step)
            for step in re.findall(r"^saved step-([0-9]{8})\.h5$", self.said, re.MULTILINE)
        }
        files = [path.read_bytes() for path in (self.run / "checkpoints").glob("*")]
        gone = ["the damaged file is gone"] if self._damaged and self._damaged not in files else []
        return gone + self.unbroken.faults(self.run, seen, self.excused)

    def faults_of_going_on(self) -> list[str]:
        """Run the command again, undisturbed; return what is wrong with the finished run."""
        if code := self.go():
            return [f"cannot go on: exit code {code}, {self.said}"]
        return self.faults() + self.unbroken.end_faults(self.run, self.excused)

    def faults_of_an_error(self, code: int, *, must_fail: bool) -> list[str]:
        """Return what is wrong after an error: the command must exit with 1 and a reason, or succeed."""
        if code == 0 and (not must_fail or self.scene.on_error == "continue"):
            return self.faults() + self.unbroken.end_faults(self.run, self.excused)
        wrong = [] if code == 1 else [f"exit code {code}"]
        reasons = [line for line in self.said.splitlines() if line.startswith("stepctl: ")]
        if len(reasons) != 1 or "unexpected" in self.said or "Traceback" in self.said:
            wrong.append(f"no clear reason: {self.said}")
        wrong += [f"left behind: {name}" for name in temporaries(self.run)]
        return wrong + self.faults() + self.faults_of_going_on()


def _rows_at_once(before: Callable[[], None]) -> None:
    # so that the calls are the same each time, however long they take
    row_buffer.HOLD_SECONDS = 0.0
    before()
