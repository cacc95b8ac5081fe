"""A resume reports lost checkpoints, later formats and unreadable records."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint import user_block
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.errors import Exit
from stepctl.models.layers.dense import Dense
from stepctl.programs.one_model import OneModel
from stepctl.runs import open as open_module
from stepctl.training import build
from tests.support.messages import without_paths
from tests.support.runs import BASE, make_config, resume, rows, train
from tests.support.stops import some_of

pytestmark = pytest.mark.training


SMALL = {
    **BASE,
    "stop": {"last_step": 6},
    "log": {"every": 1},
    "evaluate": {"every": 2},
    "checkpoint": {"every": 2, "keep_last": None},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.yaml").write_text(yaml.dumps(SMALL))
    train(make_config(**SMALL), folder / "run")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path) -> Path:
    """A run of steps 0, 2, 4 and 6, in the working directory."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.h5"


# --- lost checkpoints

COMMANDS = {
    "resume": ["resume", "run", "-q"],
    "train --or-resume": ["train", "--config", "c.yaml", "--run-dir", "run", "--or-resume", "-q"],
    "fork": ["fork", "run", "--run-dir", "new"],
    "plan": ["plan", "run"],
    "inspect": ["inspect", "run", "--step"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_newest_checkpoint_that_is_gone_is_reported(command: str, run: Path) -> None:
    checkpoint(run, 6).unlink()
    done = call(*COMMANDS[command])
    assert done.exit_code == Exit.DONE
    line = "step-00000006.h5: acknowledged in ledger.jsonl, but missing; using step-00000004.h5"
    assert done.stderr.splitlines().count(line) == 1
    assert call("resume", "run", "-q").exit_code == Exit.DONE
    done = (
        call(*COMMANDS[command][:-1], "--help") if command == "fork" else call(*COMMANDS[command])
    )
    assert "missing" not in done.stderr, "it is there again"


def test_several_that_are_gone_are_one_line(run: Path, snapshot: SnapshotAssertion) -> None:
    for step in (2, 4, 6):
        checkpoint(run, step).unlink()
    said = list[str]()
    resume(run, say=said.append)
    assert said == snapshot


def test_an_older_one_that_is_gone_is_no_matter_of_a_resume(run: Path) -> None:
    checkpoint(run, 2).unlink()
    resume(run, last_step=7, say=pytest.fail)


def test_missing_checkpoints_suggest_an_unmounted_disk_first(run: Path) -> None:
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    done = call("resume", "run")
    assert done.exit_code == Exit.NO_CHECKPOINT
    assert (
        "all are missing); if they are on another disk, mount it; else start again" in done.stderr
    )


# --- a later format


def write_later_format(path: Path) -> None:
    """Replace the first 512 bytes by those of a format that is yet to come."""
    content = path.read_bytes()
    first = f"stepctl-checkpoint {user_block.VERSION + 1}\ndigests: of some other kind\n".encode()
    path.write_bytes(first.ljust(user_block.SIZE, b"\0") + content[user_block.SIZE :])


LATER = (
    f"written by a newer stepctl (format version {user_block.VERSION + 1}; "
    f"this one reads up to {user_block.VERSION})"
)


def test_a_checkpoint_of_a_later_format_is_reported_and_an_older_one_used(
    run: Path, snapshot: SnapshotAssertion
) -> None:
    write_later_format(checkpoint(run, 6))
    said = list[str]()
    resume(run, last_step=7, say=said.append)
    assert said == snapshot
    assert checkpoint(run, 6).with_suffix(".h5.aside-1").exists()


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_checkpoints_of_a_newer_stepctl_do_not_suggest_a_new_run(
    command: str, damaged: bool, run: Path
) -> None:
    for step in (0, 2, 4, 6):
        write_later_format(checkpoint(run, step))
    if damaged:
        checkpoint(run, 4).write_bytes(b"junk")
    done = call(*COMMANDS[command])
    assert done.exit_code == Exit.NO_CHECKPOINT
    assert (
        f"run/checkpoints: no checkpoint that this stepctl can read (step-00000006.h5: {LATER}"
        in done.stderr
    )
    assert "start" not in done.stderr


# --- metrics.jsonl

UNREADABLE = {
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "UTF-16 without a mark": lambda content: content.decode().encode("utf-16-le"),
    "a line with NULs": lambda content: content.replace(b'"loss"', b'"lo\0\0"', 1),
    "a line that is half there": lambda content: content[40:],
    "a note of the user": lambda content: b"# a good one\n" + content,
    "a row without a step": lambda content: b'{"kind": "train", "loss": 1}\n' + content,
}


@pytest.mark.parametrize("case", some_of(UNREADABLE, every=2))
def test_rows_that_cannot_be_read_are_kept_aside_and_reported(case: str, run: Path) -> None:
    metrics, said = run / "metrics.jsonl", list[str]()
    before = UNREADABLE[case](metrics.read_bytes())
    metrics.write_bytes(before)
    resume(run, last_step=8, say=said.append)
    (line,) = said
    lines = "removed (1 unreadable line|[0-9]+ unreadable lines)"
    assert re.fullmatch(
        rf"{metrics}: {lines}; the original file is kept as metrics\.jsonl\.aside-1", line
    )
    assert (run / "metrics.jsonl.aside-1").read_bytes() == before
    assert [row["step"] for row in rows(run) if row["step"] > 6 and row["kind"] == "train"] == [
        7,
        8,
    ]
    resume(run, last_step=9, say=pytest.fail)
    metrics.write_bytes(b"junk\n" + metrics.read_bytes())
    resume(run, last_step=10, say=said.append)
    assert (run / "metrics.jsonl.aside-2").exists()
    assert (run / "metrics.jsonl.aside-1").read_bytes() == before


@pytest.mark.parametrize("ending", [b"\r", b"\r\n"])
def test_rows_with_other_line_ends_stay(ending: bytes, run: Path, tmp_path: Path) -> None:
    metrics = run / "metrics.jsonl"
    train(make_config(**{**SMALL, "stop": {"last_step": 8}}), tmp_path / "unbroken")
    metrics.write_bytes(metrics.read_bytes().replace(b"\n", ending))
    resume(run, last_step=8, say=pytest.fail)
    assert rows(run) == rows(tmp_path / "unbroken")
    assert b"\r" not in metrics.read_bytes()


def test_a_last_row_whose_line_end_an_editor_removed_stays(run: Path, tmp_path: Path) -> None:
    metrics = run / "metrics.jsonl"
    whole = [
        line for line in metrics.read_bytes().splitlines(keepends=True) if b'"extra"' not in line
    ]
    metrics.write_bytes(b"".join(whole)[:-1])
    resume(run, last_step=7, say=pytest.fail)
    assert metrics.read_bytes().splitlines(keepends=True)[: len(whole)] == whole


@pytest.mark.parametrize("torn", [b'{"step": 7, "kind": "tr', b"\0\0\0\0", b"{"])
def test_an_incomplete_last_line_is_removed_silently(torn: bytes, run: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(torn)
    resume(run, last_step=7, say=pytest.fail)
    assert sorted(os.listdir(run)) == [
        "checkpoints",
        "config.yaml",
        "ledger.jsonl",
        "lock",
        "metrics.jsonl",
    ]


def test_a_ledger_that_cannot_be_read_is_kept_aside_before_it_is_repaired(
    run: Path, snapshot: SnapshotAssertion
) -> None:
    ledger, said = run / "ledger.jsonl", list[str]()
    before = ledger.read_bytes() + b"a note of the user\n{half"
    ledger.write_bytes(before)
    resume(run, last_step=7, say=said.append)
    assert [without_paths(line, RUN=run) for line in said] == snapshot
    assert (run / "ledger.jsonl.aside-1").read_bytes() == before
    resume(run, last_step=8, say=pytest.fail)


# --- what a checkpoint replaces


@pytest.mark.parametrize("of_the_user", [False, True])
def test_weights_that_a_checkpoint_fills_are_not_drawn_and_not_tried(
    of_the_user: bool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for owner, name in ((Dense, "initialize"), (OneModel, "trial")):
        original = getattr(owner, name)

        def call(self: Any, *arguments: Any, original: Any = original, name: str = name) -> Any:
            called.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, call)
    for module in (build, open_module):
        monkeypatch.setattr(module, "has_user_components", lambda: of_the_user)
    state = resume(run, last_step=8)
    assert set(called) == ({"initialize", "trial"} if of_the_user else set())
    assert state.same_bits(
        train(make_config(**{**SMALL, "stop": {"last_step": 8}}), run.parent / "b")
    )


def test_a_model_of_the_user_is_tried_on_every_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code may have changed since the checkpoint."""
    model = {"name": "tests.support.loss_models:Softmax"}
    train(make_config(**{**SMALL, "task": {"name": "loss"}, "model": model}), tmp_path / "run")
    tried: list[object] = []
    monkeypatch.setattr(OneModel, "trial", lambda self, *arguments: tried.append(self))
    resume(tmp_path / "run", last_step=8)
    assert len(tried) == 1


def test_a_changed_config_is_tried(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    monkeypatch.setattr(OneModel, "trial", lambda self, *arguments: tried.append(self))
    monkeypatch.setattr(open_module, "has_user_components", lambda: False)
    resume(run, last_step=7, assignments=("log.every=2",))
    assert len(tried) == 1
