"""Output on every stdout: encodings without the letters needed, and terminals without a cursor."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.push import push
from tests.support.runs import BASE, make_config, train
from tests.support.stops import some_of

ROOT = Path(stepctl.__file__).parents[1]
COMMANDS = {
    "init": "init neu-é",
    "train": "train é.yaml --run-dir new-é",
    "train --dry-run": "train é.yaml --dry-run",
    "resume": "resume runs/é --num-steps 1",
    "evaluate": "evaluate runs/é -v",
    "predict": "predict runs/é x.npy -o é.csv",
    "export": "export runs/é -o é.npz",
    "an error of sample": "sample runs/é -o é.npz",
    "fork": "fork runs/é --run-dir new-é",
    "plan": "plan runs/é",
    "inspect": "inspect runs/é",
    "verify": "verify runs/é",
    "diff": "diff runs/é runs/é",
    "prune": "prune runs/é",
    "push": "push runs/é file://HERE/other-é",
    "pull": "pull file://HERE/mirror-é fetched-é",
    "runs": "runs runs",
    "plot": "plot runs/é",
    "plot of two": "plot runs/é runs/ü",
    "config check": "config check é.yaml",
    "config schema": "config schema",
    "doctor": "doctor --runs runs",
    "an error": "resume runs/ö",
    "a usage error": "resume --é",
    "--help": "--help",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("é")
    for name in ("é", "ü"):
        train(make_config(stop={"last_step": 20}), folder / "runs" / name)
    np.save(folder / "x.npy", np.zeros((2, 64)))
    push(RunDirectory(folder / "runs" / "é"), f"file://{folder}/mirror-é", print)
    (folder / "é.yaml").write_text(yaml.dumps({**BASE, "stop": {"last_step": 2}}), encoding="utf-8")
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, cheap: what a command changes is its own."""
    subprocess.run(["cp", "-r", folder, tmp_path / "here"], check=True)
    return tmp_path / "here"


def variables(**more: str) -> dict[str, str]:
    gone = (
        "NO_COLOR",
        "TERM",
        "COLUMNS",
        "LINES",
        "LC_ALL",
        "LANG",
        "PYTHONUTF8",
        "PYTHONIOENCODING",
    )
    return (
        {key: value for key, value in os.environ.items() if key not in gone}
        | {"PYTHONPATH": str(ROOT)}
        | more
    )


def call(command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[bytes]:
    words = command.replace("HERE", str(cwd)).split()
    line = [sys.executable, "-m", "stepctl", *words]
    return subprocess.run(
        line, cwd=cwd, env=variables(**more), capture_output=True, timeout=120, check=False
    )


def test_every_command_is_tried() -> None:
    assert {command.split()[0] for command in COMMANDS.values()} - {"--help"} == set(cli.commands)


@pytest.mark.process
@pytest.mark.parametrize("command", some_of(COMMANDS, every=4))
def test_stdout_need_not_be_utf_8(command: str, here: Path) -> None:
    expected = (
        call(COMMANDS[command], here, PYTHONIOENCODING="utf-8") if command == "verify" else None
    )
    done = call(COMMANDS[command], here, PYTHONIOENCODING="ascii")
    output = done.stdout.decode("ascii"), done.stderr.decode("ascii")  # nothing else comes out
    assert done.returncode == (2 if "error" in command else 0), output
    assert "Traceback" not in output[1]
    if expected is not None:
        assert expected.stdout.decode() == output[0].replace("\\xe9", "é")


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "encoding"), [("runs", "latin-1"), ("plot", "latin-1"), ("verify", "cp437")]
)
def test_letters_of_the_encoding_are_kept(encoding: str, command: str, here: Path) -> None:
    done = call(COMMANDS[command], here, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "é" in done.stdout.decode(encoding)


@pytest.mark.process
def test_the_c_locale_is_enough(here: Path) -> None:
    done = call(COMMANDS["plot"], here, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_a_plot_without_its_symbols_still_shows_the_curves(here: Path) -> None:
    text = call(COMMANDS["plot"], here, PYTHONIOENCODING="ascii").stdout.decode()
    *picture, legend = text.splitlines()
    assert "a training" in legend
    assert "A validation" in legend
    assert sum(line.count("a") for line in picture[1:]) > 10
    assert any(line.count("-") > 40 for line in picture)
    assert "\\u" not in "".join(picture)
    symbols = call(COMMANDS["plot"], here, PYTHONIOENCODING="utf-8").stdout.decode()
    assert "│" in symbols


@pytest.mark.process
def test_a_path_that_is_no_text_is_printed(here: Path) -> None:
    os.rename(here / "runs" / "é", os.fsencode(here / "runs") + b"/\xff")
    for command in ("verify", "diff"):
        paths = [b"runs/\xff"] * (2 if command == "diff" else 1)
        line = [os.fsencode(sys.executable), b"-m", b"stepctl", command.encode(), *paths]
        done = subprocess.run(line, cwd=here, env=variables(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def on_terminal(command: str, cwd: Path, **more: str) -> tuple[int, str]:
    """Run a command on a terminal; return its code and all that it wrote there."""
    master, slave = pty.openpty()
    words = command.replace("HERE", str(cwd)).split()
    line = [sys.executable, "-m", "stepctl", *words]
    with subprocess.Popen(
        line, cwd=cwd, env=variables(**more), stdin=slave, stdout=slave, stderr=slave
    ) as child:
        os.close(slave)
        written = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(master, 65536):
                written += piece
    os.close(master)
    return child.returncode, written.decode()


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "term"),
    [("train", "dumb"), ("resume", "unknown"), ("runs", "dumb"), ("plot", "dumb")],
)
def test_a_dumb_terminal_gets_lines(command: str, term: str, here: Path) -> None:
    code, text = on_terminal(COMMANDS[command], here, TERM=term)
    assert code == 0, text
    assert "\x1b" not in text
    lines = text.split("\r\n")
    assert not any("\r" in line for line in lines)
    if command in ("train", "resume"):
        assert any(
            line.startswith(
                "step 2/2  epoch" if command == "train" else "step 21/21 (local 1)  epoch"
            )
            for line in lines
        )


@pytest.mark.process
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_gets_a_bar(encoding: str, here: Path) -> None:
    code, text = on_terminal(
        "resume runs/é --num-steps 200", here, TERM="xterm", PYTHONIOENCODING=encoding
    )
    assert code == 0, text
    assert "\x1b[" in text
    assert text.isascii() == (encoding == "ascii")


def test_nothing_prints_past_it() -> None:
    """`output.echo` keeps to the encoding of stdout; click's own echo does not."""
    commands = Path(stepctl.__file__).parent / "cli"
    assert [
        path.name for path in sorted(commands.glob("*.py")) if "click.echo(" in path.read_text()
    ] == ["output.py"]
