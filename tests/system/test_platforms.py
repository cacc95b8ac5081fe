"""Unsupported platforms give one line: Windows, and scripts that mpiexec starts several times."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import stepctl
from stepctl.errors import ConfigError
from tests.support.runs import BASE

ROOT = Path(stepctl.__file__).parents[1]
WINDOWS = """
import signal, sys
sys.platform = "win32"
for name in ("fcntl", "resource", "termios", "pty"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU", "pthread_sigmask"):
    delattr(signal, name)
"""
LINE = "stepctl needs Linux or macOS, and this is win32; on Windows it runs in WSL"


def on_windows(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WINDOWS + code], capture_output=True, text=True, check=False
    )


@pytest.mark.process
@pytest.mark.parametrize("arguments", ["", "--help", "train x.yaml", "doctor", "runs"])
def test_the_command_line_needs_a_unix(arguments: str) -> None:
    done = on_windows(
        f"sys.argv = ['stepctl', *{arguments.split()}]\nfrom stepctl.__main__ import main; main()"
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"stepctl: {LINE}")
    assert done.stderr.count("\n") == 1


@pytest.mark.process
@pytest.mark.parametrize(
    "use",
    [
        "from stepctl import create",
        "import stepctl; stepctl.create",
        "import stepctl; stepctl.resume",
        "import stepctl; stepctl.load_checkpoint",
        "import stepctl; stepctl.Hook",
        "from stepctl import *",
    ],
)
def test_the_library_needs_a_unix(use: str) -> None:
    done = on_windows(use)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"stepctl.errors.UnsupportedSystemError: {LINE}")


@pytest.mark.process
def test_commands_that_need_no_extra_work_everywhere() -> None:
    done = on_windows("import stepctl; print(stepctl.__version__, 'create' in dir(stepctl))")
    assert (done.stdout, done.stderr) == (f"{stepctl.__version__} True\n", "")


def test_the_package_names_its_systems() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    systems = {name for name in project["classifiers"] if name.startswith("Operating System")}
    assert systems == {"Operating System :: POSIX :: Linux", "Operating System :: MacOS"}
    readme = (ROOT / "README.md").read_text()
    for system in ("Linux", "macOS", "WSL"):
        assert system in readme


# --- the library, started as the ranks of a job

LAUNCHERS = {
    "Hydra": {"PMI_RANK": "{rank}", "PMI_SIZE": "2"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "{rank}"},
    "Slurm": {"PMIX_RANK": "{rank}", "SLURM_STEP_NUM_TASKS": "2"},
}
ALONE = "the library runs in one process"


@pytest.mark.training
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_rank_of_a_job_holds_a_run(
    launcher: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with stepctl.create({**BASE, "stop": {"last_step": 2}}, run, say=lambda message: None):
        pass
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value.format(rank=rank))
    with pytest.raises(ConfigError, match=ALONE):
        stepctl.create(BASE, tmp_path / "new")
    with pytest.raises(ConfigError, match=ALONE):
        stepctl.resume(run)
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert stepctl.global_step(run) == 0  # reading is for everybody


@pytest.mark.training
def test_a_job_of_one_rank_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    with stepctl.create(
        {**BASE, "stop": {"last_step": 2}}, tmp_path / "run", say=lambda message: None
    ) as run:
        run.train()


@pytest.mark.process
def test_mpiexec_of_a_script_says_how_to_do_it(tmp_path: Path) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("needs mpiexec")
    script = tmp_path / "script.py"
    script.write_text(
        f"import stepctl\nwith stepctl.create({BASE!r}, 'run') as run:\n    run.train()\n"
    )
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PMI")}
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, script],
        cwd=tmp_path,
        env=variables | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert ALONE in done.stderr
    assert "mpiexec -n 2 stepctl train" in done.stderr
    assert not (tmp_path / "run").exists()
