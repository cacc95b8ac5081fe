"""Commands in messages can be pasted into a shell, whatever the run is called."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.errors import printable
from stepctl.system import shell
from tests.support.runs import BASE, make_config, train

PACKAGE = Path(stepctl.__file__).parent
ODD = [
    "a b",
    "it's",
    "$HOME",
    "a;b",
    "a\nb",
    "tab\there",
    "back\\slash",
    "`x`",
    "é",
    "-x",
    "\udcff",
    "a&&b",
    "~",
    "'\n",
]


@pytest.mark.process
@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_shell_reads_the_words_back(name: str) -> None:
    line = shell.command("resume", name, "--set", name)
    assert line.isprintable()
    assert printable(line) == line
    done = subprocess.run(
        ["bash", "-c", f"stepctl() {{ printf '%s\\0' \"$@\"; }}; {line}"],
        capture_output=True,
        check=True,
    )
    command, path, *options = (os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1])
    assert (command, options) == ("resume", ["--set", name])
    assert os.path.normpath(path) == name
    assert not path.startswith("-")


def test_a_plain_name_stays_plain() -> None:
    assert shell.command("resume", "runs/quickstart") == "stepctl resume runs/quickstart"


def said(*arguments: str) -> str:
    return CliRunner().invoke(cli, arguments).stderr


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each stepctl command that a message ends in, or that a bracket or a comma ends."""
    for line in text.splitlines():
        for start in range(len(line)):
            if line.startswith("stepctl resume ", start) or line.startswith(
                "stepctl inspect ", start
            ):
                words = shlex.split(line[start:].partition(")")[0])
                yield [word.rstrip(",;") for word in words]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    train(make_config(stop={"last_step": 2}), Path("a b"))
    Path("c.yaml").write_text(yaml.dumps({**BASE, "stop": {"last_step": 2}}))
    return "a b"


REFUSALS: dict[str, tuple[str, ...]] = {
    "a run is there": ("train", "--config", "c.yaml", "--run-dir", "a b"),
    "a fork": ("fork", "a b", "--run-dir", "c d"),
    "stopped early": (
        "train",
        "c.yaml",
        "--run-dir",
        "c d",
        "--last-step",
        "100000",
        "--max-time",
        "0.001s",
    ),
    "the loss is not finite": (
        (
            "train",
            "c.yaml",
            "--run-dir",
            "c d",
            "--set",
            "optimizer.learning_rate=1e30",
            "--last-step",
            "90",
        )
    ),
}


@pytest.mark.training
@pytest.mark.parametrize("case", REFUSALS)
def test_messages_quote_the_run(case: str, run: str) -> None:
    text = said(*REFUSALS[case])
    found = list(commands(text))
    assert found, text
    for words in found:
        assert words[2] in ("a b", "c d"), text


@pytest.mark.training
def test_a_missing_config_names_a_command_that_works(run: str) -> None:
    (Path(run) / "config.yaml").unlink()
    (words,) = commands(said("resume", run))
    assert words == ["stepctl", "inspect", "a b"]


def test_messages_to_python_name_python_calls(tmp_path: Path) -> None:
    config: dict[str, Any] = {**BASE, "stop": {"last_step": 2}}
    run = stepctl.create(config, tmp_path / "it's", say=lambda message: None)
    run.close()
    with pytest.raises(stepctl.errors.StepctlError, match="continue with: ") as caught:
        run.step()
    call = ast.parse(str(caught.value).rpartition("continue with: ")[2], mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.literal_eval(call.args[0]) == str(tmp_path / "it's")


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_message_puts_a_command_together_by_hand(path: Path) -> None:
    """`shell.command` does, which quotes."""
    by_hand = re.compile(rf"stepctl ({'|'.join(cli.commands)}) [^:]*$")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            for before, after in itertools.pairwise(node.values):
                if isinstance(before, ast.Constant) and isinstance(after, ast.FormattedValue):
                    assert not by_hand.search(str(before.value)), f"{path.name}:{node.lineno}"
