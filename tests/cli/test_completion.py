"""Shell completion of paths and options, and its speed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete, get_completion_class

import stepctl
from stepctl.cli.completion import use_own_classes
from stepctl.cli.main import cli
from stepctl.cli.parameter_types import Place

ROOT = Path(stepctl.__file__).parents[1]
RUNS = ["resume", "fork", "prune", "plot", "runs"]  # whose argument is a folder
ANY = ["train", "plan", "inspect", "verify", "diff", "config check"]


def completed(arguments: list[str], incomplete: str = "x") -> list[tuple[str, str]]:
    completion = ShellComplete(cli, {}, "stepctl", "_STEPCTL_COMPLETE")
    return [(item.type, item.value) for item in completion.get_completions(arguments, incomplete)]


@pytest.mark.parametrize(
    ("command", "kind"), [*((name, "dir") for name in RUNS), *((name, "file") for name in ANY)]
)
def test_an_argument_completes_to_paths(command: str, kind: str) -> None:
    assert completed(command.split(), "~/$A/ru") == [(kind, "~/$A/ru")]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs, and a folder among them that is none; the current one."""
    for name in ("quick", "quiet", "empty"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("quick", "quiet"):
        (tmp_path / "runs" / name / "ledger.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", ["resume", "fork", "prune", "plot", "plan", "verify", "diff"])
def test_the_name_of_a_run_completes_to_its_path(command: str, runs: Path) -> None:
    both = [("plain", "runs/quick"), ("plain", "runs/quiet")]
    assert completed([command], "qui") == both
    assert completed([command], "") == both
    assert completed([command], "quie") == both[1:]
    kind = "dir" if command in RUNS else "file"
    for path in ("runs/qui", "ru", "e"):  # a path, the beginning of one, and no run's name
        assert completed([command], path) == [(kind, path)]


def test_runs_and_paths_that_begin_alike_are_both_offered(runs: Path) -> None:
    (runs / "quick.csv").touch()
    (runs / "quick.yaml").touch()
    (runs / "quickly").mkdir()
    found = [("plain", "runs/quick"), ("plain", "quickly/")]
    files = [("plain", "quick.csv"), ("plain", "quick.yaml")]
    assert completed(["resume"], "quick") == found
    for command in ("evaluate", "predict", "export", "inspect"):
        assert completed([command], "quick") == [found[0], *files, found[1]]
    assert completed(["inspect"], "quick.") == [("file", "quick.")]
    assert completed(["resume"], "") == [("plain", "runs/quick"), ("plain", "runs/quiet")]


def test_fish_gets_paths_that_it_does_not_prefer_to_the_runs(runs: Path) -> None:
    """It shows what begins with the typed text only, if there is such an answer."""
    (runs / "quick.csv").touch()
    use_own_classes()
    completion_class = get_completion_class("fish")
    assert completion_class is not None
    completion = completion_class(cli, {}, "stepctl", "_STEPCTL_COMPLETE")
    found = completion.get_completions(["inspect"], "quick")
    assert [item.value for item in found] == ["runs/quick", f"{runs}/quick.csv"]
    found = completion.get_completions(["inspect"], "runs/q")
    assert [(item.type, item.value) for item in found] == [("file", "runs/q")]


def test_keys_of_a_config_are_completed() -> None:
    for command in (
        ["train", "c.yaml"],
        ["resume", "runs/a"],
        ["fork"],
        ["plan"],
        ["config", "check"],
    ):
        assert completed([*command, "--set"], "optimizer.learning_rate_") == [
            ("plain", "optimizer.learning_rate_multipliers=")
        ]
    assert completed(["resume", "--allow-change"], "optimizer.cl") == [
        ("plain", "optimizer.clip_norm")
    ]
    assert completed(["train", "--set"], "seed=1") == []


def place_options() -> list[tuple[str, str, str]]:
    return [
        (name, option, "dir" if parameter.metavar in ("DIR", "NEW") else "file")
        for name, command in cli.commands.items()
        for parameter in command.params
        if isinstance(parameter.type, Place) and isinstance(parameter, click.Option)
        for option in parameter.opts
    ]


@pytest.mark.parametrize(("command", "option", "kind"), place_options())
def test_an_option_completes_to_paths(command: str, option: str, kind: str) -> None:
    assert completed([command, option]) == [(kind, "x")]


def test_there_are_such_options() -> None:
    assert {option for _, option, _ in place_options()} >= {
        "--config",
        "--run-dir",
        "--runs",
        "--png",
        "--output",
    }


VARIABLES = {
    "bash": {"COMP_WORDS": "stepctl resume ru", "COMP_CWORD": "2"},
    "zsh": {"COMP_WORDS": "stepctl resume ru", "COMP_CWORD": "2"},
    "fish": {"COMP_WORDS": "stepctl resume", "COMP_CWORD": "ru"},
    "bash, a key": {"COMP_WORDS": "stepctl train --set see", "COMP_CWORD": "3"},
}
ANSWERS = {
    "bash": "dir,ru\n",
    "zsh": "dir\nru\n_\n",
    "fish": "dir,ru\n",
    "bash, a key": "plain,seed=\n",
}


@pytest.mark.process
@pytest.mark.parametrize("shell", VARIABLES)
def test_each_shell_gets_its_answer_without_numpy(shell: str) -> None:
    """A key press must not wait for a library."""
    code = (
        "import sys; sys.argv = ['stepctl']\n"
        "from stepctl.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print('LOADED', *{'numpy', 'h5py', 'pydantic', 'yaml', 'rich'} & set(sys.modules))"
    )
    variables = (
        os.environ
        | VARIABLES[shell]
        | {"_STEPCTL_COMPLETE": f"{shell.partition(',')[0]}_complete", "PYTHONPATH": str(ROOT)}
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    answer, _, loaded = done.stdout.rpartition("LOADED")
    assert loaded == "\n"
    assert answer.split() == ANSWERS[shell].split()


@pytest.mark.process
def test_bash_completes_a_run(tmp_path: Path) -> None:
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quiet.txt").touch()
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    command = bin_folder / "stepctl"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m stepctl "$@"\n')
    command.chmod(0o755)
    (tmp_path / "runs" / "quickstart" / "ledger.jsonl").touch()
    script = """
        eval "$(_STEPCTL_COMPLETE=bash_source stepctl)"
        compopt() { [ "$2" = dirnames ] && mapfile -t COMPREPLY < <(compgen -d "${COMP_WORDS[2]}"); echo "$2"; }
        COMP_WORDS=(stepctl resume runs/qui) COMP_CWORD=2 COMPREPLY=()
        _stepctl_completion stepctl
        printf '%s\\n' "${COMPREPLY[@]}"
        COMP_WORDS=(stepctl resume qui) COMP_CWORD=2 COMPREPLY=()
        _stepctl_completion stepctl
        printf '%s\\n' "${COMPREPLY[@]}"
        touch 'qui ck.csv'
        mkdir quilt
        COMP_WORDS=(stepctl inspect qui) COMP_CWORD=2 COMPREPLY=()
        _stepctl_completion stepctl
        printf '%s\\n' "${COMPREPLY[@]}"
        COMP_WORDS=(stepctl train --set see) COMP_CWORD=3 COMPREPLY=()
        _stepctl_completion stepctl
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    variables = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    answers = ["dirnames", "runs/quickstart", "runs/quickstart"]
    answers += [
        "nospace",
        "runs/quickstart",
        "qui\\ ck.csv",
        "quilt/",
    ]  # with files beside the runs
    answers += ["nospace", "seed="]
    assert done.stdout.splitlines() == answers, done.stderr
