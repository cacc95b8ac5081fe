"""`--from-step` is completed by the next resume if a kill interrupts it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from stepctl.reports.verify import verify
from tests.support.runs import forked, make_config, resume, rows, train
from tests.support.stops import some_of

LAST = 12


class Killed(BaseException):
    """Stands for a kill."""


def config() -> Any:
    return make_config(
        model={"name": "linear"},
        stop={"last_step": LAST},
        checkpoint={"every": 2, "keep_last": None},
        log={"every": 1},
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    train(config(), path)
    return path


def killed_going_back(run: Path, renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go back to step 4; a kill comes after so many files were set aside."""
    real, done = os.rename, []

    def rename(source: Any, target: Any, **options: Any) -> None:
        if ".aside-" in str(target):
            if len(done) == renames:
                raise Killed
            done.append(target)
        real(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(Killed):
            resume(run, from_step=4, last_step=LAST)
    assert len(done) == renames


@pytest.mark.training
@pytest.mark.parametrize("renames", some_of(range(4), every=2))  # of steps 12, 10, 8 and 6
def test_a_kill_between_the_renames_does_not_revert_it(
    renames: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    killed_going_back(run, renames, monkeypatch)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    newest = LAST - 2 * renames
    assert f"step-{newest:08d}.h5" in left
    assert not [name for name in left if name.endswith(".h5") and name > f"step-{newest:08d}.h5"], (
        "the newest go first"
    )
    assert verify(str(run))[1] == []
    resume(run, last_step=5)
    assert json.loads((run / "ledger.jsonl").read_text().splitlines()[-1])["step"] == 5
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {f"step-{step:08d}.h5.aside-1" for step in (6, 8, 10, 12)} < names
    assert not {f"step-{step:08d}.h5" for step in (6, 8, 10, 12)} & names
    assert verify(str(run))[1] == []
    resume(run, last_step=LAST)
    assert rows(run) == rows(unbroken)
    assert verify(str(run))[1] == []


@pytest.mark.training
def test_retrained_checkpoints_are_not_set_aside_again(unbroken: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    resume(run, from_step=4, last_step=8)
    for path in (run / "checkpoints").glob("*.aside-*"):
        path.unlink()  # by the user
    resume(run, last_step=9)
    assert not list((run / "checkpoints").glob("*.aside-*"))
    assert json.loads((run / "ledger.jsonl").read_text().splitlines()[-1])["local_step"] == 1


@pytest.mark.process
def test_a_fork_begins_where_the_run_went_back_to(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    killed_going_back(run, 1, monkeypatch)
    assert forked(run, tmp_path / "child").step == 4


@pytest.mark.training
@pytest.mark.parametrize(
    "name", ["step-00000006.h5.aside-../../x", "x", "step-00000006.h5", 7, None]
)
def test_a_ledger_entry_that_does_not_name_a_file_set_aside_is_ignored(
    name: Any, unbroken: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    start = json.loads((run / "ledger.jsonl").read_text().splitlines()[0])
    with open(run / "ledger.jsonl", "a") as file:
        file.write(json.dumps({**start, "segment": 2, "step": 4, "set_aside": [name]}) + "\n")
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    resume(run, last_step=LAST)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


@pytest.mark.training
def test_a_checkpoint_that_the_user_puts_back_stays(unbroken: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    resume(run, from_step=4, last_step=6)
    back = run / "checkpoints" / "step-00000012.h5"
    back.with_name(f"{back.name}.aside-1").rename(back)
    assert resume(run, from_step=12).counters.global_step == LAST
    assert back.exists()


@pytest.mark.training
def test_a_step_requested_after_a_kill_replaces_the_previous_request(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    killed_going_back(run, 1, monkeypatch)
    resume(run, from_step=8, last_step=LAST)
    assert rows(run) == rows(unbroken)
    assert (run / "checkpoints" / "step-00000008.h5").exists()
    assert verify(str(run))[1] == []
