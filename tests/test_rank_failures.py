"""What fails in a rank of a job, or keeps a job from beginning: one message, the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers import BASE, resume, rows
from jobs import environment, job, missing, needs_mpi, run_python, said_lines
from stepctl.checkpoint.store import Store
from stepctl.rundir import RunDirectory

FOUR = {"name": "digits", "batch_size": 48, "validation_fraction": 0.9, "shards": 4}
LAST = 9
HAD_ENOUGH = "this node has had enough"
FAULTY: dict[str, dict[str, Any]] = {  # the section that fails, at the 5th step; a rank has two shards, and a trial too
    "model": {"model": {"name": "failing:Fails", "time": 2 + 2 * 4 + 1}},
    "leaves": {"model": {"name": "failing:Fails", "time": 2 + 2 * 4 + 1, "error": "exit"}},
    "data": {"data": FOUR | {"name": "failing:failing_digits", "time": 6}},
    "data, not finite": {"data": FOUR | {"name": "failing:failing_digits", "time": 6, "error": "not finite"}},
}


def write(folder: Path, **sections: Any) -> Path:
    """Write the config of a run that saves nothing on its way; return its path."""
    config = BASE | {"data": FOUR, "log": {"every": 1}, "stop": {"last_step": LAST}, "evaluate": {"every": 1000}}
    (folder / "config.yaml").write_text(json.dumps(config | sections))
    return folder / "config.yaml"


def faulty(what: str, rank: int) -> dict[str, Any]:
    return {section: {**spec, "rank": rank} for section, spec in FAULTY[what].items()}


def train(ranks: int, folder: Path, run: str, *more: object, env: dict[str, str] | None = None) -> Any:
    return job(ranks, "train", "--config", folder / "config.yaml", "--run-dir", run, "-q", *more, cwd=folder, env=env)


def ends(run: Path) -> list[dict[str, Any]]:
    return [row for row in RunDirectory(run).read_ledger() if row["event"] == "end"]


# --- in a step


@needs_mpi
@pytest.mark.parametrize(
    ("what", "rank", "saved"),
    [("model", 0, 4), ("model", 1, 4), ("leaves", 1, 4), ("data", 1, 4), ("data, not finite", 1, 4)],
)
def test_the_last_whole_step_is_saved_and_the_rank_is_named(what: str, rank: int, saved: int, tmp_path: Path) -> None:
    write(tmp_path, **faulty(what, rank))
    done = train(2, tmp_path, "run")
    said = said_lines(done)
    assert (done.returncode, len(said)) == (1, 2), done.stderr
    assert said[0] == f"run: the state of global step {saved} is saved"
    assert HAD_ENOUGH in said[1]
    assert rank == 0 or said[1].startswith("stepctl: rank 1 on ")
    assert (ends(tmp_path / "run")[-1]["step"], ends(tmp_path / "run")[-1]["done"]) == (saved, False)


@needs_mpi
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
def test_an_update_that_one_rank_fails_in_is_never_saved(rank: int, error: str, every: int, tmp_path: Path) -> None:
    """The others have made theirs: what all have in common is the state of no step, wherever it is written."""
    model, checkpoint = {"name": "mlp", "hidden": [256]}, {"every": every, "keep_last": None}
    for ranks, at, run in ((2, rank, "failed/run"), (1, 5, "whole/run")):  # there is no rank 5
        fails = {"name": "failing:FailsToUpdate", "rank": at, "time": 5, "learning_rate": 0.1, "error": error}
        write(tmp_path, optimizer=fails, model=model, checkpoint=checkpoint, on_nonfinite="skip")
        done = train(ranks, tmp_path, run)
        assert (done.returncode == 0) == (at == 5), done.stderr
        if at == rank and error != "hard":
            lost = "" if every == 4 else "steps 1 to 4 are lost; "
            assert_told(done, f"{lost}go on from step-{4 if every == 4 else 0:08d}.h5")
    saved, whole = Store(tmp_path / "failed/run/checkpoints").steps(), [0, 4] if every == 4 else [0]
    # a rank that ends without a word takes rank 0 with it, perhaps while that writes step 4 in the background
    assert saved == whole or (error == "hard" and saved == [0])
    mended = {"assignments": ("optimizer.rank=5",), "allow_change": ("optimizer.rank",)}
    assert resume(tmp_path / "failed/run", **mended).same_bits(resume(tmp_path / "whole/run"))
    assert rows(tmp_path / "failed/run") == rows(tmp_path / "whole/run")


def assert_told(done: Any, go_on: str) -> None:
    """Assert that one line says what failed, and from which checkpoint the run goes on."""
    lines = said_lines(done)
    assert (done.returncode, len(lines)) == (1, 1), done.stderr
    [said] = lines
    assert HAD_ENOUGH in said
    assert said.endswith(f"; no whole state is left to save: {go_on} with: stepctl resume failed/run")


def rate(rank: int) -> dict[str, Any]:
    """Return a config whose learning rate one rank cannot tell at the 5th step; each has a part of the model."""
    schedule = {"name": "failing:FailingRate", "rank": rank, "step": 4}
    model = {"name": "mlp", "hidden": [256]}
    return {"model": model, "optimizer": {"name": "sgd", "learning_rate": schedule, "momentum": 0.9}}


@needs_mpi
@pytest.mark.parametrize(
    ("sections", "rank", "key"),
    [(lambda rank: faulty("model", rank), 1, "model.rank"), (rate, 0, "optimizer.learning_rate.rank")],
    ids=["before the gradient is there", "after it, in rank 0"],
)
def test_what_was_saved_goes_on_exactly(sections: Any, rank: int, key: str, tmp_path: Path) -> None:
    for at, name in ((rank, "failed/run"), (5, "whole/run")):  # there is no rank 5
        write(tmp_path, **sections(at))
        assert train(2, tmp_path, name).returncode == (0 if at == 5 else 1)
    assert ends(tmp_path / "failed/run")[-1]["step"] == max(Store(tmp_path / "failed/run/checkpoints").steps()) == 4
    mended = {"assignments": (f"{key}=5",), "allow_change": (key,)}
    assert resume(tmp_path / "failed/run", **mended).same_bits(resume(tmp_path / "whole/run"))
    assert rows(tmp_path / "failed/run") == rows(tmp_path / "whole/run")


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_finds_to_be_no_number_all_pass_over(rank: int, tmp_path: Path) -> None:
    found = []
    for ranks, at in ((1, 0), (2, rank)):
        each = 4 // ranks
        time = each + each * 4 + 2  # of two shards, so that a sum is begun
        model = {"name": "failing:Fails", "rank": at, "time": time, "error": "not finite"}
        write(tmp_path, model=model, on_nonfinite="skip")
        done = train(ranks, tmp_path, str(ranks))
        assert done.returncode == 0, done.stderr
        assert ends(tmp_path / str(ranks))[-1]["skipped_batches"] == 1
        found.append(rows(tmp_path / str(ranks)))
    assert found[0] == found[1]


# --- at the start


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_cannot_be_built_is_said_once_and_leaves_no_run(rank: int, tmp_path: Path) -> None:
    write(tmp_path, model={"name": "failing:Fails", "rank": rank, "time": 0})
    done = train(2, tmp_path, "run")
    [said] = said_lines(done)
    assert (done.returncode, HAD_ENOUGH in said) == (2 if rank == 0 else 1, True), done.stderr
    assert rank == 0 or said.startswith("stepctl: rank 1 on ")
    write(tmp_path)
    assert rank == 0 or train(2, tmp_path, "run").returncode == 0


@needs_mpi
def test_data_that_only_rank_0_can_read_are_refused(tmp_path: Path) -> None:
    write(tmp_path, data=FOUR | {"name": "failing:own_digits"})
    done = train(2, tmp_path, "run")
    [said] = said_lines(done)
    assert done.returncode == 1
    assert said.startswith("stepctl: rank 1 on ")
    assert "digits-1.npz" in said


# --- refusals


@needs_mpi
@pytest.mark.parametrize(
    ("sections", "arguments", "text"),
    [
        ({"data": FOUR | {"shards": 3}}, (), "data.shards: 3 cannot be dealt out evenly to 2 processes; start as many "
         "as divide it (1, 3), or start a new run with data.shards a multiple of 2"),
        ({"data": FOUR | {"shards": 3}}, ("--dry-run",), "as many as divide it (1, 3)"),
        ({"task": {"name": "failing:Indivisible"}}, (), "cannot be shared by 2 processes"),
        ({"sed": 1}, (), "unknown key; did you mean 'seed'?"),
        ({}, ("--bogus",), "No such option"),
        ({}, ("--json",), "--json prints the plan of --dry-run"),
    ],
    ids=["shards", "shards, dry run", "task", "config", "option", "options"],
)  # fmt: skip
def test_a_refusal_is_said_once(sections: Any, arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    write(tmp_path, **sections)
    done = train(2, tmp_path, "run", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(text) == 1
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_what_is_asked_of_a_job_is_answered_once(tmp_path: Path) -> None:
    write(tmp_path)
    assert train(2, tmp_path, "run", "--dry-run").stdout.count("parameters ") == 1
    assert not (tmp_path / "run").exists()
    assert (
        run_python([], "-m", "stepctl", "train", "--config", "config.yaml", "--run-dir", "run", cwd=tmp_path).returncode
        == 0
    )
    done = train(2, tmp_path, "run", "--or-resume", "--max-time", "1s", "--last-step", 10**9)
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("(max_time 1 s)") == len(done.stderr.splitlines()) == 1
    step = job(2, "inspect", "run", "--step", cwd=tmp_path)
    assert step.stdout == f"{ends(tmp_path / 'run')[-1]['step']}\n"


@pytest.mark.skipif(missing() == "mpi4py is not installed", reason=missing())
def test_a_launcher_of_another_mpi_is_found_out(tmp_path: Path) -> None:
    """To mpi4py's MPI each process is alone then; started together they would all write the one run."""
    write(tmp_path)
    for rank in ("0", "1"):
        env = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": rank}
        done = run_python([], "-m", "stepctl", "train", "--config", "config.yaml", cwd=tmp_path, env=env)
        assert done.returncode == 2
        assert ("2 processes were started together" in done.stderr) == (rank == "0")
        assert len(done.stderr.splitlines()) == (rank == "0")
    assert not (tmp_path / "runs").exists()


def test_without_mpi4py_a_job_says_what_to_install_and_one_process_needs_none(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    for size, rank, code, lines in (("2", "0", 2, 1), ("2", "1", 2, 0), ("1", "0", 0, 0)):
        env = {"PYTHONPATH": path, "PMI_SIZE": size, "PMI_RANK": rank}
        done = run_python([], "-m", "stepctl", "train", "--config", "config.yaml", "-q", cwd=tmp_path, env=env)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("pip install 'stepctl[mpi]'") == len(done.stderr.splitlines()) == lines
