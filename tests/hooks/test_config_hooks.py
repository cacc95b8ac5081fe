"""Hooks that the config names: exact, on every command, and changed on a resume as their state allows."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.errors import CheckpointError, ConfigError, Exit
from stepctl.rundir.directory import RunDirectory
from tests.support.messages import without_paths
from tests.support.run_checks import checkpoints
from tests.support.runs import content, forked, make_config, resume, rows, silent, train
from tests.support.user_hooks import Lines, Smoothed

pytestmark = pytest.mark.training

LAST = 12
SMOOTHED = {"name": "tests.support.user_hooks:Smoothed"}
TASK: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "digits", "batch_size": 16, "validation_fraction": 0.9},
    "model": {"name": "mlp", "hidden": [4]},
    "task": {"name": "classification"},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
    "hooks": [SMOOTHED],
    "stop": {"last_step": LAST},
    "log": {"every": 1},
    "checkpoint": {"every": 4, "keep_last": None},
    "numerics": {"threads": 1},
}
PROGRAM: dict[str, Any] = {
    "program": {"name": "tests.support.walks:Walk"},
    "hooks": [SMOOTHED | {"metric": "norm"}],
    **{key: TASK[key] for key in ("seed", "stop", "log", "checkpoint", "numerics")},
}
CONFIGS = {"task": TASK, "program": PROGRAM}
by_config = pytest.mark.parametrize("kind", CONFIGS)


def lines(folder: Path, **arguments: Any) -> dict[str, Any]:
    """Return the spec of a hook without state."""
    return {"name": "tests.support.user_hooks:Lines", "file": str(folder / "lines"), **arguments}


def logged(folder: Path) -> list[int]:
    """Return the steps at which the hook of `lines` was called."""
    return [int(line) for line in (folder / "lines").read_text().split()]


def run_command(*arguments: object, code: int = Exit.DONE) -> str:
    """Run a command; return what it wrote to stderr."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stderr


def start(folder: Path, config: dict[str, Any], **sections: Any) -> Path:
    """Train a run from the command line; return its directory."""
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(json.dumps(config | sections))
    run_command("train", "--config", folder / "c.yaml", "--run-dir", folder / "run", "-q")
    return folder / "run"


def final(run: Path, step: int = LAST) -> dict[str, Any]:
    """Return the content of a checkpoint without the config, which has the target of its run."""
    return {key: item for key, item in content(checkpoints(run)[step]).items() if key != "config"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the metrics rows without the time they took."""
    return [{key: row[key] for key in row if key != "steps_per_second"} for row in rows(run)]


def ends(run: Path) -> list[tuple[str, int, bool]]:
    """Return reason, step and `done` of each segment."""
    ledger = RunDirectory(run).read_ledger()
    return [(row["reason"], row["step"], row["done"]) for row in ledger if row["event"] == "end"]


# --- exactness


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: start(tmp_path_factory.mktemp(kind), CONFIGS[kind]) for kind in CONFIGS}


@by_config
@pytest.mark.parametrize("stop", [0, 1, 2, 5, 6, LAST - 1, LAST])
def test_stopped_at_any_step(
    kind: str, stop: int, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    run = start(tmp_path, CONFIGS[kind], stop={"last_step": stop})
    run_command("resume", run, "--last-step", LAST, "-q")
    assert "hooks/smoothed/value" in final(run)
    assert final(run) == final(unbroken[kind])
    assert metrics(run) == metrics(unbroken[kind])


@by_config
def test_the_state_of_the_hook_is_what_it_computes(kind: str, unbroken: dict[str, Path]) -> None:
    hook = Smoothed(
        **{key: item for key, item in CONFIGS[kind]["hooks"][0].items() if key != "name"}
    )
    value = hook.value.copy()
    metric = CONFIGS[kind]["hooks"][0].get("metric", "loss")
    for row in rows(unbroken[kind]):
        if row["kind"] == "train":
            value = value * 0.9 + [row[metric], row["step"]]
    found = stepctl.load_checkpoint(unbroken[kind]).arrays["hooks/smoothed/value"]
    assert found == pytest.approx(value, rel=1e-6)
    assert found[0] > 0


@by_config
def test_replay_is_bit_identical(kind: str, unbroken: dict[str, Path]) -> None:
    run_command("verify", unbroken[kind], "--replay", f"0:{LAST}")


@by_config
def test_a_replay_compares_the_state_of_hooks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path, CONFIGS[kind])
    after_step = Smoothed.after_step

    def other(hook: Smoothed, *arguments: Any) -> str | None:
        hook.value += 1.0
        return after_step(hook, *arguments)

    monkeypatch.setattr(Smoothed, "after_step", other)
    run_command("verify", run, "--replay", f"4:{LAST}", code=Exit.NEGATIVE)


@by_config
def test_a_fork_continues_with_the_state_of_the_hook(
    kind: str, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    child = tmp_path / "run"  # the name is in the checkpoints
    parent = tmp_path / "parent"
    shutil.copytree(unbroken[kind], parent)
    run_command("fork", parent, "--at", 4, "--run-dir", child)
    run_command("resume", child, "-q")
    assert final(child) == final(unbroken[kind])


@by_config
def test_plan_and_config_check_accept_hooks(
    kind: str, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    run_command("plan", unbroken[kind])
    run_command("plan", unbroken[kind].parent / "c.yaml")
    result = CliRunner().invoke(cli, ["config", "check", str(unbroken[kind].parent / "c.yaml")])
    assert result.exit_code == 0
    assert "decay: 0.9" in result.stdout  # the default is written out


def test_hooks_from_the_config_and_from_python_work_together(tmp_path: Path) -> None:
    own = Lines(file=str(tmp_path / "own"), label="own")
    config = TASK | {"hooks": [SMOOTHED, lines(tmp_path)]}
    with stepctl.create(config, tmp_path / "run", hooks=[own], say=silent) as run:
        run.step(5)
    with stepctl.resume(tmp_path / "run", hooks=[own], say=silent) as run:
        run.train()
        assert "hooks/smoothed" in repr(run.state)
    steps = [*range(1, LAST + 1)]
    assert logged(tmp_path) == steps
    assert [int(line) for line in (tmp_path / "own").read_text().split()] == steps
    with pytest.raises(ConfigError, match="two hooks have the name 'lines'"):
        stepctl.create(
            config, tmp_path / "other", hooks=[Lines(file=str(tmp_path / "own"))], say=silent
        )


# --- stops

STOPPING = {"with state": SMOOTHED | {"last": 7}, "without state": {"last": 7}}


@by_config
@pytest.mark.parametrize("case", STOPPING)
def test_a_run_that_a_hook_stopped_stays_finished(
    kind: str, case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    metric = {"metric": "norm"} if kind == "program" else {}
    spec = SMOOTHED | metric | {"last": 7} if case == "with state" else lines(tmp_path, last=7)
    run = start(tmp_path, CONFIGS[kind], hooks=[spec])
    assert max(checkpoints(run)) == 7
    [(reason, step, done)] = ends(run)
    assert (step, done) == (7, True)
    before = (run / "ledger.jsonl").read_bytes()
    said = [
        run_command("resume", run, *options)
        for options in ([], ["--num-steps", "5"], ["--set", "log.every=2"])
    ]
    assert (run / "ledger.jsonl").read_bytes() == before
    assert [reason, *(without_paths(text, RUN=run) for text in said)] == snapshot
    # the replay reaches the stopped step, whichever hooks it calls
    run_command("verify", run, "--replay", "0:7")
    child = tmp_path / "child"
    assert "enough" not in run_command("fork", run, "--at", 4, "--run-dir", child)
    assert "enough" in run_command("fork", run, "--run-dir", tmp_path / "other")
    allowed = ["--allow-change", "hooks"]
    run_command("resume", run, "--set", "hooks=[]", *allowed, "-q")
    assert ends(run)[-1] == (f"last_step {LAST}", LAST, True)
    run_command("resume", run)


def test_only_a_change_of_its_own_hook_revokes_a_stop(tmp_path: Path) -> None:
    run = start(tmp_path, TASK, hooks=[lines(tmp_path, last=7)])
    kept = json.dumps([lines(tmp_path, last=7), SMOOTHED])
    said = run_command("resume", run, "--set", f"hooks={kept}", "--allow-change", "hooks")
    assert "nothing to do (hook lines: enough lines" in said
    changed = json.dumps([lines(tmp_path, last=9)])
    said = run_command("resume", run, "--set", f"hooks={changed}")
    assert "hook_stop is reset" in said
    assert ends(run)[-1] == ("hook lines: enough lines", 9, True)
    assert logged(tmp_path) == [*range(1, 10)]


def test_a_stop_by_a_hook_in_python_lasts_without_that_hook(tmp_path: Path) -> None:
    config = TASK | {"hooks": []}
    hook = Lines(file=str(tmp_path / "lines"), last=5)
    with stepctl.create(config, tmp_path / "run", hooks=[hook], say=silent) as run:
        assert run.train().text == "hook lines: enough lines"
    said = run_command("resume", tmp_path / "run", "--num-steps", "5")
    assert "nothing to do (hook lines: enough lines; to continue from an earlier step, fork" in said
    assert max(checkpoints(tmp_path / "run")) == 5


def test_a_hook_stops_a_script(tmp_path: Path) -> None:
    hook = Lines(file=str(tmp_path / "lines"), last=3)
    for _ in range(2):
        state = {"n": 0}
        with stepctl.loop(tmp_path / "run", state, last_step=10, hooks=[hook]) as run:
            for _step in run:
                state["n"] += 1
        assert run.global_step == 3
    assert logged(tmp_path) == [1, 2, 3]


def test_a_failing_hook_does_not_hide_the_stop_of_a_hook_after_it(tmp_path: Path) -> None:
    class Fails(stepctl.Hook):
        name = "fails"

        def after_step(self, state: Any, metrics: Any) -> str | None:
            if state.counters.global_step == 4:
                raise RuntimeError("full disk")
            return None

    config = make_config(**TASK | {"hooks": []})
    with pytest.raises(RuntimeError, match="full disk"):
        train(config, tmp_path / "run", (Fails(), Smoothed(last=4)))
    state = resume(tmp_path / "run", hooks=(Smoothed(last=4),))
    assert state.counters.global_step == 4


# --- replays and imports


@by_config
def test_a_replay_calls_no_hook_without_state(kind: str, tmp_path: Path) -> None:
    both = [*CONFIGS[kind]["hooks"], lines(tmp_path)]
    run = start(tmp_path, CONFIGS[kind], hooks=both)
    assert logged(tmp_path) == [*range(1, LAST + 1)]
    run_command("verify", run, "--replay", f"4:{LAST}")
    assert logged(tmp_path) == [*range(1, LAST + 1)]


HOOK = """
import stepctl


class Mine(stepctl.Hook):
    name = "mine"

    def __init__(self, *, last: int = 100):
        self._last = last

    def after_step(self, state, metrics):
        return "far enough" if state.counters.global_step == self._last else None
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a hook, which `forbid` makes fail at its import."""
    (tmp_path / "mine.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def forbid(folder: Path) -> None:
    (folder / "mine.py").write_text("raise RuntimeError('imported')\n")
    sys.modules.pop("mine", None)


@by_config
@pytest.mark.parametrize("last", [6, 100])
def test_commands_that_make_no_step_do_not_import_hooks(kind: str, last: int, mine: Path) -> None:
    run = start(mine, CONFIGS[kind], hooks=[{"name": "mine:Mine", "last": last}])
    forbid(mine)
    for command in ("inspect", "runs", "verify", "plot", "prune"):
        more = ["--keep-last", "1"] if command == "prune" else []
        run_command(command, run, *more)
    run_command("diff", run, run)
    said = run_command("resume", run)
    assert "nothing to do" in said
    said = run_command("resume", run, "--num-steps", 3, code=Exit.USAGE)
    assert "hooks.0.name: cannot use 'mine:Mine': imported (mine.py:1)" in said


@by_config
def test_without_the_module_of_a_hook_a_run_continues_with_other_hooks(
    kind: str, mine: Path
) -> None:
    run = start(mine, CONFIGS[kind], hooks=[{"name": "mine:Mine"}], stop={"last_step": 6})
    forbid(mine)
    options = ["--last-step", LAST, "--set", "hooks=[]"]
    refused = run_command("resume", run, *options, code=Exit.USAGE)
    assert "--allow-change hooks" in refused
    run_command("resume", run, *options, "--allow-change", "hooks")
    assert max(checkpoints(run)) == LAST


# --- changes on a resume


def changes(run: Path) -> list[dict[str, Any]]:
    """Return the changes that the newest segment recorded."""
    return RunDirectory(run).read_ledger().starts[-1].get("changes", [])


def test_hooks_without_state_are_live(tmp_path: Path) -> None:
    run = start(tmp_path, TASK, stop={"last_step": 4})
    both = json.dumps([SMOOTHED, lines(tmp_path)])
    said = run_command("resume", run, "--num-steps", 4, "--set", f"hooks={both}")
    assert "note" not in said
    [change] = changes(run)
    assert change["key"] == "hooks"
    assert [spec["name"] for spec in change["new"]] == [SMOOTHED["name"], lines(tmp_path)["name"]]
    run_command("resume", run, "--num-steps", 4, "--set", f"hooks={json.dumps([SMOOTHED])}")
    assert logged(tmp_path) == [5, 6, 7, 8]
    run_command("verify", run)
    run_command("verify", run, "--replay", "0:12")


def test_set_reaches_the_arguments_of_a_hook(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    run = start(tmp_path, TASK, hooks=[SMOOTHED, lines(tmp_path)], stop={"last_step": 4})
    options = ["--num-steps", 4, "--set", "hooks.1.last=6"]
    run_command("resume", run, *options)
    assert ends(run)[-1] == ("hook lines: enough lines", 6, True)
    locked = run_command("resume", run, "--set", "hooks.0.decay=0.5", code=Exit.USAGE)
    assert "pass --allow-change hooks" in locked
    result = CliRunner().invoke(cli, ["plan", str(run), "--set", "hooks.0.decay=0.5"])
    assert "note: a resume makes these changes with --allow-change hooks\n" in result.stdout
    wrong = [
        run_command("resume", run, "--set", assignment, code=Exit.USAGE)
        for assignment in ("hooks.2.last=6", "hooks.last=6", "hooks.1.last=soon", "hooks.0=3")
    ]
    assert wrong == snapshot


REFUSED = {
    "another argument": [SMOOTHED | {"decay": 0.5}],
    "removed": [],
    "added": [SMOOTHED, {"name": "tests.support.user_hooks:make_lines", "file": "x"}],
}


@by_config
@pytest.mark.parametrize("case", REFUSED)
def test_hooks_with_state_are_locked(
    kind: str,
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    snapshot: SnapshotAssertion,
) -> None:
    monkeypatch.chdir(tmp_path)
    metric = {"metric": "norm"} if kind == "program" else {}
    new = [spec | metric if spec["name"] == SMOOTHED["name"] else spec for spec in REFUSED[case]]
    run = start(tmp_path, CONFIGS[kind], stop={"last_step": 4})
    options = ["--num-steps", 4, "--set", f"hooks={json.dumps(new)}"]
    said = run_command("resume", run, *options, code=Exit.USAGE)
    assert without_paths(said, PWD=Path.cwd()) == snapshot
    run_command("plan", run, "--set", f"hooks={json.dumps(new)}")
    run_command("resume", run, *options, "--allow-change", "hooks")
    [change] = changes(run)
    assert change["key"] == "hooks"
    assert max(checkpoints(run)) == 8


def test_a_kill_after_a_change_of_hooks_is_no_other_change(tmp_path: Path) -> None:
    """The checkpoint is older than the change, which the ledger has."""
    train(make_config(**TASK | {"hooks": [], "stop": {"last_step": 4}}), tmp_path / "run")
    said: list[str] = []
    change = {
        "assignments": (f"hooks={json.dumps([SMOOTHED])}",),
        "allow_change": ("hooks",),
        "say": said.append,
    }
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole / "run")
    expected = resume(whole / "run", last_step=LAST, **change)
    assert said == ["note: step-00000004.h5 has no state of the hook smoothed, which starts anew"]
    resume(tmp_path / "run", last_step=6, **change)
    checkpoints(tmp_path / "run")[6].unlink()  # as if killed before it was saved
    ledger = tmp_path / "run" / "ledger.jsonl"
    text = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(line for line in text if '"step": 6' not in line))
    state = resume(tmp_path / "run", last_step=LAST)
    assert state.same_bits(expected)


def test_a_fork_may_change_any_hook(tmp_path: Path) -> None:
    run = start(tmp_path, TASK)
    said: list[str] = []
    forked(run, tmp_path / "child", 4, "hooks=[]", say=said.append)
    assert said == ["note: the hook smoothed is gone; its state in step-00000004.h5 is not used"]
    run_command("resume", tmp_path / "child", "-q")
    assert "hooks/smoothed/value" not in final(tmp_path / "child")


def test_the_state_of_a_hook_in_python_is_never_dropped_unasked(tmp_path: Path) -> None:
    train(make_config(**TASK | {"hooks": []}), tmp_path / "run", (Smoothed(),))
    with pytest.raises(CheckpointError, match="hooks/smoothed/value"):
        forked(tmp_path / "run", tmp_path / "child", 4)
    with pytest.raises(CheckpointError, match="hooks/smoothed/value"):
        resume(tmp_path / "run", last_step=LAST + 1)


def test_a_hook_in_python_moves_into_the_config(tmp_path: Path, unbroken: dict[str, Path]) -> None:
    run = tmp_path / "run"
    train(make_config(**TASK | {"hooks": [], "stop": {"last_step": 5}}), run, (Smoothed(),))
    refused = run_command("resume", run, "--last-step", LAST, code=Exit.NO_CHECKPOINT)
    assert "add it to the config's hooks" in refused
    moved = f"hooks={json.dumps([SMOOTHED])}"
    options = ["--last-step", LAST, "--set", moved, "--allow-change", "hooks"]
    assert "anew" not in run_command("resume", run, *options)
    assert final(run) == final(unbroken["task"])


def test_a_checkpoint_names_no_hook_to_import(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the user's config does: the one in the checkpoint may be anyone's."""
    run = start(mine, TASK, hooks=[{"name": "mine:Mine"}], stop={"last_step": 4})
    forbid(mine)
    config = run / "config.yaml"
    lines_ = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines_ if "mine:Mine" not in line))
    run_command("resume", run, "--last-step", LAST)
    assert "mine" not in sys.modules


def test_a_config_edited_by_hand_is_refused(tmp_path: Path) -> None:
    run = start(tmp_path, TASK, stop={"last_step": 4})
    config = run / "config.yaml"
    text = config.read_text()
    assert "decay: 0.9" in text
    config.write_text(text.replace("decay: 0.9", "decay: 0.5"))
    said = run_command("resume", run, "--num-steps", 4, code=Exit.NO_CHECKPOINT)
    assert "saved with another config (hooks: " in said


# --- bad input

WRONG: dict[str, Any] = {
    "no list": {"name": "tests.support.user_hooks:Smoothed"},
    "no mapping": ["tests.support.user_hooks:Smoothed"],
    "no name": [{"decay": 0.5}],
    "a missing module": [{"name": "no_such_module:Hook"}],
    "no import path": [{"name": "Smoothed"}],
    "a missing class": [{"name": "tests.support.user_hooks:Smooth"}],
    "not a hook": [{"name": "tests.support.walks:Walk"}],
    "a function that returns no hook": [
        {"name": "tests.support.user_hooks:make_other", "file": "x"}
    ],
    "an unknown argument": [SMOOTHED, SMOOTHED | {"decy": 0.5}],
    "an argument of the wrong type": [SMOOTHED | {"decay": "fast"}],
    "a missing argument": [{"name": "tests.support.user_hooks:Lines"}],
    "an argument called name": [{"name": "tests.support.user_hooks:Named"}],
    "a reserved argument": [{"name": "tests.support.user_hooks:Shaped", "input_shape": 3}],
    "a refused argument": [{"name": "tests.support.user_hooks:Refuses", "limit": -1}],
    "two with one name": [SMOOTHED, SMOOTHED | {"decay": 0.5}],
    "the name of a built-in hook": [
        {"name": "tests.support.user_hooks:Lines", "file": "x", "label": "log"}
    ],
    "no name of its own": [{"name": "tests.support.user_hooks:Nameless"}],
}


@by_config
@pytest.mark.parametrize("case", WRONG)
def test_wrong_hooks_are_refused_in_one_line(
    kind: str, case: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(CONFIGS[kind] | {"hooks": WRONG[case]}))
    said = run_command(
        "train", "--config", tmp_path / "c.yaml", "--run-dir", tmp_path / "run", code=Exit.USAGE
    )
    assert said.count("\n") == 1
    assert without_paths(said, (r"(?<=\.py:)\d+",), HERE=tmp_path) == snapshot
    assert not (tmp_path / "run").exists()
    checked = run_command("config", "check", tmp_path / "c.yaml", code=Exit.USAGE)
    assert checked == said


@pytest.mark.parametrize("value", [True, 0.0, "", " ", [1]], ids=repr)
def test_a_hook_that_returns_something_else_than_a_reason_ends_the_run(
    value: Any, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    returns = {"name": "tests.support.user_hooks:Returns", "value": value}
    (tmp_path / "c.yaml").write_text(json.dumps(TASK | {"hooks": [SMOOTHED, returns]}))
    run = tmp_path / "run"
    said = run_command(
        "train", "--config", tmp_path / "c.yaml", "--run-dir", run, "-q", code=Exit.USAGE
    )
    assert without_paths(said, RUN=run) == snapshot
    assert max(checkpoints(run)) == 1  # the step is complete, and saved


def test_hooks_do_not_go_with_a_script(tmp_path: Path) -> None:
    with stepctl.loop(tmp_path / "run", {"n": 0}, last_step=1) as run:
        for _ in run:
            pass
    assert "hooks" not in (tmp_path / "run" / "config.yaml").read_text()
