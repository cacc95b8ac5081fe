"""The programs, stopped after any step, replayed or forked, have the bits and rows of the uninterrupted run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.support.processes import start
from tests.support.program_examples import EXAMPLES, Example
from tests.support.program_runs import FORMS, rows, saved_state, train
from tests.support.run_checks import checkpoints
from tests.support.series_files import contents, rows_to

STOPS = range(31)
SOME_STOPS = (1, 7, 30)
in_both_forms = [
    pytest.mark.parametrize("form", FORMS),
    pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name),
]
in_one_form = pytest.mark.parametrize(
    ("example", "form"),
    [
        pytest.param(
            example,
            form,
            marks=[pytest.mark.faults] if (number + place) % 2 else [],
            id=f"{example.name}-{form}",
        )
        for number, example in enumerate(EXAMPLES)
        for place, form in enumerate(FORMS)
    ],
)
Unbroken = Callable[[Example, str], Path]


def both_forms(test: Callable[..., None]) -> Callable[..., None]:
    for mark in in_both_forms:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Return a function: (example, form) -> the run that was never stopped, with a checkpoint of every step."""
    known: dict[tuple[str, str], Path] = {}

    def find(example: Example, form: str) -> Path:
        key = (example.name, form)
        if key not in known:
            run_dir = tmp_path_factory.mktemp("unbroken") / "run"
            train(example, form, run_dir, checkpoint_every=1)
            assert max(checkpoints(run_dir)) > max(STOPS)
            known[key] = run_dir
        return known[key]

    return find


@pytest.mark.faults
@both_forms
def test_stopped_after_every_step_of_one_run(
    example: Example, form: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    expected = unbroken(example, form)
    run = tmp_path / "run"
    for step in STOPS:
        train(example, form, run, step)
        assert saved_state(run, step) == saved_state(expected, step)
    train(example, form, run)
    assert saved_state(run) == saved_state(expected)
    assert rows(run) == rows(expected)
    assert contents(run) == contents(expected)


@pytest.mark.training
@both_forms
def test_stopped_once(example: Example, form: str, unbroken: Unbroken, tmp_path: Path) -> None:
    stop_once(example, form, SOME_STOPS, unbroken(example, form), tmp_path)


@pytest.mark.faults
@both_forms
def test_stopped_once_after_any_step(
    example: Example, form: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    stop_once(example, form, STOPS, unbroken(example, form), tmp_path)


def stop_once(
    example: Example, form: str, stops: Iterable[int], expected: Path, folder: Path
) -> None:
    """Stop a run after each of the steps, and continue it to its end."""
    for step in stops:
        run = folder / f"stopped-at-{step}"
        train(example, form, run, step)
        train(example, form, run)
        assert saved_state(run) == saved_state(expected), step
        assert rows(run) == rows(expected), step
        assert contents(run) == contents(expected), step


@pytest.mark.process
@in_one_form
def test_a_replay_finds_the_same_bits(
    example: Example, form: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    run = unbroken(example, form)
    last = max(checkpoints(run))
    command = ["verify", run, "--replay", f"5:{last}"]
    if form == "script":
        folder = tmp_path / "runs"
        folder.mkdir()
        (folder / example.name).symlink_to(run)
        command += ["--", sys.executable, example.file("script")]
    with start(command, cwd=tmp_path) as child:
        assert child.wait() == 0, child.said()


@pytest.mark.process
def test_a_replay_of_a_changed_script_finds_the_change(unbroken: Unbroken, tmp_path: Path) -> None:
    example = next(example for example in EXAMPLES if example.name == "metropolis")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / example.name).symlink_to(unbroken(example, "script"))
    code = example.file("script").read_text()
    (tmp_path / "changed.py").write_text(code.replace("SCALE = 0.8", "SCALE = 0.7"))
    command = ["verify", f"runs/{example.name}", "--replay", "5:20"]
    with start([*command, "--", sys.executable, "changed.py"], cwd=tmp_path) as child:
        assert child.wait() == 1
    assert "/state/chain" in child.said()


@pytest.mark.process
@in_one_form
def test_a_fork_continues_as_its_parent_did(
    example: Example, form: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    parent = unbroken(example, form)
    fork = tmp_path / "fork"
    with start(["fork", parent, "--at", 17, "--run-dir", fork], cwd=tmp_path) as child:
        assert child.wait() == 0, child.said()
    assert saved_state(fork) == saved_state(parent, 17)
    train(example, form, fork)
    assert saved_state(fork) == saved_state(parent)
    assert rows(fork) == [row for row in rows(parent) if row["step"] > 17]
    before = rows_to(parent, 17)
    after = rows_to(fork, example.last_step)
    for name, content in rows_to(parent, example.last_step).items():
        assert before[name] + after[name] == content


@pytest.mark.training
@both_forms
def test_a_finished_run_makes_no_step(
    example: Example, form: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken(example, form), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train(example, form, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
