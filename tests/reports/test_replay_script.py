"""`verify --replay A:B -- COMMAND` repeats the steps of a script on a copy, and compares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from tests.support.run_files import file_contents

pytestmark = pytest.mark.process

SCRIPT = """
import sys
import numpy as np
import stepctl

state = {"x": np.zeros(2), "history": [], "rng": np.random.default_rng(7)}
with stepctl.loop("run", state, last_step=20, checkpoint_every=5, keep_last=None) as run:
    for step in run:
        state["x"] += SCALE * (run.rng("a").random(2) + state["rng"].random(2))
        state["history"].append(int(run.rng("b").integers(100)))
        run.log(norm=float(state["x"] @ state["x"]))
open("after.txt", "a").write("finished ")
"""


def write_script(folder: Path, scale: str = "1.0", name: str = "walk.py") -> Path:
    path = folder / name
    path.write_text(SCRIPT.replace("SCALE", scale))
    return path


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )


def replay(folder: Path, steps: str, *command: str) -> subprocess.CompletedProcess[str]:
    return call(folder, "-m", "stepctl", "verify", "run", "--replay", steps, "--", *command)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a finished run of the script."""
    write_script(tmp_path)
    done = call(tmp_path, "walk.py")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_the_same_script_gives_the_same_bits_and_changes_nothing(folder: Path) -> None:
    before = file_contents(folder)
    done = replay(folder, "5:20", sys.executable, "walk.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"step {step}: bit-identical\n" for step in (10, 15, 20))
    assert file_contents(folder) == before, "neither the run nor the code after the loop"


def test_another_script_gives_other_bits(folder: Path) -> None:
    write_script(folder, scale="1.000001", name="other.py")
    done = replay(folder, "5:20", sys.executable, "other.py")
    assert done.returncode == 1
    first, *differences = done.stdout.splitlines()
    assert first == "step 10: differs"
    assert any(line.startswith("  /state/x: 2 elements differ") for line in differences)
    assert not any("history" in line for line in differences)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        pytest.param(
            (sys.executable, "-c", "raise SystemExit(3)"), 1, id="fails", marks=pytest.mark.faults
        ),
        pytest.param((sys.executable, "-c", "pass"), 1, id="makes no step"),
        pytest.param(("./no-such-command",), 2, id="cannot be started"),
        pytest.param((), 2, id="missing", marks=pytest.mark.faults),
    ],
)
def test_a_command_that_replays_nothing_is_refused(
    folder: Path, command: tuple[str, ...], code: int, snapshot: SnapshotAssertion
) -> None:
    before = file_contents(folder)
    done = replay(folder, "5:20", *command)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.replace(sys.executable, "PYTHON") == snapshot
    assert file_contents(folder) == before


def test_a_command_is_for_replays_of_scripts(folder: Path, snapshot: SnapshotAssertion) -> None:
    done = call(folder, "-m", "stepctl", "verify", "run", "--", "true")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, snapshot)


def test_resume_prints_the_command_of_a_script(folder: Path, snapshot: SnapshotAssertion) -> None:
    before = file_contents(folder)
    done = call(folder, "-m", "stepctl", "resume", "run")
    assert done.returncode == 2
    assert done.stderr.replace(sys.executable, "PYTHON") == snapshot
    assert file_contents(folder) == before


def test_a_fork_is_continued_by_the_script(folder: Path) -> None:
    done = call(folder, "-m", "stepctl", "fork", "run", "--at", "10", "--run-dir", "other")
    assert done.returncode == 0, done.stderr
    assert "its script, given other as run directory" in done.stderr
    script = write_script(folder, name="forked.py")
    script.write_text(script.read_text().replace('"run"', '"other"'))
    assert call(folder, "forked.py").returncode == 0
    compared = call(folder, "-m", "stepctl", "diff", "run", "other")
    assert compared.returncode == 0, compared.stdout
    assert compared.stdout.splitlines()[-1] == "identical"


def test_a_script_that_opens_another_run_is_refused_and_trains_nothing(folder: Path) -> None:
    script = write_script(folder, name="other.py")
    script.write_text(script.read_text().replace('"run"', '"elsewhere"'))
    done = replay(folder, "5:20", sys.executable, "other.py")
    assert done.returncode == 1
    assert "elsewhere: the script opens this run, and the replay is of " in done.stderr
    assert not (folder / "elsewhere").exists()


def test_every_checkpoint_of_a_config_is_compared(folder: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    train = ("train", str(config), "--run-dir", "trained", "-q", "--last-step", "100")
    assert call(folder, "-m", "stepctl", *train, "--set", "checkpoint.every=25").returncode == 0
    done = call(folder, "-m", "stepctl", "verify", "trained", "--replay", "50:100")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "step 75: bit-identical\nstep 100: bit-identical\n"
