"""The texts of --help fit their column and explain every option; --json is everywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from stepctl.cli.main import cli
from tests.support.runs import make_config, rows, train


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def find(words: tuple[str, ...]) -> click.Command:
    found: click.Command = cli
    for word in words:
        assert isinstance(found, click.Group)
        found = found.commands[word]
    return found


ALL = [*commands()]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_option_is_explained_in_sentences(words: tuple[str, ...]) -> None:
    for parameter in find(words).params:
        if isinstance(parameter, click.Option):
            text = parameter.help or ""
            assert text[:1].isupper(), parameter.opts
            assert text.endswith("."), parameter.opts


@pytest.mark.parametrize("words", ALL, ids=" ".join)
@pytest.mark.parametrize("width", [60, 80, 100])
def test_help_fits_its_column(words: tuple[str, ...], width: int) -> None:
    command = find(words)
    name = " ".join(("stepctl", *words))
    context = click.Context(command, info_name=name, terminal_width=width)
    help_text = command.get_help(context)
    assert max(map(len, help_text.splitlines())) <= width
    assert "<=" not in help_text
    assert "46116860" not in help_text


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_has_json(words: tuple[str, ...]) -> None:
    options = {option for parameter in find(words).params for option in parameter.opts}
    assert "--json" in options


@pytest.mark.training
def test_train_resume_and_fork_print_one_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(make_config(stop={"last_step": 4}, evaluate={"every": 2}), tmp_path / "run")
    forked = json.loads(call("fork", "run", "--run-dir", "new", "--json").stdout)
    assert forked == {
        "run": "new", "step": 4, "target": 4, "forked_from": "run", "stopped": "",
    }  # fmt: skip
    done = call("resume", "new", "--json")
    found = json.loads(done.stdout)
    assert (found["step"], found["local_step"], found["done"]) == (4, 0, True)
    assert "nothing to do" in found["reason"]
    done = call("resume", "run", "--last-step", 6, "--json", "-q")
    assert (done.exit_code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    kept = ("run", "step", "local_step", "target", "done", "reason")
    assert [found[key] for key in kept] == ["run", 6, 2, 6, True, "last_step 6"]
    found["metrics"]["train"].pop("samples_per_second")
    assert found["metrics"] == {row["kind"]: row for row in rows(tmp_path / "run")}
    assert os.path.samefile(found["checkpoint"], "run/checkpoints/step-00000006.h5")
    config = make_config(stop={"last_step": 3})
    (tmp_path / "c.yaml").write_text(json.dumps(config.plain()))
    found = json.loads(call("train", "c.yaml", "--json", "-q").stdout)
    assert (found["run"], found["step"], found["local_step"]) == ("runs/c", 3, 3)
    planned = json.loads(call("train", "c.yaml", "--run-dir", "d", "--dry-run", "--json").stdout)
    assert planned["steps"] == [0, 3]
