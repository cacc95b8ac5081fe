"""Each command parses a ledger once and validates a config once, unless correctness needs more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stepctl.cli.main import cli
from stepctl.config.model import Config
from stepctl.errors import Exit
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.ledger import Ledger
from stepctl.system.sandbox import Sandbox

pytestmark = pytest.mark.training

CONFIG = """\
data: {name: digits, batch_size: 8, validation_fraction: 0.2}
model: {name: mlp, hidden: [4]}
task: {name: classification}
optimizer: {name: adam, learning_rate: {name: cosine, peak: 0.01}}
stop: {last_step: 2}
evaluate: {every: 1}
checkpoint: {every: 1}
"""

# A command, how often it parses a ledger, and how often it validates a whole config.
COUNTS = {
    # ledger: before the data are read, and again once the directory is locked
    "train c.yaml": (2, 1),
    # ledger: whether there is a run to lock, and under the lock
    # config: the run's, and the file's
    "train c.yaml --run-dir runs/a --or-resume --last-step 3": (2, 2),
    "resume runs/a": (1, 0),  # it is finished
    "resume runs/a --num-steps 1": (1, 1),
    "resume runs/a --num-steps 1 --set log.every=5": (1, 2),
    # ledger: the parent's, and twice the child's: before the work, and under its lock
    "fork runs/a --run-dir child": (3, 1),
    "fork runs/a --run-dir child --set log.every=5": (3, 2),
    "plan c.yaml": (0, 1),
    "plan runs/a": (1, 1),
    "plan runs/a --set log.every=5": (1, 2),
    # ledger: before the metrics rows, and after them, because the run may be training
    "verify runs/a": (2, 0),
    "verify runs/a --replay 0:2": (1, 1),
    "runs runs": (3, 0),  # of runs/a, runs/b, and the folder itself
    "prune runs/a --keep-last 1": (1, 0),
    "prune runs/a --keep-last 1 --dry-run": (1, 0),
    "prune runs/a --forget-missing": (1, 0),
    "inspect runs/a": (1, 0),
    "diff runs/a runs/b": (2, 0),
    "plot runs/a --json": (1, 0),
    "config check c.yaml": (0, 1),
}


class Counts:
    """How often ledgers were parsed and configs validated."""

    def __init__(self) -> None:
        self.ledgers = 0
        self.configs = 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with c.yaml and the equal runs runs/a and runs/b, at step 2."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "c.yaml").write_text(CONFIG)
    command = ["train", str(folder / "c.yaml"), "--run-dir", str(folder / "runs/a")]
    assert CliRunner().invoke(cli, command).exit_code == Exit.DONE
    shutil.copytree(folder / "runs/a", folder / "runs/b")
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts from now on; calls in a sandbox are made in this process."""
    found = Counts()
    init = Ledger.__init__
    validate = Config.model_validate.__func__  # type: ignore[attr-defined]

    def counted_init(ledger: Ledger, *arguments: Any) -> None:
        found.ledgers += bool(arguments)
        init(ledger, *arguments)

    def counted_validation(cls: type[Config], value: Any, **options: Any) -> Config:
        found.configs += 1
        return validate(cls, value, **options)

    monkeypatch.setattr(Ledger, "__init__", counted_init)
    monkeypatch.setattr(Config, "model_validate", classmethod(counted_validation))
    monkeypatch.setattr(Sandbox, "_start", lambda self: None)
    monkeypatch.setattr(Sandbox, "call", lambda self, function, *arguments: function(*arguments))
    return found


@pytest.mark.parametrize("command", COUNTS)
def test_a_command_reads_once(
    command: str, trained: Path, tmp_path: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, command.split())
    assert result.exit_code == Exit.DONE, result.output
    assert (counts.ledgers, counts.configs) == COUNTS[command]


def test_every_reading_of_a_ledger_is_counted(trained: Path, counts: Counts) -> None:
    RunDirectory(trained / "runs/a").read_ledger()
    RunDirectory(trained / "runs/a").repair_ledger()
    assert counts.ledgers == 2
