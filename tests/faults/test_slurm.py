"""Real Slurm jobs that are requeued, preempted, out of time or on a crashing node end with the same bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stepctl
from tests.support import slurm_cluster
from tests.support.mpi_jobs import needs_mpi
from tests.support.run_files import arrays, events, metrics, saved
from tests.support.slurm_cluster import Cluster, until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        bool(slurm_cluster.missing()),
        reason=f"no Slurm here: {', '.join(slurm_cluster.missing())} not found",
    ),
]

LAST = 4000
ENDS = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
)  # what Slurm says of a job that is over
CONFIG = f"""\
seed: 7
data: {{name: digits, batch_size: 64, shards: 2, validation_fraction: 0.2}}
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
from stepctl.models.layers.base import Layer
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
# The script on the page stepctl/cli/README.md, without a mirror. 138, 143, and 15 of mpiexec:
# a signal came before training.
SCRIPT = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append --time=04:00:00 --signal=TERM@120
srun stepctl train --config configs/digits.yaml --or-resume
code=$?
case $code in 15 | 75 | 129 | 138 | 140 | 143 | 152) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit $code
"""
# On two ranks; here they share the node's one CPU.
RANKS_SCRIPT = SCRIPT.replace("srun", "srun --mpi=pmi2 -n 2 --overcommit")
# What will do where slurm.conf says RequeueExit=15,75,129,138,140,143,152.
SHORT_SCRIPT = SCRIPT[: SCRIPT.index("code=")]


def write_config(folder: Path, text: str) -> None:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "digits.yaml").write_text(text)
    (folder / "held.py").write_text(MODEL)


def submit(cluster: Cluster, script: str, *options: str) -> str:
    (cluster.folder / "job.sh").write_text(script)
    return cluster.submit("--output=job.out", *options, "job.sh")


def preempt(cluster: Cluster) -> None:
    """Submit a job that outranks the one that runs."""
    cluster.submit("--partition=high", "--output=/dev/null", "--wrap=true")


def said(cluster: Cluster) -> str:
    output = cluster.folder / "job.out"
    return output.read_text() if output.exists() else ""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it is when nothing happens."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_config(folder, CONFIG)
    command = [
        sys.executable,
        "-m",
        "stepctl",
        "train",
        "--config",
        "configs/digits.yaml",
        "--quiet",
    ]
    subprocess.run(command, cwd=folder, check=True, timeout=slurm_cluster.DEADLINE)
    return folder / "runs" / "digits"


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A cluster of its own for each test: no job of another waits in its queue."""
    folder = tmp_path_factory.mktemp("slurm")  # a short path: a socket's may have 107 bytes
    write_config(folder, CONFIG)
    with slurm_cluster.cluster(folder, getattr(request, "param", "")) as one:
        yield one


def stop_segments(
    cluster: Cluster, stop: Callable[[], object], times: int = 1, signalled: bool = True
) -> Path:
    """Stop the job in so many segments, each time after it saved something new; return the run."""
    run, hold = cluster.folder / "runs" / "digits", cluster.folder / "hold"
    for segment in range(1, times + 1):
        until(lambda n=segment: len(events(run, "start")) == n, f"segment {segment}")
        start = events(run, "start")[-1]["step"]
        until(lambda at=start: saved(run) > at, f"a save in segment {segment}")
        hold.touch()
        stop()
        until(
            lambda n=segment: said(cluster).count("*** STEP") == n or not signalled,
            f"signal {segment}",
        )
        hold.unlink()
    return run


def ends_as_the_unbroken(
    cluster: Cluster, job: str, run: Path, unbroken: Path, stopped: int = 1
) -> None:
    until(lambda: cluster.job(job)["JobState"] in ENDS, "the end of the job")
    facts = cluster.job(job)
    ended = (facts["JobState"], facts["ExitCode"], facts["Restarts"])
    assert ended == ("COMPLETED", "0:0", str(max(stopped, 1))), said(cluster)
    starts = [row["step"] for row in events(run, "start")]
    assert starts == sorted({0, *starts}), said(cluster)
    assert starts[-1] < LAST
    assert [row["reason"] for row in events(run, "end")] == ["signal SIGTERM"] * stopped + [
        f"last_step {LAST}"
    ]
    last = f"checkpoints/step-{LAST:08d}.h5"
    assert arrays(run / last) == arrays(unbroken / last)
    assert metrics(run) == metrics(unbroken)
    for row in events(run, "checkpoint"):
        assert (run / "checkpoints" / row["file"]).exists(), f"{row['file']} was acknowledged"


def test_the_script_is_the_one_in_the_readme() -> None:
    on_page = SCRIPT.replace("--or-resume", "--or-resume --mirror s3://BUCKET/runs/digits")
    assert on_page in (Path(stepctl.__file__).parent / "cli" / "README.md").read_text()


def test_a_job_that_is_requeued(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, SCRIPT)
    run = stop_segments(cluster, lambda: cluster.call("scontrol", "requeue", job))
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure(
        "Slurm: requeued", said(cluster).count("DUE TO JOB REQUEUE") // 2
    )  # the job and its step


def test_a_job_that_is_preempted_twice(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, SCRIPT)
    run = stop_segments(cluster, lambda: preempt(cluster), times=2)
    ends_as_the_unbroken(cluster, job, run, unbroken, stopped=2)
    figure("Slurm: preempted", said(cluster).count("DUE TO PREEMPTION") // 2)


def test_a_job_that_is_preempted_with_notice(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, SCRIPT, "--partition=notice")
    run = stop_segments(cluster, lambda: preempt(cluster))
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure("Slurm: preempted with notice", 1)


@needs_mpi
def test_ranks_that_are_preempted_twice(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, RANKS_SCRIPT)
    run = stop_segments(cluster, lambda: preempt(cluster), times=2)
    ends_as_the_unbroken(cluster, job, run, unbroken, stopped=2)
    assert [row["ranks"] for row in events(run, "start")] == [2, 2, 2]
    figure("Slurm: two ranks preempted", said(cluster).count("DUE TO PREEMPTION") // 2)


def test_ranks_that_srun_did_not_tell_of_each_other(cluster: Cluster) -> None:
    job = submit(cluster, RANKS_SCRIPT.replace("--mpi=pmi2 ", ""))
    until(lambda: cluster.job(job)["JobState"] in ENDS, "the end of the job")
    assert "ranks of one MPI job, use srun --mpi=pmi2" in said(
        cluster
    )  # both come long before one is done


def test_a_job_whose_time_is_up(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, SCRIPT, "--time=1", "--signal=TERM@90")
    run = stop_segments(cluster, lambda: None)
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure("Slurm: out of time", 1)


@pytest.mark.parametrize("cluster", ["RequeueExit=15,75,129,138,140,143,152"], indirect=True)
def test_a_cluster_that_requeues_on_exit_75_needs_no_line_for_it(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, SHORT_SCRIPT, "--partition=notice")
    run = stop_segments(cluster, lambda: preempt(cluster))
    ends_as_the_unbroken(cluster, job, run, unbroken)
    figure("Slurm: preempted with notice", 1)


def test_a_job_whose_node_crashes(
    cluster: Cluster, unbroken: Path, figure: Callable[[str, int], None]
) -> None:
    job = submit(cluster, SCRIPT)
    run = stop_segments(cluster, cluster.crash_node, signalled=False)
    ends_as_the_unbroken(cluster, job, run, unbroken, stopped=0)
    figure("Slurm: node crashes", 1)


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
    assert saved(cluster.folder / "runs" / "digits") == LAST


def test_a_job_that_can_never_work_is_not_requeued(cluster: Cluster) -> None:
    write_config(cluster.folder, CONFIG.replace("seed: 7", "seed: x"))
    job = submit(cluster, SCRIPT)
    until(lambda: cluster.job(job)["JobState"] == "FAILED", "the end of the job")
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert cluster.job(job)["Restarts"] == "0"
    assert not (cluster.folder / "runs").exists()
