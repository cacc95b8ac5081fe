"""~ and $VARIABLES in paths on the command line, in a config and in Python."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.config import registry, yaml
from stepctl.config.registry import File
from stepctl.data import NAMES
from stepctl.errors import ConfigError
from stepctl.system.files import expand_path
from tests.support.messages import normalize

CONFIG: dict[str, Any] = {
    "data": {"name": "arrays", "path": "a.npz", "batch_size": 2},
    "model": {"name": "linear"},
    "task": {"name": "classification"},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "stop": {"last_step": 3},
    "numerics": {"threads": 1},
}
NOT_SET = "the environment variable NOWHERE is not set; set it, or give the full path"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with data in it; the current folder is another."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PLACE", str(home))
    monkeypatch.delenv("NOWHERE", raising=False)
    np.savez(home / "a.npz", x=np.arange(20.0).reshape(10, 2), y=np.arange(10) % 3)
    (home / "c.yaml").write_text(
        yaml.dumps(CONFIG | {"data": {**CONFIG["data"], "path": "$PLACE/a.npz"}})
    )
    return home


def call(*arguments: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == expect, result.stderr
    return result


FORMS = ["~/{}", "$PLACE/{}", "${{PLACE}}/{}", "$HOME/../home/{}"]


@pytest.mark.parametrize("form", FORMS)
def test_a_data_path_is_expanded_when_the_run_starts(
    form: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("train", "~/c.yaml", "--run-dir", "run", "--set", f"data.path={form.format('a.npz')}")
    frozen = yaml.load("run/config.yaml").value["data"]["path"]
    assert frozen == str(home / "a.npz")
    monkeypatch.delenv("PLACE")  # from here on the run needs none of it, nor this folder
    monkeypatch.setenv("HOME", "/")
    monkeypatch.chdir("/")
    run = home.parent / "here" / "run"
    call("resume", str(run), "--num-steps", "2")
    assert stepctl.global_step(run) == 5


FILE_ARGUMENTS = [
    (name, argument)
    for name in NAMES
    for argument, known in registry.arguments(registry.resolve("data", name)).items()
    if known.hint in (File, File | None)
]


@pytest.mark.parametrize(("name", "argument"), FILE_ARGUMENTS)
def test_every_file_of_a_config_is_expanded(name: str, argument: str, home: Path) -> None:
    needed = (
        dict.fromkeys(("path", "images", "labels"), "/x")
        & registry.arguments(registry.resolve("data", name)).keys()
    )
    section = {"name": name, **dict.fromkeys(needed, "/x")}
    checked, problems = registry.check("data", {**section, argument: "~/$PLACE/y"})
    assert (checked[argument], problems) == (f"{home}{home}/y", [])
    checked, problems = registry.check("data", {**section, argument: "$NOWHERE/y"})
    assert [(problem.path, problem.message) for problem in problems] == [
        ((argument,), f"$NOWHERE/y: {NOT_SET}")
    ]


def test_the_files_of_a_config_are_known() -> None:
    assert {name for name, _ in FILE_ARGUMENTS} == {"arrays", "csv", "idx", "hdf5"}


def test_an_undefined_variable_is_one_line_with_its_place(
    home: Path, snapshot: SnapshotAssertion
) -> None:
    Path("c.yaml").write_text(yaml.dumps(CONFIG).replace("a.npz", "$NOWHERE/a.npz"))
    result = call("train", "c.yaml", expect=2)
    assert normalize(result.stderr) == snapshot
    assert os.listdir() == ["c.yaml"]


PLACES = [
    ("train", "{}/c.yaml"),
    ("train", "--config", "{}/c.yaml"),
    ("train", "~/c.yaml", "--run-dir", "{}/new"),
    ("resume", "{}/run"),
    ("fork", "{}/run", "--run-dir", "new"),
    ("fork", "~/run", "--run-dir", "{}/new"),
    ("plan", "{}/run"),
    ("plan", "{}/c.yaml"),
    ("plan", "{}/c.yaml", "--png", "{}/x.png"),
    ("inspect", "{}/run"),
    ("verify", "{}/run"),
    ("diff", "{}/run", "{}/run"),
    ("prune", "{}/run"),
    ("runs", "{}"),
    ("plot", "{}/run"),
    ("plot", "{}/run", "-o", "{}/x.png"),
    ("config", "check", "{}/c.yaml"),
    ("doctor", "--runs", "{}/runs"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "a.npz", x=np.arange(20.0).reshape(10, 2), y=np.arange(10) % 3)
    data = {**CONFIG["data"], "path": str(folder / "a.npz")}
    with stepctl.create({**CONFIG, "data": data}, folder / "run", say=lambda message: None) as run:
        run.train()
    return folder / "run"


@pytest.mark.process
@pytest.mark.parametrize("arguments", PLACES, ids=" ".join)
def test_every_path_of_the_command_line_is_expanded(
    arguments: tuple[str, ...], home: Path, trained: Path
) -> None:
    """As in --run-dir=~/run, which shells leave alone."""
    if "{}/run" in arguments or "~/run" in arguments or arguments[0] == "runs":
        shutil.copytree(trained, home / "run")
    if arguments[0] not in ("doctor", "plot") and "--png" not in arguments:
        call(*(word.format("$PLACE") for word in arguments))
    refused = call(*(word.format("$NOWHERE") for word in arguments), expect=2)
    assert refused.stderr.splitlines()[-1].endswith(NOT_SET)
    assert not Path("$PLACE").exists()
    assert not Path("~").exists()


@pytest.mark.training
def test_python_expands_too(home: Path) -> None:
    def silent(message: str) -> None:
        return

    config = {**CONFIG, "data": {**CONFIG["data"], "path": "~/a.npz"}}
    with stepctl.create(config, "~/run", say=silent) as run:
        run.step()
    assert (home / "run" / "config.yaml").exists()
    with stepctl.resume("$PLACE/run", say=silent, overrides={"data.path": "$PLACE/a.npz"}):
        pass
    assert stepctl.global_step("${PLACE}/run") == stepctl.load_checkpoint("~/run").global_step == 1
    for use in (stepctl.resume, stepctl.global_step, stepctl.load_checkpoint):
        with pytest.raises(ConfigError, match=NOT_SET):
            use("$NOWHERE/run")
    with pytest.raises(ConfigError, match=NOT_SET):
        stepctl.create("~/c.yaml", "$NOWHERE/run")


def test_a_file_of_that_very_name_is_meant(home: Path) -> None:
    for name in ("~", "$PLACE", "a$NOWHERE"):
        Path(name).touch()
        assert expand_path(name) == name


@pytest.mark.parametrize(
    "path", ["a$", "a$1", "$$", "a~b", "cost-5$.csv", "~nobody-of-that-name/x", ""]
)
def test_a_dollar_without_a_name_stays(path: str, home: Path) -> None:
    assert expand_path(path) == path
