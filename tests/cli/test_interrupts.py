"""Ctrl-C before training begins exits with 130, whatever exception it surfaces as."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepctl.errors import Exit
from tests.support.mpi_jobs import environment
from tests.support.runs import BASE

pytestmark = pytest.mark.process


INTERRUPTED = "stepctl: interrupted; nothing was changed\n"

# Sends SIGINT where a module is looked for, so that it surfaces in one of several ways.
PROGRAM = """
import os, subprocess, sys, weakref

module, how = sys.argv[1:3]
del sys.argv[1:3]

def interrupt():
    # from another process, as a user's: OpenBLAS sends its own process one
    subprocess.run(["kill", "-INT", str(os.getpid())], check=True)

class Named:
    def __set_name__(self, owner, name):
        interrupt()

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != module:
            return None
        sys.meta_path.remove(self)
        if how == "class body":
            class Body:
                named = Named()
        try:
            interrupt()
        except KeyboardInterrupt:
            if how == "dropped":
                return None
            errors = {"import error": ImportError, "system error": SystemError, "exit": SystemExit}
            raise errors[how]("broken off") from None

sys.meta_path.insert(0, Finder())
from stepctl.__main__ import main
main()
"""

SURFACES = ["class body", "import error", "system error", "exit"]
LOADED_FIRST, LOADED_BY_TRAIN = ["click"], ["yaml", "numpy", "pydantic", "h5py", "own_model"]
MODEL = "from tests.support.user_model import TwoLayers\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = BASE | {"model": {"name": "own_model:TwoLayers"}, "stop": {"last_step": 3}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "own_model.py").write_text(MODEL)
    return tmp_path


def run(folder: Path, *arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("how", SURFACES)
@pytest.mark.parametrize("module", LOADED_FIRST)
def test_ctrl_c_while_the_command_line_is_loaded_exits_130(
    module: str, how: str, folder: Path
) -> None:
    done = run(folder, module, how, "train", "--config", "config.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (Exit.INTERRUPTED, "", "")


@pytest.mark.parametrize(
    ("module", "how"),
    [(module, SURFACES[number % len(SURFACES)]) for number, module in enumerate(LOADED_BY_TRAIN)]
    + [("own_model", "class body"), ("own_model", "dropped")],
)
def test_ctrl_c_while_training_is_built_up_exits_130_and_changes_nothing(
    module: str, how: str, folder: Path
) -> None:
    done = run(folder, module, how, "train", "--config", "config.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (Exit.INTERRUPTED, "", INTERRUPTED)
    assert not list(folder.glob("runs/*/checkpoints/*"))


def test_debug_calls_it_an_interruption_too(folder: Path) -> None:
    done = run(folder, "numpy", "class body", "--debug", "train", "--config", "config.yaml")
    assert (done.returncode, done.stderr) == (Exit.INTERRUPTED, INTERRUPTED)


def test_an_error_without_a_ctrl_c_is_none(folder: Path) -> None:
    (folder / "own_model.py").write_text("raise RuntimeError('of its own')\n")
    done = run(folder, "nothing", "dropped", "train", "--config", "config.yaml")
    assert (done.returncode, "of its own" in done.stderr) == (Exit.USAGE, True)


LATE = """
import os, signal
from stepctl.runs import progress

show_progress = progress.show_progress

def interrupted(*arguments, **options):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    return show_progress(*arguments, **options)

progress.show_progress = interrupted
from stepctl.__main__ import main
main()
"""


def test_one_that_python_drops_at_the_last_moment_stops_before_the_first_step(folder: Path) -> None:
    done = run(folder, "train", "--config", "config.yaml", "--run-dir", "run", program=LATE)
    assert done.returncode == Exit.STOPPED, done.stderr
    assert "stopped at global step 0 (signal SIGINT)" in done.stderr
