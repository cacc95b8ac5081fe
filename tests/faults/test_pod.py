"""A container's life cycle: SIGTERM to process 1 of its namespace, SIGKILL, and a restart."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.processes import Process, until
from tests.support.run_files import arrays, events, metrics, saved

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")
LAST = 2000
CONFIG = f"""\
data: {{name: digits, batch_size: 64, validation_fraction: 0.2}}
model: {{name: mlp, hidden: [32], dropout: 0.1}}
task: {{name: classification}}
optimizer: {{name: adam, learning_rate: 1e-3}}
stop: {{last_step: {LAST}}}
checkpoint: {{every: 100, keep_last: null}}
numerics: {{threads: 1}}
"""
TRAIN = ["train", "--config", "digits.yaml", "--or-resume"]


def refusal() -> str:
    """Return why no process can be number 1 here, or nothing."""
    if shutil.which("unshare") is None:
        return "no unshare here"
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    return tried.stderr.strip()


pytestmark = pytest.mark.skipif(
    bool(refusal()), reason=f"no namespace of processes can be made: {refusal()}"
)


def inside(pod: Process) -> int:
    """Return the pid, as seen from here, of the process that is number 1 in there."""
    children = Path(f"/proc/{pod.pid}/task/{pod.pid}/children")
    return int(until(children.read_text).split()[0])


def test_process_1_of_a_container_is_stopped_killed_and_restarted(tmp_path: Path) -> None:
    for name in ("pods", "unbroken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "digits.yaml").write_text(CONFIG)
    run, unbroken = (tmp_path / name / "runs" / "digits" for name in ("pods", "unbroken"))
    subprocess.run(
        [sys.executable, "-m", "stepctl", *TRAIN, "--quiet"], cwd=unbroken.parents[1], check=True
    )
    codes = []
    for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, None):
        start = saved(run)
        with processes.start_cold(TRAIN, cwd=run.parents[1], before=NAMESPACE) as pod:
            if end == signal.SIGKILL:
                os.kill(
                    inside(pod), signal.SIGTERM
                )  # before Python has loaded: process 1 never hears of it
            if end is not None:
                until(lambda at=start: saved(run) > at)
                os.kill(inside(pod), end)
            codes.append(pod.wait())
    assert (codes[0], *codes[2:]) == (75, 75, 0)
    assert codes[1] not in (0, 75)
    assert len(events(run, "start")) == 4
    last = f"checkpoints/step-{LAST:08d}.h5"
    assert arrays(run / last) == arrays(unbroken / last)
    assert metrics(run) == metrics(unbroken)
