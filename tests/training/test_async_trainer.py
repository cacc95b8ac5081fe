"""Asynchronous training makes the exact number of updates, and saves between updates only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import stepctl
from stepctl.config import yaml
from stepctl.config.cadence import Cadence
from stepctl.errors import ConfigError
from stepctl.training.async_trainer import next_cut
from stepctl.training.build import prepare
from tests.support.mpi_jobs import LONGEST, environment, job, launcher, run_python
from tests.support.run_files import events
from tests.support.runs import BASE, make_config, rows

ASYNC = BASE | {
    "data": {"name": "digits", "batch_size": 32, "validation_fraction": 0.2},
    "model": {"name": "mlp", "hidden": [32]},
    "optimizer": {"name": "tests.support.counting_optimizer:Counting", "learning_rate": 0.1},
    "stop": {"last_step": 60},
    "log": {"every": 10},
    "evaluate": {"every": 30},
    "checkpoint": {"every": 13, "keep_last": None},
    "distributed": {"mode": "async"},
}


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.dumps({**ASYNC, **sections}))
    return path


def assert_checkpoints_hold_whole_updates(run: Path) -> list[int]:
    """Return the steps, of which each file holds exactly so many updates, in every element."""
    steps = []
    for path in sorted((run / "checkpoints").iterdir()):
        found = stepctl.load_checkpoint(path)
        counts = {
            name: array
            for name, array in found.arrays.items()
            if name.startswith("optimizers/model/count/")
        }
        assert len(counts) == 4
        assert all((array == found.global_step).all() for array in counts.values()), path.name
        assert found.counters["model"] == found.global_step
        assert found.counters["samples_seen"] == 32 * found.global_step
        steps.append(found.global_step)
    return steps


@pytest.mark.mpi
def test_the_ranks_make_exactly_the_requested_updates(tmp_path: Path) -> None:
    config, run = write(tmp_path), tmp_path / "run"
    done = job(3, "train", "--config", config, "--run-dir", run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert assert_checkpoints_hold_whole_updates(run) == [0, 13, 26, 39, 52, 60]
    [end] = events(run, "end")
    assert (end["step"], sum(end["local_steps"]), len(end["local_steps"])) == (60, 60, 3)
    assert 0 <= end["staleness"] <= end["stalest"]
    trained = [row for row in rows(run) if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [1, 10, 20, 30, 40, 50, 60]
    assert all({"loss", "accuracy", "learning_rate", "staleness"} <= row.keys() for row in trained)
    again = job(2, "resume", run, "--num-steps", 17, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert assert_checkpoints_hold_whole_updates(run)[-3:] == [60, 65, 77]
    assert sum(events(run, "end")[-1]["local_steps"]) == 17
    verified = run_python([], "-m", "stepctl", "verify", run, cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr


@pytest.mark.mpi
def test_one_process_learns_the_same_as_the_ranks_together(tmp_path: Path) -> None:
    adam = {"name": "adam", "learning_rate": 0.003}
    accuracy = {}
    for mode in ("sync", "async"):
        sections = {"optimizer": adam, "stop": {"last_step": 300}, "distributed": {"mode": mode}}
        sections["data"] = {
            "name": "digits",
            "batch_size": 64,
            "shards": 2,
            "validation_fraction": 0.2,
        }
        config, run = write(tmp_path, **sections), tmp_path / mode
        done = job(2, "train", "--config", config, "--run-dir", run, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        accuracy[mode] = [row for row in rows(run) if row["kind"] == "eval"][-1]["accuracy"]
    assert accuracy["sync"] > 0.9
    assert accuracy["async"] > accuracy["sync"] - 0.03


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_in_one_checkpoint(rank: int, tmp_path: Path) -> None:
    rare = {"every": 10**6}  # so that nothing but the signal is due
    config = write(tmp_path, stop={"last_step": 10**9}, log=rare, evaluate=rare, checkpoint=rare)
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    told = "import os, sys; open(f'rank-{os.environ[\"PMI_RANK\"]}', 'w').write(str(os.getpid())); "
    told += "from stepctl.__main__ import main; main()"
    command = [
        *launcher(2),
        sys.executable,
        "-c",
        told,
        "train",
        "--config",
        config,
        "--run-dir",
        run,
    ]
    started = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            assert started.poll() is None
            time.sleep(0.01)
        os.kill(int((tmp_path / f"rank-{rank}").read_text()), signal.SIGTERM)
        _, said = started.communicate(timeout=LONGEST)
    finally:
        started.kill()
    assert started.returncode == 75, said
    assert "signal SIGTERM" in said
    steps = assert_checkpoints_hold_whole_updates(run)
    assert steps[0] == 0 < steps[1]
    assert len(steps) == 2
    assert events(run, "end")[-1]["step"] == steps[1]


@pytest.mark.mpi
def test_one_rank_at_a_time_is_inside(tmp_path: Path) -> None:
    done = run_python(launcher(4), "-m", "tests.support.rank_window", "50", cwd=tmp_path)
    assert done.stdout.split() == ["200"], done.stderr


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"log": {"every": 5, "means": True}}, "async does not support log.means"),
        ({"on_nonfinite": "skip"}, "async does not support on_nonfinite: skip"),
        (
            {
                "task": {"name": "wgan", "weight_clip": 0.1},
                "model": {name: {"name": "mlp", "hidden": [4]} for name in ("critic", "generator")},
                "optimizer": {
                    name: {"name": "adam", "learning_rate": 0.1} for name in ("critic", "generator")
                },
            },
            "more than one update a step; use sync",
        ),
    ],
)
def test_configs_that_cannot_be_asynchronous_are_refused(
    sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        prepare(make_config(**{**ASYNC, **sections}))


@pytest.mark.process
def test_a_run_that_was_made_asynchronously_is_not_replayed(tmp_path: Path) -> None:
    config = write(tmp_path, stop={"last_step": 13})
    trained = run_python(
        [], "-m", "stepctl", "train", "--config", config, "--run-dir", "run", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    done = run_python([], "-m", "stepctl", "verify", "run", "--replay", "0:13", cwd=tmp_path)
    assert done.returncode == 2
    assert "was trained asynchronously" in done.stderr


def test_a_cut_comes_where_something_falls_on_a_step() -> None:
    cadences = [
        Cadence(10),
        Cadence(7, offset=3),
        Cadence(None),
    ]
    found, step = [], 0
    while step < 31:
        step = next_cut(step, cadences, target=31, first_step=1)
        found.append(step)
    fires = sorted({1, 31} | {n for n in range(1, 32) if n % 10 == 0 or n % 7 == 3})
    assert found == fires
