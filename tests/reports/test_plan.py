"""`train --dry-run` predicts steps, saves, rows, learning rates and disk use, also for distant targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint.retention import to_prune
from stepctl.checkpoint.store import Store
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.cadence import Cadence
from stepctl.config.model import CheckpointConfig, KeepBestConfig
from stepctl.errors import Exit
from stepctl.reports.kept_checkpoints import PlannedSteps, count_kept, multiples
from stepctl.reports.learning_rates import drawn_steps, evenly_spaced_steps
from stepctl.reports.plan import describe_steps
from stepctl.rundir.directory import RunDirectory
from stepctl.state.counters import Counters
from tests.support.messages import TOP_LEVEL_KEYS, normalize
from tests.support.runs import forked, make_config, resume, rows, train

pytestmark = pytest.mark.usefixtures("in_tmp_path")

FAR = 10**12
COSINE = {"name": "sgd", "learning_rate": {"name": "cosine", "peak": 0.1, "warmup_steps": 4}}


def write(**sections: Any) -> str:
    """Write a config of a small run of 12 steps; return its name."""
    generator = np.random.default_rng(0)
    np.savez("a.npz", x=generator.normal(size=(60, 4)), y=generator.integers(0, 3, 60))
    data = {"name": "arrays", "path": "a.npz", "batch_size": 8, "validation_fraction": 0.5}
    full = {
        "data": data,
        "model": {"name": "linear"},
        "optimizer": COSINE,
        "stop": {"last_step": 12},
        **sections,
    }
    Path("c.yaml").write_text(yaml.dumps(make_config(**full).plain()))
    return "c.yaml"


def run(name: str = "run") -> Path:
    train(make_config(**yaml.load("c.yaml").value), Path(name))
    return Path(name)


def call(*arguments: object, code: int = Exit.DONE) -> str:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout if code == Exit.DONE else result.stderr


def planned(*arguments: object) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(call("plan", *arguments, "--json"))
    return answer


def all_steps(event: dict[str, Any]) -> list[int]:
    grid = range(event["first"], event["last"] + 1, event["every"]) if event["count"] else range(0)
    assert len(grid) == event["count"]
    return sorted([*grid, *event["also"]])


def on_grid(event: dict[str, Any]) -> dict[str, Any]:
    return {key: event[key] for key in ("first", "every", "count", "last", "also")}


def turns(plan: dict[str, Any], key: str = "optimizer.learning_rate") -> list[int]:
    return [at["step"] for at in plan["learning_rate"][key]["rates"] if at["turns"]]


def written(kind: str) -> list[int]:
    """Return the steps of the run's rows of one kind."""
    return [row["step"] for row in rows(Path("run")) if row["kind"] == kind]


# --- pure


@pytest.mark.training
@given(st.none() | st.integers(1, 30), st.integers(0, 29), st.integers(0, 50), st.integers(0, 90))
def test_a_grid_is_the_steps_at_which_a_cadence_fires(
    every: int | None, offset: int, start: int, last: int
) -> None:
    expected = [
        step for step in range(start + 1, last + 1) if every and step % every == offset % every
    ]
    cadence = Cadence(every, offset % (every or 1))
    assert [*cadence.steps(start, last)] == expected


@pytest.mark.training
@given(
    rise=st.integers(1, 30),
    of=st.integers(1, 9),
    ahead=st.integers(0, 50),
    every=st.integers(1, 40),
    offset=st.integers(0, 39),
    start=st.integers(0, 20),
    width=st.integers(0, 60),
)
def test_a_grid_on_another_counter_is_the_steps_at_which_it_fires(
    rise: int, of: int, ahead: int, every: int, offset: int, start: int, width: int
) -> None:
    of = of if rise == 1 else 1  # some counters rise at every fifth step, others by so many at each

    def count(step: int) -> int:
        return ahead + rise * step // of

    expected = []
    for step in range(start + 1, start + width + 1):
        counters = Counters({"global_step": step - 1, "samples_seen": 0, "other": count(step - 1)})
        counters.advance({"global_step": 1, "other": count(step) - count(step - 1)})
        # a new one each time: `fires` counts on being called after every update of a segment
        expected += [step] if Cadence(every, offset % every, "other").fires(counters) else []
    grid = Cadence(every, offset % every, "other").steps(start, start + width, count)
    assert [grid[index] for index in range(len(grid))] == expected
    assert [step for step in range(start + width + 2) if step in grid] == expected
    assert not expected or grid[-1] == expected[-1]


@given(st.integers(0, 60), st.integers(0, 200), st.integers(1, 20), st.integers(1, 40))
def test_multiples_are_the_grid_steps_that_a_number_divides(
    first: int, width: int, every: int, n: int
) -> None:
    grid = range(first, first + width, every)
    assert [*multiples(grid, n)] == [step for step in grid if step % n == 0]


def simulated(
    span: PlannedSteps, keep: CheckpointConfig, best: dict[int, dict[str, Any]]
) -> tuple[int, int]:
    """Save and prune as training does; return how many are kept at the end, and were there at a time at most."""
    there, most = span.saved or [span.start], len(span.saved) or 1
    for step in range(span.start + 1, span.last + 1):
        if step == span.last or (keep.every and step % keep.every == 0):
            there = [*there, step]
            most = max(most, len(there))
            gone = to_prune(there, keep, best, span.forked)
            there = [step for step in there if step not in gone]
    return len(there), most


@pytest.mark.training
@given(
    start=st.integers(0, 40),
    width=st.integers(0, 60),
    saved=st.sets(st.integers(0, 40)),
    forked=st.sets(st.integers(0, 40), max_size=3),
    keep=st.builds(
        CheckpointConfig,
        every=st.none() | st.integers(1, 12),
        keep_last=st.none() | st.integers(1, 5),
        keep_every=st.none() | st.integers(1, 30),
    ),
    n=st.integers(0, 3),
)
def test_the_kept_steps_equal_those_that_training_keeps(
    start: int, width: int, saved: set[int], forked: set[int], keep: CheckpointConfig, n: int
) -> None:
    before = sorted({*(step for step in saved if step <= start), start})
    span = PlannedSteps(start, start + width, before, [step for step in forked if step in before])
    grid = keep.cadence().steps(span.start, span.last)
    at_end, at_most = count_kept(span, keep, grid)
    really, most = simulated(span, keep, {})
    assert at_end == really
    assert most <= at_most <= most + 1
    if n:
        better = keep.model_copy(
            update={"keep_best": KeepBestConfig(metric="loss", mode="min", n=n)}
        )
        really, most = simulated(
            span, better, {step: {"loss": step * 7 % 11} for step in range(start + width + 1)}
        )
        at_end, at_most = count_kept(span, better, grid)
        assert really <= at_end <= really + n
        assert most <= at_most


@given(st.integers(0, 99), st.integers(0, 10**12), st.integers(2, 30))
def test_evenly_spaced_steps_have_the_first_and_the_last_update(
    start: int, width: int, n: int
) -> None:
    steps = evenly_spaced_steps(start, start + width, n)
    assert steps == sorted(set(steps))
    assert len(steps) == min(n, width)
    assert not steps or (steps[0], steps[-1]) == (start, start + width - 1)


def test_a_picture_has_few_points_and_the_landmarks_among_them() -> None:
    assert drawn_steps(3, 9, [5]) == [3, 4, 5, 6, 7, 8]
    far = drawn_steps(0, FAR, [7, 10**9])
    assert {0, 6, 7, 10**9 - 1, 10**9, FAR - 1} <= {*far}
    assert 1990 <= len(far) <= 2000
    assert len(drawn_steps(0, FAR, [*range(1, 10**5)])) <= 2000


# --- a fresh run


@pytest.mark.training
def test_a_plan_equals_the_steps_of_the_run_and_changes_nothing() -> None:
    sections: dict[str, Any] = {
        "log": {"every": 5, "offset": 2},
        "evaluate": {"every": 5},
        "initial_step": 2,
    }
    name = write(**sections, checkpoint={"every": 4, "keep_last": 2, "keep_every": 8})
    before = sorted(Path().rglob("*"))
    plan = planned(name)
    assert sorted(Path().rglob("*")) == before
    assert plan["steps"] == [2, 12]
    assert on_grid(plan["events"]["log"]) == {
        "first": 7,
        "every": 5,
        "count": 2,
        "last": 12,
        "also": [3],
    }
    assert on_grid(plan["events"]["save"]) == {
        "first": 4,
        "every": 4,
        "count": 3,
        "last": 12,
        "also": [2],
    }

    directory = RunDirectory(run())
    assert all_steps(plan["events"]["log"]) == written("train")
    assert all_steps(plan["events"]["evaluate"]) == written("eval")
    saved = [row["step"] for row in directory.read_ledger() if row["event"] == "checkpoint"]
    assert all_steps(plan["events"]["save"]) == saved
    used = [path.stat().st_size for path in directory.checkpoints.iterdir()]
    assert plan["checkpoints"]["at_end"] == len(used) == 2
    assert abs(plan["checkpoints"]["bytes_at_end"] - sum(used)) < 100, "the run's name is another"
    rates = {
        row["step"] - 1: row["learning_rate"] for row in rows(Path("run")) if row["kind"] == "train"
    }
    ahead = plan["learning_rate"]["optimizer.learning_rate"]
    values = {at["step"]: at["value"] for at in ahead["rates"]}
    assert (values[2], values[11]) == (rates[2], rates[11]), "the first and the last"
    assert turns(plan) == [4]
    assert ahead["landmarks"] == [4, 12]


@pytest.mark.training
def test_a_distant_target_is_planned_without_listing_its_steps() -> None:
    checkpoint = {
        "every": 50,
        "keep_last": 2,
        "keep_every": 10**6,
        "keep_best": {"metric": "loss", "mode": "min"},
    }
    name = write(checkpoint=checkpoint, evaluate={"every": 50})
    line = ("--last-step", FAR)
    plan = planned(name, *line)
    assert plan == json.loads(call("train", "--config", name, "--dry-run", "--json", *line)), (
        "one and the same"
    )
    log = {"first": 7, "every": 7, "count": FAR // 7, "last": FAR - FAR % 7, "also": [1, FAR]}
    assert on_grid(plan["events"]["log"]) == log
    assert (
        plan["checkpoints"]["at_end"] == 10**6 + 1 + 1 + 1
    )  # the multiples, the newest but one, the best, step 0
    text = call("plan", name, *line, "--png", "a.png")
    assert (
        "save           0, 50, 100, 150, 200, 250, ..., 1000000000000 (20,000,000,001 times)\n"
        in text
    )
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "never"), (2, "10, 20"), (9, "10, 20, 30, 40, 50, 60, ..., 90 (9 times)")],
)
def test_steps_in_few_words(count: int, words: str) -> None:
    assert describe_steps(range(10, 10 * count + 1, 10), []) == words


def test_extra_saves_and_a_decay_that_ends_early_are_reported(
    snapshot: SnapshotAssertion,
) -> None:
    cosine = {"name": "cosine", "peak": 0.1, "decay_steps": 10}
    optimizer = {"name": "sgd", "learning_rate": cosine}
    plan = planned(write(optimizer=optimizer, checkpoint={"every": 5, "every_seconds": 600}))
    assert plan["notes"] == snapshot


# --- a run


@pytest.mark.process
def test_the_plan_of_a_run_equals_the_steps_of_its_resume() -> None:
    write(
        log={"every": 5},
        evaluate={"every": 10},
        checkpoint={"every": 4, "keep_last": 2, "keep_every": 16},
    )
    run()
    forked(Path("run"), Path("child"), 8)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    plan = planned("run", "--last-step", 26)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert (plan["from"], plan["steps"], plan["plain_target"]) == ("step-00000012.h5", [12, 26], 12)
    assert plan["notes"][0].endswith(
        "decay_steps=26 --allow-change optimizer.learning_rate.decay_steps)"
    )
    known = len(RunDirectory("run").read_ledger().events)
    resume(Path("run"), last_step=26)
    assert all_steps(plan["events"]["log"]) == [step for step in written("train") if step > 12]
    assert all_steps(plan["events"]["evaluate"]) == [step for step in written("eval") if step > 12]
    saved = [
        row["step"]
        for row in RunDirectory("run").read_ledger().events[known:]
        if row["event"] == "checkpoint"
    ]
    assert all_steps(plan["events"]["save"]) == saved
    assert Store(Path("run/checkpoints")).steps() == [0, 8, 16, 24, 26]
    assert plan["checkpoints"]["at_end"] == 5


def steps_of_plan() -> list[str]:
    """Return the lines of the plan of a resume that name its steps."""
    return [
        line for line in call("plan", "run").splitlines() if line.startswith(("from ", "steps "))
    ]


@pytest.mark.training
def test_a_finished_run_has_nothing_to_do_and_a_killed_one_continues(
    snapshot: SnapshotAssertion,
) -> None:
    write(checkpoint={"every": 4})
    run()
    assert steps_of_plan() == snapshot(name="finished")
    Path("run/checkpoints/step-00000012.h5").unlink()
    plan = planned("run")
    assert (plan["from"], plan["steps"], plan["plain_target"]) == ("step-00000008.h5", [8, 12], 12)
    assert planned("run", "--num-steps", 3)["steps"] == [8, 11]
    assert steps_of_plan() == snapshot(name="killed")


@pytest.mark.training
def test_a_plan_with_a_locked_key_names_the_resume_that_allows_it() -> None:
    write()
    run()
    key = "optimizer.learning_rate"
    plan = planned(
        "run",
        "--last-step",
        20,
        "--set",
        f"{key}={{name: constant, value: 0.5}}",
        "--set",
        "log.every=3",
    )
    assert plan["notes"] == [f"a resume makes these changes with --allow-change {key}"]
    assert {at["value"] for at in plan["learning_rate"][key]["rates"]} == {0.5}
    refused = call(
        "plan", "run", "--set", "model={name: mlp, hidden: [5]}", code=Exit.NO_CHECKPOINT
    )
    assert "does not fit this config" in refused


# --- refused


REFUSED: dict[str, tuple[list[str], int]] = {
    "an unknown key": (["c.yaml", "--set", "sed=1"], Exit.USAGE),
    "no such config": (["nowhere.yaml"], Exit.USAGE),
    "no run": (["empty"], Exit.USAGE),
    "two targets": (["c.yaml", "--last-step", "1", "--num-steps", "1"], Exit.USAGE),
    "a picture in no folder": (["c.yaml", "--png", "none/a.png"], Exit.NEGATIVE),
    "a picture of another kind": (["c.yaml", "--png", "a.jpg"], Exit.USAGE),
    "a picture of no step": (["c.yaml", "--last-step", "0", "--png", "a.png"], Exit.USAGE),
}


@pytest.mark.training
@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_plan_is_refused(case: str, snapshot: SnapshotAssertion) -> None:
    arguments, code = REFUSED[case]
    write(optimizer={"name": "sgd", "learning_rate": 0.1})
    Path("empty").mkdir()
    message = call("plan", *arguments, code=code)
    assert normalize(message, (TOP_LEVEL_KEYS,)) == snapshot
    assert not Path("a.png").exists()


def test_without_matplotlib_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = call("plan", write(), "--png", "a.png", code=Exit.USAGE)
    python_words = r"(?<=cannot be imported \().*(?=\); )"
    assert normalize(message, (python_words,)) == snapshot


def test_the_rate_of_a_user_s_optimizer_is_shown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_optimizer.py").write_text(
        "from stepctl.optimizers.sgd import SGD\nfrom stepctl.optimizers.schedules import Constant\n"
        "class Own(SGD):\n    def __init__(self):\n        super().__init__(learning_rate=Constant(value=0.5))\n"
    )
    monkeypatch.syspath_prepend(Path().absolute())
    name = write(optimizer={"name": "own_optimizer:Own"})
    monkeypatch.delitem(sys.modules, "own_optimizer")
    assert {
        at["value"] for at in planned(name)["learning_rate"]["optimizer.learning_rate"]["rates"]
    } == {0.5}


# --- counters


@pytest.mark.training
def test_schedules_and_cadences_follow_their_counters() -> None:
    learning_rate = {"name": "cosine", "peak": 0.1, "warmup_steps": 20, "counter": "samples_seen"}
    cadence = {"every": 20, "counter": "samples_seen"}
    write(
        optimizer={"name": "sgd", "learning_rate": learning_rate},
        log=cadence,
        evaluate=cadence,
        checkpoint=cadence,
    )
    for arguments in (("c.yaml",), ("run", "--last-step", 19)):
        plan = planned(*arguments)
        start, _ = plan["steps"]
        if start:
            resume(Path("run"), last_step=19)
        else:
            run()
        found = [step for step in written("train") if step > start]
        told = plan["events"]["log"]
        assert told["words"].split(", ")[:3] == [str(step) for step in found[:3]]
        assert (told["count"] + len(told["also"]), told["last"]) == (len(found), found[-2])
        rates = {
            row["step"] - 1: row["learning_rate"]
            for row in rows(Path("run"))
            if row["kind"] == "train"
        }
        ahead = plan["learning_rate"]["optimizer.learning_rate"]
        known = {at["step"]: at["value"] for at in ahead["rates"] if at["step"] in rates}
        assert known == {step: rates[step] for step in known}
        assert len(known) > 1
    assert ahead["counter"] == "samples_seen"
    assert ahead["landmarks"] == [20, 96]
    assert turns(planned("c.yaml")) == [3]


def test_a_task_of_several_models_is_planned() -> None:
    rate = {"name": "cosine", "peak": 0.1, "decay_steps": 50}
    sections: dict[str, Any] = {
        "model": {
            "critic": {"name": "mlp", "hidden": [6]},
            "generator": {"name": "mlp", "hidden": [5]},
        },
        "optimizer": {
            "critic": {"name": "sgd", "learning_rate": {**rate, "counter": "critic"}},
            "generator": {"name": "sgd", "learning_rate": {**rate, "counter": "generator"}},
        },
        "task": {"name": "wgan", "n_critic": 5, "latent": 4, "weight_clip": 0.1},
        "log": {"every": 10, "counter": "critic"},
        "checkpoint": {"every": 10, "counter": "generator"},
        "evaluate": {"every": None},
    }
    plan = planned(write(**sections), "--last-step", FAR)
    critic, generator = (f"optimizer.{name}.learning_rate" for name in ("critic", "generator"))
    assert (turns(plan, critic), turns(plan, generator)) == ([10], [50])
    assert plan["n_parameters"] == 4 * 6 + 6 + 6 + 1 + 4 * 5 + 5 + 5 * 4 + 4
    assert plan["events"]["log"]["words"].startswith("1, 2, 4, 6, 8, 10, ..., ")
    assert plan["events"]["save"]["words"].startswith("0, 10, 20, 30, 40, 50, ..., ")
    assert [note.rpartition(" ")[2] for note in plan["notes"]] == [
        f"{critic}.decay_steps={5 * FAR})",
        f"{generator}.decay_steps={FAR})",
    ]


def test_a_plan_shows_the_settings_of_parameter_groups() -> None:
    decays = {"default": 0.1, "*/bias": 0.0}
    optimizer = {
        "name": "sgd",
        "learning_rate": 0.1,
        "weight_decay": decays,
        "learning_rate_multipliers": {"dense1/*": 2.0},
        "frozen": ["dense0/weight"],
    }
    name = write(model={"name": "mlp", "hidden": [6]}, optimizer=optimizer)
    assert [line.split("  ")[-1] for line in call("plan", name).splitlines()[2:6]] == [
        "frozen",
        "weight decay 0.0",
        "weight decay 0.1, learning rate times 2.0",
        "weight decay 0.0, learning rate times 2.0",
    ]
    assert planned(name)["groups"]["dense1/bias"] == {
        "weight_decay": 0.0,
        "learning_rate_multiplier": 2.0,
        "frozen": False,
    }
    assert "groups" not in planned(write())


BEST = {"every": 4, "keep_last": 2, "keep_best": {"metric": "loss", "mode": "min", "n": 1}}


@pytest.mark.parametrize(
    ("evaluate", "checkpoint", "meet"),
    [
        ({"every": 4, "offset": 1}, {}, False),
        ({"every": 3, "offset": 2}, {}, True),  # 8
        ({"every": 6, "offset": 5}, {"every": 10**9}, False),
        ({"every": 12}, {"every": 5}, True),  # the last step is saved too
        ({"every": 4, "offset": 1}, {"every_seconds": 9.0}, True),
        ({"every": 8 * 4, "counter": "samples_seen", "offset": 8}, {}, False),
        ({"every": 8 * 4, "counter": "samples_seen"}, {}, True),
    ],
)
def test_a_keep_best_that_can_keep_nothing_is_reported_and_not_counted(
    evaluate: dict[str, Any], checkpoint: dict[str, Any], meet: bool
) -> None:
    config = write(evaluate=evaluate, checkpoint={**BEST, **checkpoint})
    plan = planned(config)
    said = "keep_best keeps nothing: "
    assert any(said in note for note in plan["notes"]) != meet
    assert (plan["checkpoints"]["keep_best"] is not None) == meet
    done = CliRunner().invoke(cli, ["train", "--config", config])
    assert (done.exit_code, said in done.stderr) == (0, not meet)
    kept = Store(Path("runs/c/checkpoints")).steps()
    assert len(kept) <= plan["checkpoints"]["at_end"]
