"""Failures of one rank, or at the start of a job: one message, the exit code, no lost step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint.store import Store
from tests.support.messages import TOP_LEVEL_KEYS, without_paths
from tests.support.mpi_jobs import environment, job, missing, run_python, said_lines
from tests.support.run_files import events
from tests.support.runs import BASE, resume, rows
from tests.support.stops import some_of

FOUR = {"name": "digits", "batch_size": 48, "validation_fraction": 0.9, "shards": 4}
LAST = 9
# the sections that fail at the 5th step; a rank has two shards, and a trial step
FAILING_MODEL = {"name": "tests.support.failing_ranks:Fails", "time": 2 + 2 * 4 + 1}
FAILING_DATA = {**FOUR, "name": "tests.support.failing_ranks:failing_digits", "time": 6}
FAULTY: dict[str, dict[str, Any]] = {
    "model": {"model": FAILING_MODEL},
    "leaves": {"model": {**FAILING_MODEL, "error": "exit"}},
    "data": {"data": FAILING_DATA},
    "data, not finite": {"data": {**FAILING_DATA, "error": "not finite"}},
}


def write(folder: Path, **sections: Any) -> Path:
    """Write the config of a run that saves nothing on its way; return its path."""
    config = BASE | {
        "data": FOUR,
        "log": {"every": 1},
        "stop": {"last_step": LAST},
        "evaluate": {"every": 1000},
    }
    (folder / "config.yaml").write_text(json.dumps(config | sections))
    return folder / "config.yaml"


def without_places(line: str) -> str:
    """Return a message without the host's name, line numbers and folders of source files."""
    own_places = (r"(?<=\.py:)\d+", r"(?<=\()/\S*(?=/\w+\.py:)")
    return without_paths(line, own_places, HOST=os.uname().nodename)


def faulty(what: str, rank: int) -> dict[str, Any]:
    return {section: {**spec, "rank": rank} for section, spec in FAULTY[what].items()}


def train(
    ranks: int, folder: Path, run: str, *more: object, env: dict[str, str] | None = None
) -> Any:
    return job(
        ranks,
        "train",
        "--config",
        folder / "config.yaml",
        "--run-dir",
        run,
        "-q",
        *more,
        cwd=folder,
        env=env,
    )


# --- in a step


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("what", "rank"),
    [
        ("model", 0),
        pytest.param("model", 1, marks=pytest.mark.faults),
        ("leaves", 1),
        pytest.param("data", 1, marks=pytest.mark.faults),
        ("data, not finite", 1),
    ],
)
def test_the_last_whole_step_is_saved_and_the_rank_is_named(
    what: str, rank: int, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    write(tmp_path, **faulty(what, rank))
    done = train(2, tmp_path, "run")
    assert done.returncode == 1, done.stderr
    assert [without_places(line) for line in said_lines(done)] == snapshot
    end = events(tmp_path / "run", "end")[-1]
    assert (end["step"], end["done"]) == (4, False)


@pytest.mark.mpi
@pytest.mark.parametrize("every", [1000, 4], ids=["in place", "handed over"])
@pytest.mark.parametrize(
    ("rank", "error"),
    [
        (1, "value"),
        (1, "hard"),
        *[
            pytest.param(*how, marks=pytest.mark.faults)
            for how in ((0, "value"), (0, "exit"), (1, "exit"), (1, "not finite"))
        ],
    ],
)
def test_an_update_that_one_rank_fails_in_is_never_saved(
    rank: int, error: str, every: int, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    """The other ranks have completed theirs, so the arrays of all ranks together are no step's state."""
    model = {"name": "mlp", "hidden": [256]}
    checkpoint = {"every": every, "keep_last": None}
    for ranks, at, run in ((2, rank, "failed/run"), (1, 5, "whole/run")):  # there is no rank 5
        fails = {
            "name": "tests.support.failing_ranks:FailsToUpdate",
            "rank": at,
            "time": 5,
            "learning_rate": 0.1,
            "error": error,
        }
        write(tmp_path, optimizer=fails, model=model, checkpoint=checkpoint, on_nonfinite="skip")
        done = train(ranks, tmp_path, run)
        assert (done.returncode == 0) == (at == 5), done.stderr
        if at == rank and error != "hard":
            assert done.returncode == 1
            (line,) = said_lines(done)
            assert without_places(line) == snapshot
    saved = Store(tmp_path / "failed/run/checkpoints").steps()
    expected = [0, 4] if every == 4 else [0]
    # a rank that exits at once takes rank 0 with it, perhaps while that writes step 4 in the background
    assert saved == expected or (error == "hard" and saved == [0])
    repair = {"assignments": ("optimizer.rank=5",), "allow_change": ("optimizer.rank",)}
    assert resume(tmp_path / "failed/run", **repair).same_bits(resume(tmp_path / "whole/run"))
    assert rows(tmp_path / "failed/run") == rows(tmp_path / "whole/run")


def rate(rank: int) -> dict[str, Any]:
    """Return sections whose learning rate fails in one rank at the 5th step; each has a part of the model."""
    schedule = {"name": "tests.support.failing_ranks:FailingRate", "rank": rank, "step": 4}
    model = {"name": "mlp", "hidden": [256]}
    return {
        "model": model,
        "optimizer": {"name": "sgd", "learning_rate": schedule, "momentum": 0.9},
    }


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("sections", "rank", "key"),
    [
        (lambda rank: faulty("model", rank), 1, "model.rank"),
        (rate, 0, "optimizer.learning_rate.rank"),
    ],
    ids=["before the gradient", "after the gradient, in rank 0"],
)
def test_a_failed_job_resumes_exactly(sections: Any, rank: int, key: str, tmp_path: Path) -> None:
    for at, name in ((rank, "failed/run"), (5, "whole/run")):  # there is no rank 5
        write(tmp_path, **sections(at))
        assert train(2, tmp_path, name).returncode == (0 if at == 5 else 1)
    assert events(tmp_path / "failed/run", "end")[-1]["step"] == 4
    assert max(Store(tmp_path / "failed/run/checkpoints").steps()) == 4
    repair = {"assignments": (f"{key}=5",), "allow_change": (key,)}
    assert resume(tmp_path / "failed/run", **repair).same_bits(resume(tmp_path / "whole/run"))
    assert rows(tmp_path / "failed/run") == rows(tmp_path / "whole/run")


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_non_finite_value_of_one_rank_is_skipped_by_all(rank: int, tmp_path: Path) -> None:
    found = []
    for ranks, at in ((1, 0), (2, rank)):
        each = 4 // ranks
        time = each + each * 4 + 2  # in the second shard, so that a sum is begun
        model = {**FAILING_MODEL, "rank": at, "time": time, "error": "not finite"}
        write(tmp_path, model=model, on_nonfinite="skip")
        done = train(ranks, tmp_path, str(ranks))
        assert done.returncode == 0, done.stderr
        assert events(tmp_path / str(ranks), "end")[-1]["skipped_batches"] == 1
        found.append(rows(tmp_path / str(ranks)))
    assert found[0] == found[1]


# --- at the start


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_component_that_cannot_be_built_is_reported_once_and_leaves_no_run(
    rank: int, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    write(tmp_path, model={**FAILING_MODEL, "rank": rank, "time": 0})
    done = train(2, tmp_path, "run")
    (line,) = said_lines(done)
    assert done.returncode == (2 if rank == 0 else 1), done.stderr
    assert without_places(line) == snapshot
    write(tmp_path)
    assert rank == 0 or train(2, tmp_path, "run").returncode == 0


@pytest.mark.mpi
def test_data_that_only_rank_0_can_read_are_refused(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    write(tmp_path, data=FOUR | {"name": "tests.support.failing_ranks:own_digits"})
    done = train(2, tmp_path, "run")
    (line,) = said_lines(done)
    assert done.returncode == 1
    assert without_places(line) == snapshot


# --- refusals

# sections of the config, and arguments
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "shards": ({"data": FOUR | {"shards": 3}}, ()),
    "shards, dry run": ({"data": FOUR | {"shards": 3}}, ("--dry-run",)),
    "task": ({"task": {"name": "tests.support.failing_ranks:Indivisible"}}, ()),
    "config": ({"sed": 1}, ()),
    "option": ({}, ("--bogus",)),
    "options": ({}, ("--num-steps", "1", "--last-step", "2")),
}
CLICK_WORDS = r"(?<=^Try ).*|(?<=No such option).*"


@pytest.mark.mpi
@pytest.mark.parametrize("case", some_of(REFUSED, every=2))
def test_a_refusal_is_printed_once(case: str, tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    sections, arguments = REFUSED[case]
    write(tmp_path, **sections)
    done = train(2, tmp_path, "run", *arguments)
    assert done.returncode == 2, done.stderr
    patterns = (CLICK_WORDS, TOP_LEVEL_KEYS)
    lines = [without_paths(line, patterns, HERE=tmp_path) for line in said_lines(done)]
    assert lines == snapshot
    assert not (tmp_path / "run").exists()


@pytest.mark.mpi
def test_a_job_answers_a_reading_command_once(tmp_path: Path) -> None:
    write(tmp_path)
    assert train(2, tmp_path, "run", "--dry-run").stdout.count("parameters ") == 1
    assert not (tmp_path / "run").exists()
    trained = train(2, tmp_path, "run", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["metrics"]["train"]["loss"] > 0
    done = train(2, tmp_path, "run", "--or-resume", "--max-time", "1s", "--last-step", 10**9)
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("(max_time 1 s)") == len(done.stderr.splitlines()) == 1
    step = job(2, "inspect", "run", "--step", cwd=tmp_path)
    assert step.stdout == f"{events(tmp_path / 'run', 'end')[-1]['step']}\n"


@pytest.mark.process
@pytest.mark.skipif(missing() == "mpi4py is not installed", reason=missing())
def test_a_launcher_of_another_mpi_is_detected(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    """With it, mpi4py sees one rank in each process, and all of them would write the same run."""
    write(tmp_path)
    for rank in ("0", "1"):
        env = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": rank}
        done = run_python(
            [], "-m", "stepctl", "train", "--config", "config.yaml", cwd=tmp_path, env=env
        )
        assert done.returncode == 2
        lines = done.stderr.splitlines()
        assert len(lines) == (rank == "0")
        mpi_version = r"(?<=MPI library \()[^)]*"
        assert rank != "0" or without_paths(lines[0], (mpi_version,)) == snapshot
    assert not (tmp_path / "runs").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("size", "rank", "code"),
    [("2", "0", 2), ("2", "1", 2), ("1", "0", 0)],
    ids=["rank 0 of 2", "rank 1 of 2", "one process"],
)
def test_without_mpi4py_a_job_says_what_to_install_and_one_process_needs_none(
    size: str, rank: str, code: int, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    write(tmp_path)
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    env = {"PYTHONPATH": path, "PMI_SIZE": size, "PMI_RANK": rank}
    command = ("-m", "stepctl", "train", "--config", "config.yaml", "-q")
    done = run_python([], *command, cwd=tmp_path, env=env)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines() == snapshot
