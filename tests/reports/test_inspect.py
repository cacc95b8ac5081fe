"""`stepctl inspect` describes a run's newest segment and checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from stepctl.cli.main import cli
from stepctl.errors import Exit
from stepctl.reports.inspect import newest_segment
from stepctl.rundir.ledger import Ledger
from tests.support.runs import make_config, resume, train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that ended at step 4."""
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=generator.normal(size=(60, 4)), y=generator.integers(0, 3, 60))
    data = {"name": "arrays", "path": str(tmp_path / "a.npz"), "batch_size": 8}
    sections: dict[str, Any] = {
        "data": data,
        "model": {"name": "linear"},
        "evaluate": {"every": None},
    }
    train(make_config(**sections, checkpoint={"every": 2}, stop={"last_step": 4}), tmp_path / "run")
    return tmp_path / "run"


def inspect(path: Path, *options: str) -> str:
    result = CliRunner().invoke(cli, ["inspect", str(path), *options])
    assert result.exit_code == Exit.DONE, result.output
    return result.stdout


def newest(path: Path) -> Any:
    return json.loads(inspect(path, "--json"))["segment"]


def the_line(path: Path) -> str:
    (line,) = (line for line in inspect(path).splitlines() if line.startswith("segment"))
    return line


def ended(path: Path) -> str:
    lines = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
    return str(next(line["time"] for line in reversed(lines) if line["event"] == "end"))


@pytest.mark.training
def test_a_segment_that_ended_says_where_when_and_why(run: Path) -> None:
    for number, first, last in ((1, 0, 4), (2, 4, 9)):
        resume(run, last_step=last)
        found = newest(run)
        assert [found[key] for key in ("number", "from", "to", "target")] == [
            number,
            first,
            last,
            last,
        ]
        assert (found["ended"], found["reason"]) == (ended(run), f"last_step {last}")
        words = f"from step {first} to {last}, target {last}  ended {ended(run)}: last_step {last}"
        assert the_line(run) == f"segment     {number}  {words}"


@pytest.mark.training
def test_one_without_an_end_runs_or_was_killed_at_or_after_its_newest_checkpoint(run: Path) -> None:
    resume(run, last_step=9)
    *lines, end = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    assert '"end"' in end
    (run / "ledger.jsonl").write_text("".join(lines))
    found = newest(run)
    assert [found[key] for key in ("number", "from", "to", "target")] == [2, 4, 9, 9]
    assert found["ended"] is found["reason"] is None
    assert the_line(run) == "segment     2  from step 4 to 9, target 9  running or killed"


@pytest.mark.training
def test_a_checkpoint_has_no_segment_and_a_run_that_was_never_trained_none(run: Path) -> None:
    assert "segment" not in json.loads(inspect(run / "checkpoints" / "step-00000004.h5", "--json"))
    (run / "ledger.jsonl").unlink()
    assert newest(run) is None
    assert "segment" not in inspect(run).partition("\n\n")[0]


@pytest.mark.parametrize("time", [None, 3, ["x"]])
def test_a_ledger_of_odd_lines_is_read_all_the_same(time: Any) -> None:
    start = {"event": "start", "segment": 1, "step": 2, "target": 3, "data": "", "time": time}
    end = {"event": "end", "segment": 1, "step": 3, "reason": "why", "time": time}
    assert newest_segment(Ledger()) is None
    assert newest_segment(Ledger([end])) is None
    found = newest_segment(Ledger([start, end]))
    assert found is not None
    assert found["ended"] == "?"


@pytest.mark.training
def test_a_hostile_ledger_cannot_control_the_terminal(run: Path) -> None:
    path = run / "ledger.jsonl"
    path.write_text(path.read_text().replace('"last_step 4"', json.dumps("\x1b[2J\nforged")))
    assert the_line(run).endswith(r": \x1b[2J\nforged")
