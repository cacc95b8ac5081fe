"""Under a real Slurm: a job that is requeued, preempted, out of time or on a node that crashes, each of it twice, ends
as the unbroken run does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
import slurm_cluster
from slurm_cluster import Cluster, until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        bool(slurm_cluster.missing()), reason=f"no Slurm here: {', '.join(slurm_cluster.missing())} not found"
    ),
]

LAST = 4000
CONFIG = f"""\
seed: 7
data: {{name: digits, batch_size: 64, validation_fraction: 0.2}}
model: {{name: "held:mlp_with_a_hold"}}
task: {{name: classification}}
optimizer: {{name: adam, learning_rate: {{name: cosine, peak: 1e-3, warmup_steps: 100}}}}
stop: {{last_step: {LAST}}}
log: {{every: 250}}
evaluate: {{every: 1000}}
checkpoint: {{every: 200, keep_last: null}}
numerics: {{threads: 1}}
"""
# A step takes as long as there is a file "hold": so a signal finds the job in the midst of one, on any machine.
MODEL = """\
import os, time
from stepctl.layers.base import Layer
from stepctl.models.mlp import mlp
from stepctl.models.sequential import Sequential

class Hold(Layer):
    def parameter_shapes(self):
        return {}
    def initialize(self, params, rng):
        pass
    def forward(self, params, x, workspace):
        while os.path.exists("hold"):
            time.sleep(0.01)
        return x, lambda dy, grads: dy

def mlp_with_a_hold(*, input_shape, n_outputs):
    layers = mlp(hidden=[64], dropout=0.1, input_shape=input_shape, n_outputs=n_outputs).layers
    return Sequential([Hold(), *layers])
"""
# What a user of any cluster writes. 143: the SIGTERM came before Python had loaded.
SCRIPT = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append --output=job.out
#SBATCH --time=04:00:00 --signal=TERM@120
srun stepctl train --config long.yaml --or-resume
code=$?
case $code in 75 | 143) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
"""
# What will do where slurm.conf says RequeueExit=75,143.
SHORT_SCRIPT = SCRIPT[: SCRIPT.index("code=")]


def submit(cluster: Cluster, script: str, *options: str) -> str:
    (cluster.folder / "job.sh").write_text(script)
    return cluster.submit(*options, "job.sh")


def preempt(cluster: Cluster) -> None:
    """Submit a job that outranks the one that runs."""
    cluster.submit("--partition=high", "--output=/dev/null", "--wrap=true")


def said(cluster: Cluster) -> str:
    output = cluster.folder / "job.out"
    return output.read_text() if output.exists() else ""


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a run's file; the line that is being written does not count."""
    path = run / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def events(run: Path, event: str) -> list[dict[str, Any]]:
    return [row for row in rows(run, "ledger.jsonl") if row["event"] == event]


def saved(run: Path) -> int:
    return max((row["step"] for row in events(run, "checkpoint")), default=0)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != "samples_per_second"} for row in rows(run, "metrics.jsonl")]


def arrays(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return the type, shape and bytes of all that a checkpoint holds."""
    found = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype.str, item.shape, item[()].tobytes())

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it is when nothing happens."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "long.yaml").write_text(CONFIG)
    (folder / "held.py").write_text(MODEL)
    command = [sys.executable, "-m", "stepctl", "train", "--config", "long.yaml", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, timeout=slurm_cluster.DEADLINE)
    return folder / "runs" / "long"


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of its own for each test: no job of another waits in its queue."""
    folder = tmp_path_factory.mktemp("slurm")  # a short path: a socket's may have 107 bytes
    (folder / "long.yaml").write_text(CONFIG)
    (folder / "held.py").write_text(MODEL)
    with slurm_cluster.cluster(folder, getattr(request, "param", "")) as one:
        yield one


def stop_twice(cluster: Cluster, stop: Callable[[], object], signalled: bool = True) -> Path:
    """Stop the job in its first and in its second segment, each time after it saved something new; return the run."""
    run, hold = cluster.folder / "runs" / "long", cluster.folder / "hold"
    for segment in (1, 2):
        until(lambda n=segment: len(events(run, "start")) == n, f"segment {segment}")
        start = events(run, "start")[-1]["step"]
        until(lambda at=start: saved(run) > at, f"a save in segment {segment}")
        hold.touch()
        stop()
        until(lambda n=segment: said(cluster).count("*** STEP") == n or not signalled, f"signal {segment}")
        hold.unlink()
    return run


def ends_as_the_unbroken(cluster: Cluster, job: str, run: Path, unbroken: Path, stopped: int = 2) -> None:
    until(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the end of the job")
    facts = cluster.job(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "2"), said(cluster)
    starts = [row["step"] for row in events(run, "start")]
    assert starts == sorted({0, *starts}), said(cluster)
    assert starts[-1] < LAST
    assert [row["reason"] for row in events(run, "end")] == ["signal SIGTERM"] * stopped + [f"last_step {LAST}"]
    last = f"checkpoints/step-{LAST:08d}.h5"
    assert arrays(run / last) == arrays(unbroken / last)
    assert metrics(run) == metrics(unbroken)
    for row in events(run, "checkpoint"):
        assert (run / "checkpoints" / row["file"]).exists(), f"{row['file']} was acknowledged"


def test_a_job_that_is_requeued_twice(cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]) -> None:
    job = submit(cluster, SCRIPT)
    run = stop_twice(cluster, lambda: cluster.call("scontrol", "requeue", job))
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure("Slurm: requeued", said(cluster).count("DUE TO JOB REQUEUE") // 2)  # the job and its step


def test_a_job_that_is_preempted_twice(cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]) -> None:
    job = submit(cluster, SCRIPT)
    run = stop_twice(cluster, lambda: preempt(cluster))
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure("Slurm: preempted", said(cluster).count("DUE TO PREEMPTION") // 2)


def test_a_job_that_is_preempted_twice_with_notice(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, SCRIPT, "--partition=notice")
    run = stop_twice(cluster, lambda: preempt(cluster))
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure("Slurm: preempted with notice", 2)


def test_a_job_whose_time_is_up_twice(cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]) -> None:
    job = submit(cluster, SCRIPT, "--time=1", "--signal=TERM@90")
    run = stop_twice(cluster, lambda: None)
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure("Slurm: out of time", 2)


@pytest.mark.parametrize("cluster", ["RequeueExit=75,143"], indirect=True)
def test_a_cluster_that_requeues_on_exit_75_needs_no_line_for_it(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, SHORT_SCRIPT, "--partition=notice")
    run = stop_twice(cluster, lambda: preempt(cluster))
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure("Slurm: preempted with notice", 2)


def test_a_job_whose_node_crashes_twice(cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]) -> None:
    job = submit(cluster, SCRIPT)
    run = stop_twice(cluster, cluster.crash_node, signalled=False)
    ends_as_the_unbroken(cluster, job, run, unbroken, stopped=0)
    figure("Slurm: node crashes", 2)


def test_a_stop_before_python_has_loaded_is_requeued_too(cluster: Cluster) -> None:
    command = cluster.folder / "bin" / "stepctl"
    real = command.read_text()
    command.write_text("#!/bin/sh\ntouch loading\nexec sleep 1000\n")
    job = submit(cluster, SCRIPT, "--partition=notice")
    until((cluster.folder / "loading").exists, "a start")
    command.write_text(real)
    preempt(cluster)
    until(lambda: cluster.job(job)["JobState"] == "COMPLETED", "the end of the job")
    assert cluster.job(job)["Restarts"] == "1"
    assert saved(cluster.folder / "runs" / "long") == LAST


def test_a_job_that_can_never_work_is_not_requeued(cluster: Cluster) -> None:
    (cluster.folder / "long.yaml").write_text(CONFIG.replace("seed: 7", "seed: x"))
    job = submit(cluster, SCRIPT)
    until(lambda: cluster.job(job)["JobState"] == "FAILED", "the end of the job")
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert cluster.job(job)["Restarts"] == "0"
    assert not (cluster.folder / "runs").exists()
