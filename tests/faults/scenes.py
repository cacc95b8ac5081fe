"""Commands that save, each from the same start again and again, so that each of its system calls can be struck."""

from __future__ import annotations

import gc
import re
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apart import command, fork
from places import in_memory
from small_runs import Unbroken, acknowledged, checkpoints, temporaries
from tracer import Blow, Call, Trace, held

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


SCENES = {
    "saves on the grid and at the end, with pruning": Scene(),
    "the first save of a fresh run, and all after it": Scene(words=FRESH, trained=None, since=None),
    "the save of a stop by signal": Scene(since=ROW_OF_STEP_5, signals={ROW_OF_STEP_5: signal.SIGTERM}, code=75),
    "a save on request": Scene(since=ROW_OF_STEP_5, signals={ROW_OF_STEP_5: signal.SIGUSR2}),
    "a damaged file in the way": Scene(trained=4, damaged=4),
    "a resume after a kill": Scene(
        since=None, killed_at=Call("rename", "checkpoints/.step-00000006.h5.tmp-PID -> checkpoints/step-00000006.h5")
    ),
}


class Stage:
    """A scene that can be played again and again, in a process apart."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        folder = in_memory(folder)
        self.scene, self.run, self.output = scene, folder / "attacked" / "run", folder / "output.txt"
        self.unbroken = Unbroken(folder, LAST, every=2, keep_last=2)
        self._start = folder / "start" / "run"
        if scene.trained is not None:
            self._prepare(scene.trained)
        there = checkpoints(self._start)
        self.excused = {step for step in acknowledged(self._start) if not there.get(step)}
        gc.freeze()  # the forks share what is here
        code, trace = self.play()
        assert code == scene.code, self.output.read_text()
        if scene.signals:
            self.unbroken.admit(self.run)  # it has saved off the grid
        self.calls = trace.calls[trace.calls.index(scene.since) if scene.since else 0 :]

    def _prepare(self, step: int) -> None:
        words = ["train", "--config", self.unbroken.config, "--run-dir", self._start, "--last-step", step]
        assert command(words, self.output) == 0, self.output.read_text()
        self.unbroken.admit(self._start)
        if self.scene.killed_at is not None:
            trace = Trace(self._start, {self.scene.killed_at: Blow(kill=True)})
            assert trace.follow(held(lambda stop: fork(self.words(self._start), self.output, stop))) == -9
            with open(self._start / "ledger.jsonl", "a") as file:
                file.write('{"event": "checkp')
            assert temporaries(self._start)
        if self.scene.damaged is not None:
            path = self._start / "checkpoints" / f"step-{self.scene.damaged:08d}.h5"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    def words(self, run: Path) -> list[Any]:
        return [{"RUN": run, "CONFIG": self.unbroken.config}.get(word, word) for word in self.scene.words]

    def play(self, *blows: tuple[Call, Blow]) -> tuple[int, Trace]:
        """Run the command from the same start; return its exit code, and what it did."""
        shutil.rmtree(self.run.parent, ignore_errors=True)
        if self._start.exists():
            shutil.copytree(self._start, self.run)
        falling = {call: Blow(signal=number) for call, number in self.scene.signals.items()}
        for call, blow in blows:
            falling[call] = blow._replace(signal=self.scene.signals.get(call, 0))
        trace = Trace(self.run, falling)
        return trace.follow(held(lambda stop: fork(self.words(self.run), self.output, stop))), trace

    def faults(self) -> list[str]:
        """Return what is wrong with the run as it stands."""
        said = self.output.read_text()
        seen = {int(step) for step in re.findall(r"^saved step-([0-9]{8})\.h5$", said, re.MULTILINE)}
        return self.unbroken.faults(self.run, seen, self.excused)

    def faults_of_going_on(self) -> list[str]:
        """Run the command again, undisturbed; return what is wrong with the end that the run comes to."""
        if code := command(self.words(self.run), self.output):
            return [f"cannot go on: exit code {code}, {self.output.read_text()}"]
        return self.unbroken.end_faults(self.run)
