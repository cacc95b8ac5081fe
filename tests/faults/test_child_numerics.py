"""Child processes of the tests compute the same bits as the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stepctl.system import blas
from tests.support.mpi_jobs import ROOT, job, needs_mpi
from tests.support.processes import DEADLINE, start, start_cold
from tests.support.runs import make_config

COMMAND = ["train", "--config", "config.yaml", "--run-dir", "run"]
EXPORTED = {"OPENBLAS_NUM_THREADS": "2", "OPENBLAS_L2_SIZE": "1048576", "NO_COLOR": "1"}


def train_in_a_fork(folder: Path) -> None:
    with start(COMMAND, cwd=folder) as child:
        assert child.wait() == 0, child.said()


def train_in_a_new_interpreter(folder: Path) -> None:
    with start_cold(COMMAND, cwd=folder) as child:
        assert child.wait() == 0, child.said()


def train_in_a_job(folder: Path) -> None:
    done = job(1, *COMMAND, cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "train",
    [train_in_a_fork, train_in_a_new_interpreter, pytest.param(train_in_a_job, marks=needs_mpi)],
)
def test_a_child_computes_the_same_bits_as_the_tests(
    train: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(make_config(stop={"last_step": 1}).text)
    train(tmp_path)
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    start_line = next(line for line in map(json.loads, ledger) if line["event"] == "start")
    assert blas.numerics_differences(start_line["numerics"], blas.set_threads(1)) == []


def test_a_child_computes_the_same_bits_where_a_kernel_is_exported(tmp_path: Path) -> None:
    usual = blas.set_threads(1)["blas_kernel"]
    other = "Nehalem" if usual != "Nehalem" else "Katmai"
    test = f"{__file__}::{test_a_child_computes_the_same_bits_as_the_tests.__name__}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            tmp_path,
            test,
        ],
        cwd=ROOT,
        env=os.environ | EXPORTED | {"OPENBLAS_CORETYPE": other},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stdout
