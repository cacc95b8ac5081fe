"""Early stopping, target metrics and the best checkpoint keep their state across every stop."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import Config, StopConfig
from stepctl.errors import StoppedAtOnce
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import resume_run
from stepctl.state.train_state import TrainState
from stepctl.training.build import prepare
from tests.support.run_files import events
from tests.support.runs import make_config, resume, resume_options, rows, train
from tests.support.stops import some_stops

# Waits up to 2 three times, once with NaN; as good as the best is not better. The third in a row comes at step 24.
SCRIPT = [0.5, 0.6, 0.55, 0.58, 0.61, 0.6, None, 0.7, 0.72, 0.72, None, 0.71, 0.9, 0.95, 0.8, 0.8]
LAST = 30
EARLY = {"patience": 3, "metric": "accuracy"}
STOPS: dict[str, tuple[dict[str, Any], int, str]] = {
    "early_stopping": (
        EARLY,
        24,
        "early stopping: 3 evaluations without a better accuracy than 0.72",
    ),
    "target_metric": (
        {"value": 0.7, "metric": "accuracy"},
        16,
        "target metric: accuracy 0.7 reached 0.7",
    ),
}


@pytest.fixture(scope="module")
def small() -> Any:
    """Return a function: sections -> a small config whose evaluations are SCRIPT, one every 2 steps."""
    base: dict[str, Any] = {
        "data": {
            "name": "tests.support.scripted_task:sixty",
            "batch_size": 8,
            "validation_fraction": 0.5,
        },
        "model": {"name": "linear"},
        "task": {"name": "tests.support.scripted_task:Scripted", "script": SCRIPT},
        "log": {"every": 5},
        "evaluate": {"every": 2},
        "checkpoint": {"every": 1000},
        "stop": {"last_step": LAST},
    }
    return lambda **sections: make_config(**base | sections)


def stopping(rule: str, last_step: int = LAST, **more: Any) -> dict[str, Any]:
    return {"last_step": last_step, rule: STOPS[rule][0] | more}


def end(path: Path) -> tuple[int, str, bool]:
    """Return the step, the reason and whether it was done, as the ledger's newest end line has them."""
    row = events(path, "end")[-1]
    return row["step"], row["reason"], row["done"]


def remembered(state: TrainState, hook: str) -> dict[str, float]:
    (found,) = [each.state() for each in state.hooks if each.name == hook]
    return {key: array.item() for key, array in found.items()}


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [*map(str, arguments), "-q"])
    return result.exit_code, result.stderr.strip()


# --- exact through a resume


@pytest.fixture(scope="module")
def unbroken(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    paths = {rule: tmp_path_factory.mktemp("unbroken") / "run" for rule in STOPS}
    return {rule: (train(small(stop=stopping(rule)), path), path) for rule, path in paths.items()}


@pytest.mark.training
@pytest.mark.parametrize("rule", STOPS)
def test_the_unbroken_run_stops_where_its_evaluations_say(rule: str, unbroken: Any) -> None:
    _, step, reason = STOPS[rule]
    assert end(unbroken[rule][1]) == (step, reason, True)


@pytest.mark.training
@pytest.mark.parametrize("stop", some_stops(LAST, every=4))
@pytest.mark.parametrize("rule", STOPS)
def test_stopped_at_any_step_it_ends_at_the_same_step_with_the_same_bits(
    rule: str, stop: int, small: Any, unbroken: Any, tmp_path: Path
) -> None:
    train(small(stop=stopping(rule, stop)), tmp_path / "run")
    state = resume(tmp_path / "run", last_step=LAST)
    expected, path = unbroken[rule]
    assert state.same_bits(expected)
    assert rows(tmp_path / "run") == rows(path)
    step, reason, _ = end(path)
    assert end(tmp_path / "run") == (step, f"last_step {step}" if stop == step else reason, True)


@pytest.mark.training
@pytest.mark.parametrize("rule", STOPS)
def test_a_run_that_stopped_stays_stopped_and_says_how_to_go_on(
    rule: str, small: Any, unbroken: Any, tmp_path: Path
) -> None:
    _, step, reason = STOPS[rule]
    train(small(stop=stopping(rule)), tmp_path / "run")
    files = {
        file: file.read_bytes()
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != "lock"
    }
    for more in ([], ["--num-steps", 5], ["--last-step", 40]):
        code, said = invoke("resume", tmp_path / "run", *more)
        assert code == 0
        assert f"at global step {step}, target" in said
        assert f"nothing to do ({reason}; to continue: --set stop.{rule}=null" in said
        assert said.count(reason) == said.count("\n") + 1 == 1
        assert {file: file.read_bytes() for file in files} == files


def test_a_stop_is_reported_once_with_how_to_continue(small: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.dumps(small(stop=stopping("early_stopping")).plain()))
    code, said = invoke("train", "--config", tmp_path / "c.yaml", "--run-dir", tmp_path / "run")
    reason, remedy = (
        STOPS["early_stopping"][2],
        "to continue: --set stop.early_stopping=null, or a larger patience",
    )
    assert (code, said) == (
        0,
        f"{tmp_path / 'run'}: stopped at global step 24 ({reason}); {remedy}",
    )


@pytest.mark.training
@pytest.mark.parametrize(
    ("assignment", "ends"),
    [
        ("stop.early_stopping=null", (30, "last_step 30", True)),
        ("stop.early_stopping.patience=4", (30, "last_step 30", True)),
    ],
)
def test_it_continues_where_the_config_allows_it(
    assignment: str, ends: Any, small: Any, tmp_path: Path
) -> None:
    evaluate = {"every": 2, "metric": "accuracy"}
    train(small(evaluate=evaluate, stop=stopping("early_stopping")), tmp_path / "run")
    said: list[str] = []
    state = resume(tmp_path / "run", assignments=(assignment,), say=said.append)
    assert said == []
    assert end(tmp_path / "run") == ends
    expected = train(small(evaluate=evaluate), tmp_path / "other")
    assert state.same_bits(expected)
    assert rows(tmp_path / "run") == rows(tmp_path / "other")
    assert (
        resume(tmp_path / "run", last_step=LAST).counters.global_step == LAST
    )  # the change holds from there on


@pytest.mark.training
def test_a_larger_patience_counts_on(small: Any, tmp_path: Path) -> None:
    """After 24 nothing is better than 0.72 any more."""
    task = {"name": "tests.support.scripted_task:Scripted", "script": [*SCRIPT[:12], 0.1, 0.1, 0.1]}
    train(small(task=task, stop=stopping("early_stopping")), tmp_path / "run")
    resume(tmp_path / "run", assignments=("stop.early_stopping.patience=5",))
    assert end(tmp_path / "run")[:2] == (
        28,
        "early stopping: 5 evaluations without a better accuracy than 0.72",
    )


@pytest.mark.training
def test_enabled_on_resume_it_includes_earlier_evaluations(small: Any, tmp_path: Path) -> None:
    evaluate = {"every": 2, "metric": "accuracy"}
    train(small(evaluate=evaluate, stop={"last_step": 22}), tmp_path / "run")
    resume(tmp_path / "run", last_step=LAST, assignments=("stop.early_stopping={patience: 3}",))
    assert end(tmp_path / "run")[:2] == (24, STOPS["early_stopping"][2])


# --- what is better


def observed(config: Config, hook: str, values: list[float], metric: str) -> dict[str, float]:
    assembly = prepare(config)
    (watch,) = (watch for watch in assembly.watches if watch.name == hook)
    for step, value in enumerate(values, 1):
        watch.update(step, {metric: value, "other": 0.0})
    return remembered(assembly.state, hook)


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        ({}, {"value": 0.2, "step": 2}),  # the task's first metric, the loss: less is better
        ({"metric": "loss"}, {"value": 0.2, "step": 2}),
        ({"metric": "accuracy"}, {"value": 0.9, "step": 3}),
        ({"metric": "accuracy", "mode": "min"}, {"value": 0.2, "step": 2}),
        ({"metric": "loss", "mode": "max"}, {"value": 0.9, "step": 3}),
    ],
)
def test_the_task_decides_which_value_is_better_by_default(
    evaluate: dict[str, str], expected: dict[str, float], small: Any
) -> None:
    config = small(evaluate={"every": 2, **evaluate})
    assert (
        observed(config, "best", [0.5, 0.2, 0.9, 0.9, 0.2], evaluate.get("metric", "loss"))
        == expected
    )


def test_a_rule_without_a_metric_uses_metric_and_mode_of_evaluate(small: Any) -> None:
    evaluate = {"every": 2, "metric": "accuracy", "mode": "min"}
    config = small(evaluate=evaluate, stop={"last_step": 9, "early_stopping": {"patience": 3}})
    assert observed(config, "early_stopping", [0.5, 0.2, 0.9], "accuracy") == {
        "value": 0.2,
        "waited": 1,
    }
    own = {"last_step": 9, "early_stopping": {"patience": 3, "metric": "loss"}}
    assert (
        observed(small(evaluate=evaluate, stop=own), "early_stopping", [0.5, 0.9], "loss")["value"]
        == 0.5
    )


@pytest.mark.parametrize(
    ("metric", "values", "waited"),
    [
        (
            "accuracy",
            [0.5, 0.6, 0.71, 0.8],
            1,
        ),  # 0.6 is no more than 0.1 above 0.5; 0.8 not 0.1 above 0.71
        ("loss", [0.5, 0.375, 0.25, 0.2], 1),
        (
            "accuracy",
            [0.5, 0.55, 0.59, 0.6],
            3,
        ),  # little by little is not better: the mark stays where it was
        ("loss", [math.inf, 1.0, math.nan, 0.95], 2),
        ("accuracy", [math.nan, math.nan, 0.1], 0),
        ("accuracy", [0.1, math.nan, math.nan], 2),
        ("accuracy", [-math.inf, math.nan, 0.1], 0),
    ],
)
def test_better_is_by_more_than_min_delta_and_nan_never_is(
    metric: str, values: list[float], waited: int, small: Any
) -> None:
    stop = {"last_step": 9, "early_stopping": {"patience": 9, "metric": metric, "min_delta": 0.1}}
    assert observed(small(stop=stop), "early_stopping", values, metric)["waited"] == waited


@pytest.mark.parametrize(
    ("metric", "value", "values", "reached"),
    [
        ("accuracy", 0.9, [0.5, 0.89], False),
        ("accuracy", 0.9, [0.9], True),
        ("accuracy", 0.9, [0.95, 0.1], True),
        ("loss", 0.1, [0.5, 0.11], False),
        ("loss", 0.1, [0.1], True),
        ("loss", 0.1, [math.nan], False),
        ("accuracy", 0.9, [math.nan, math.nan], False),
        ("loss", 0.1, [-math.inf], True),
    ],
)
def test_the_target_is_reached_by_a_value_as_good_or_better(
    metric: str, value: float, values: list[float], reached: bool, small: Any
) -> None:
    assembly = prepare(
        small(stop={"last_step": 9, "target_metric": {"value": value, "metric": metric}})
    )
    (rule,) = (rule for rule in assembly.stop_rules() if rule.name == "target_metric")
    for found in values:
        rule.update(1, {metric: found})
    assert (rule.reason(assembly.state.counters) is not None) == reached


@pytest.mark.training
@pytest.mark.parametrize("last", [3, 7])
def test_an_evaluation_off_the_grid_touches_no_watch(last: int, small: Any, tmp_path: Path) -> None:
    """Off the grid the script gives values better than any."""
    stop = {"early_stopping": EARLY, "target_metric": {"value": 1.0, "metric": "accuracy"}}
    on_grid = train(small(stop={"last_step": last - 1, **stop}), tmp_path / "on")
    off = train(small(stop={"last_step": last, **stop}), tmp_path / "off")
    assert rows(tmp_path / "off")[-1]["extra"]
    for hook in ("best", "early_stopping", "target_metric"):
        assert remembered(off, hook) == remembered(on_grid, hook)
    assert end(tmp_path / "off") == (last, f"last_step {last}", True)


# --- what a resume may change


@pytest.mark.training
@pytest.mark.parametrize(
    ("assignments", "anew"),
    [
        (["stop.early_stopping.metric=loss"], ["early_stopping"]),
        (["stop.early_stopping.mode=min"], ["early_stopping"]),
        (["stop.early_stopping.min_delta=0.01"], ["early_stopping"]),
        (["stop.early_stopping.mode=max"], []),  # as it was
        (["stop.early_stopping.patience=9"], []),
        (["stop.target_metric.metric=loss"], ["target_metric"]),
        (["stop.target_metric.value=0.99"], []),
        (["evaluate.metric=accuracy"], ["best"]),
        (["evaluate.metric=loss"], []),  # as it was
        (["evaluate.mode=max"], ["best"]),
        (["log.every=3"], []),
    ],
    ids=str,
)
def test_a_watch_with_another_metric_is_reset_with_a_note(
    assignments: list[str], anew: list[str], small: Any, tmp_path: Path
) -> None:
    stop = {
        "last_step": 6,
        "early_stopping": EARLY,
        "target_metric": {"value": 1.0, "metric": "accuracy"},
    }
    before = train(small(stop=stop), tmp_path / "run")
    said: list[str] = []
    options = resume_options(tmp_path / "run", assignments)
    with resume_run(RunDirectory(tmp_path / "run"), options, said.append) as segment:
        assert segment.restored == "step-00000006.h5"
        for hook in ("best", "early_stopping", "target_metric"):
            found = remembered(segment.state, hook)
            assert math.isnan(found["value"]) == (hook in anew)
            if hook not in anew:
                assert found == remembered(before, hook)
    assert said == [f"note: {hook} is reset: its criterion changed" for hook in anew]


@pytest.mark.training
def test_a_rule_without_a_metric_is_reset_when_the_metric_of_evaluate_changes(
    small: Any, tmp_path: Path
) -> None:
    """0.4 is the best loss, and no accuracy is ever to be measured against it."""
    train(small(stop={"last_step": 6, "early_stopping": {"patience": 9}}), tmp_path / "run")
    said: list[str] = []
    state = resume(
        tmp_path / "run", last_step=8, assignments=("evaluate.metric=accuracy",), say=said.append
    )
    assert [line.split()[1] for line in said] == ["best", "early_stopping"]
    assert remembered(state, "early_stopping") == {"value": 0.58, "waited": 0}


@pytest.mark.training
@pytest.mark.parametrize("back", [None, 4], ids=["killed", "from-step"])
def test_a_watch_is_compared_with_the_criterion_of_its_checkpoint(
    back: int | None, small: Any, tmp_path: Path
) -> None:
    """A segment that went by another metric left its config in the ledger, but no checkpoint that is restored."""
    train(
        small(stop={"last_step": 6}, checkpoint={"every": 4, "keep_last": None}), tmp_path / "run"
    )
    changed = resume_options(
        tmp_path / "run", assignments=("evaluate.metric=accuracy",), stop=StopConfig(last_step=10)
    )
    with (
        resume_run(RunDirectory(tmp_path / "run"), changed) as segment,
        contextlib.suppress(StoppedAtOnce),
    ):
        if back is None:
            segment.train(hooks=[Interrupt()])
        else:
            segment.train()
    said: list[str] = []
    with resume_run(
        RunDirectory(tmp_path / "run"), ResumeOptions(from_step=back), said.append
    ) as segment:
        assert segment.start == (back or 6)
        assert math.isnan(remembered(segment.state, "best")["value"])
    assert "note: best is reset: its criterion changed" in said


class Interrupt(Hook):
    """Ends a segment at once, as a kill does: nothing more is saved."""

    name = "interrupt"

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        raise KeyboardInterrupt


# --- the best


@pytest.mark.training
def test_the_best_is_kept_with_its_step_through_resumes_and_so_is_its_checkpoint(
    small: Any, tmp_path: Path
) -> None:
    task = {
        "name": "tests.support.scripted_task:Scripted",
        "script": [0.5, 0.6, 0.9, 0.7, None, 0.9],
    }
    checkpoint = {"every": 2, "keep_last": 1, "keep_best": {"metric": "accuracy", "mode": "max"}}
    evaluate = {"every": 2, "metric": "accuracy"}
    config = {"task": task, "checkpoint": checkpoint, "evaluate": evaluate}
    train(small(**config, stop={"last_step": 7}), tmp_path / "run")
    state = resume(tmp_path / "run", last_step=12)
    assert remembered(state, "best") == {"value": 0.9, "step": 6}
    kept = sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000006.h5", "step-00000012.h5"]
    assert events(tmp_path / "run", "end")[-1]["step"] == 12


# --- the command line


@pytest.mark.parametrize("option", [("--last-step", 6), ("--num-steps", 6)], ids=str)
def test_a_target_on_the_command_line_leaves_the_other_keys_of_stop(
    option: tuple[str, int], small: Any, tmp_path: Path
) -> None:
    stop = {
        "last_step": 30,
        "early_stopping": EARLY,
        "target_metric": {"value": 0.6, "metric": "accuracy"},
    }
    (tmp_path / "c.yaml").write_text(yaml.dumps(small(stop=stop).plain()))
    common = ("train", "--config", tmp_path / "c.yaml", "--run-dir", tmp_path / "run")
    assert invoke(*common, *option)[0] == 0
    assert end(tmp_path / "run")[:2] == (4, "target metric: accuracy 0.6 reached 0.6")
    written = yaml.load(str(tmp_path / "run" / "config.yaml")).value["stop"]
    assert written["early_stopping"]["patience"] == 3
    key = option[0].removeprefix("--").replace("-", "_")
    assert {name: written[name] for name in ("last_step", "num_steps")} == {
        "last_step": None, "num_steps": None, key: 6,
    }  # fmt: skip
