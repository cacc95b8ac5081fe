"""A user's program: its steps, its state, and its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import parse_config
from stepctl.distributed.comm import Comm
from stepctl.errors import ConfigError
from stepctl.programs.program import ProgramTask
from stepctl.training.build import assemble
from tests.support import walks
from tests.support.loops import rows, saved
from tests.support.messages import normalize, without_paths
from tests.support.program_states import same_values
from tests.support.run_files import events

ROOT = Path(__file__).parents[2]
LINES = r"(?<=\.py:)\d+"
BASE: dict[str, Any] = {
    "seed": 3,
    "program": {"name": "tests.support.walks:Walk"},
    "stop": {"last_step": 10},
    "log": {"every": 1},
    "checkpoint": {"every": 4, "keep_last": None},
    "numerics": {"threads": 1},
}


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    stdout: str
    stderr: str


def command(*arguments: object) -> Answer:
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return Answer(result.exit_code, result.stdout, result.stderr)


def said(answer: Answer, folder: Path) -> str:
    """Return the messages of a command, without rows and notes that depend on the time."""
    left_out = ("steps/s", "note: step ", ": waited ", "  validation  ")
    lines = answer.stderr.splitlines(keepends=True)
    text = "".join(line for line in lines if not any(words in line for words in left_out))
    return normalize(text, (LINES,), ROOT=ROOT, HERE=folder)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder. Every instance of Walk that is built here must be closed once."""
    monkeypatch.chdir(tmp_path)
    walks.Walk.built = 0
    walks.Walk.closed = 0
    yield tmp_path
    assert walks.Walk.closed == walks.Walk.built


def write_config(**sections: Any) -> Path:
    Path("c.yaml").write_text(yaml.dumps(BASE | sections))
    return Path("c.yaml")


def broken(wrong: str, **arguments: Any) -> dict[str, Any]:
    return {"name": "tests.support.walks:Broken", "wrong": wrong, **arguments}


def run_to(path: Path, last_step: int = 10, **sections: Any) -> dict[str, Any]:
    """Create or resume a run through the API; return its values as a checkpoint has them."""
    silent: Any = lambda message: None  # noqa: E731
    if path.exists():
        run = stepctl.resume(path, last_step=last_step, say=silent)
    else:
        config = BASE | sections | {"stop": {"last_step": last_step} | sections.get("stop", {})}
        run = stepctl.create(config, path, say=silent)
    with run:
        run.train()
    values = stepctl.load_checkpoint(path).values
    assert values is not None
    return values


# --- exact


@pytest.mark.training
@pytest.mark.parametrize("stop", range(0, 11, 2))
def test_a_run_that_ended_at_any_step_continues_with_the_same_bits_and_rows(
    stop: int, here: Path
) -> None:
    sections = {"evaluate": {"every": 3, "metric": "distance", "mode": "min"}}
    expected = run_to(here / "whole", **sections)
    run_to(here / "run", stop, **sections)
    assert same_values(run_to(here / "run"), expected)
    ended = [row for row in rows(here / "run") if not row.get("extra")]
    assert ended == [row for row in rows(here / "whole") if not row.get("extra")]
    assert command("diff", "run", "whole").code == 0


def test_a_generator_kept_from_an_earlier_step_restarts_with_the_step(here: Path) -> None:
    program = {"name": "tests.support.walks:Keeping"}
    expected = run_to(here / "whole", program=program)
    for last_step in (1, 4, 10):
        values = run_to(here / "run", last_step, program=program)
    assert same_values(values, expected)
    assert len(np.unique(expected["drawn"])) == 10


def test_a_generator_kept_from_the_initial_state_is_refused(
    here: Path, snapshot: SnapshotAssertion
) -> None:
    config = write_config(program={"name": "tests.support.walks:Keeping", "initial": True})
    answer = command("train", config, "--run-dir", "run")
    assert answer.code == 2
    assert said(answer, here) == snapshot
    assert not Path("run").exists()


def test_initial_streams_differ_from_those_of_the_steps() -> None:
    task = ProgramTask(walks.Walk(), seed=3)
    state = task.initial_state(0)
    assert state.program is not None
    x = state.program.view().arrays["x"]
    task.step_streams.begin_step(0)
    assert not np.isin(x, task.step_streams("start").standard_normal(100)).any()
    task.close()


def test_the_constructor_gets_the_seed_if_it_names_it() -> None:
    config = parse_config(yaml.Document(BASE | {"program": broken("nothing")}))
    assembly = assemble(config)
    assert isinstance(assembly.task, ProgramTask)
    assert isinstance(assembly.task.program, walks.Broken)
    assert assembly.task.program.seed == BASE["seed"]
    assembly.close()


# --- errors


@pytest.mark.parametrize("case", walks.INITIAL)
def test_a_wrong_initial_state_leaves_nothing_behind(
    case: str, here: Path, snapshot: SnapshotAssertion
) -> None:
    answer = command("train", write_config(program=broken(f"initial:{case}")), "--run-dir", "run")
    assert answer.code == 2
    assert said(answer, here) == snapshot
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "program",
    [
        broken("constructor"),
        {"name": "tests.support.walks:NoStep"},
        {"name": "tests.support.walks:Reserved"},
        {"name": "tests.support.walks:Reserved", "dtype": "float64"},
        {"name": "tests.support.walks:Emulator"},
        {"name": "tests.support.walks:Nothing"},
        {"name": "walk"},
        {"name": "tests.support.walks:Walk", "scale": "x"},
        {"name": "tests.support.walks:Walk", "size": 1},
        {"name": "tests.support.walks:Walk", "seed": 1},
        {"name": "tests.support.walks:Walk", "table": "missing.npy"},
    ],
    ids=lambda program: f"{program['name'].partition(':')[2]}-{[*program][-1]}",
)
@pytest.mark.parametrize("words", ["train", "config check"])
def test_a_program_that_cannot_be_built_is_refused(
    program: dict[str, Any], words: str, here: Path, snapshot: SnapshotAssertion
) -> None:
    walks.Walk.closed += program.get("wrong") == "constructor"  # it was not built
    answer = command(*words.split(), write_config(program=program))
    if words == "config check" and "table" in program:
        assert answer.code == 0
        return
    assert answer.code == 2
    assert said(answer, here) == snapshot
    assert not Path("runs").exists()


@pytest.mark.parametrize("case", walks.ERRORS)
def test_an_error_in_a_step_saves_nothing_of_it_and_names_its_line(
    case: str, here: Path, snapshot: SnapshotAssertion
) -> None:
    config = write_config(program=broken(f"step:{case}"), checkpoint={"every": 2})
    answer = command("train", config, "--run-dir", "run")
    assert answer.code == (75 if case == "interrupt" else 1)
    assert said(answer, here) == snapshot
    if case != "interrupt":  # which abandons the save in flight
        assert saved(here / "run") == [0, 2]


@pytest.mark.parametrize("case", walks.RETURNED)
@pytest.mark.parametrize("at", [0, 3])
def test_wrong_metrics_of_a_step_are_refused(
    case: str, at: int, here: Path, snapshot: SnapshotAssertion
) -> None:
    config = write_config(program=broken(f"returned:{case}", at=at), checkpoint={"every": 2})
    answer = command("train", config, "--run-dir", "run")
    assert said(answer, here) == snapshot
    if at == 0:  # found by the check of the first step
        assert answer.code == 2
        assert not Path("run").exists()
    else:
        assert answer.code == 1
        assert saved(here / "run") == [0, 2]


def test_a_step_may_return_nothing(here: Path) -> None:
    run_to(here / "run", 3, program={"name": "tests.support.walks:Plain"})
    assert rows(here / "run") == [{"step": step, "kind": "train"} for step in (1, 2, 3)]


@pytest.mark.parametrize("case", ["array", "value", "generator", "none", "error"])
def test_an_evaluation_that_breaks_the_protocol_is_refused(
    case: str, here: Path, snapshot: SnapshotAssertion
) -> None:
    config = write_config(program=broken(f"evaluate:{case}"), evaluate={"every": 4})
    answer = command("train", config, "--run-dir", "run")
    assert answer.code == (1 if case == "error" else 2)
    assert said(answer, here) == snapshot
    assert saved(here / "run") == [0]


# --- evaluation and stops


def test_evaluations_decide_what_is_kept_and_when_to_stop(here: Path) -> None:
    sections = {
        "evaluate": {"every": 2, "metric": "distance", "mode": "min"},
        "checkpoint": {
            "every": 2,
            "keep_last": 1,
            "keep_best": {"metric": "distance", "mode": "min", "n": 1},
        },
        "stop": {"last_step": 100, "early_stopping": {"patience": 2}},
    }
    answer = command("train", write_config(**sections), "--run-dir", "run")
    assert answer.code == 0
    assert "early stopping: 2 evaluations without a better distance" in answer.stderr
    evaluations = {
        row["step"]: row["distance"] for row in rows(here / "run") if row["kind"] == "eval"
    }
    best = min(evaluations, key=evaluations.__getitem__)
    last = max(evaluations)
    assert saved(here / "run") == sorted({best, last})
    assert last == best + 4
    assert "nothing to do" in command("resume", "run").stderr


def test_a_target_of_a_metric_ends_the_run(here: Path) -> None:
    stop = {
        "last_step": 50,
        "target_metric": {"value": 1e9, "metric": "distance", "mode": "min"},
    }
    answer = command("train", write_config(evaluate={"every": 3}, stop=stop), "--run-dir", "run")
    assert answer.code == 0
    assert saved(here / "run")[-1] == 3


@pytest.mark.parametrize(
    "sections",
    [
        {"evaluate": {"every": 2, "metric": "distance"}},
        {"stop": {"last_step": 9, "early_stopping": {"patience": 2}}, "evaluate": {"every": 2}},
        {"stop": {"last_step": 9, "target_metric": {"value": 0, "metric": "distance"}}},
        {"evaluate": {"metric": "other", "mode": "min", "every": 2}},
        {"checkpoint": {"every": 2, "keep_best": {"metric": "distance", "mode": "min"}}},
        {
            "program": {"name": "tests.support.walks:Plain"},
            "evaluate": {"every": 2, "metric": "distance", "mode": "min"},
        },
        {"program": {"name": "tests.support.walks:Plain"}, "evaluate": {"every": 2}},
        {"log": {"means": True}},
        {"log": {"norms": True}},
        {"log": {"tensorboard": True, "histograms": 5}},
        {"log": {"every": 2, "counter": "critic"}},
        {"log": {"every": 2, "counter": "samples_seen"}},
        {"program": None, "script": "walk.py"},
        {"data": {"name": "digits"}, "model": {"name": "linear"}},
        {"dtype": "float64", "ema": {"decay": 0.9}, "distributed": {"mode": "async"}},
        {"script": "walk.py"},
        {"stop": {"last_step": 9, "when": {"metric": "norm"}}},
        {"stop": {"last_step": 9, "when": {"metric": "norm", "below": 1.0, "above": 2.0}}},
        {"stop": {"last_step": 9, "when": {"metric": "other", "below": 1.0}}},
        {"stop": {"when": {"metric": "norm", "below": 1.0}}},
        {"evaluate": {"every": 2, "ema": True}},
    ],
    ids=lambda sections: json.dumps(sections).replace('"', ""),
)
def test_wrong_sections_are_refused(
    sections: dict[str, Any], here: Path, snapshot: SnapshotAssertion
) -> None:
    config = BASE | sections
    Path("c.yaml").write_text(
        yaml.dumps({key: value for key, value in config.items() if value is not None})
    )
    answer = command("train", "c.yaml", "--run-dir", "run")
    assert answer.code == 2
    assert said(answer, here) == snapshot
    late = sections.get("evaluate", {}).get("metric") == "other"  # known at the first evaluation
    assert Path("run").exists() == late


@pytest.mark.parametrize(("bound", "stopped"), [("below", 8), ("above", 1)])
def test_a_metric_of_a_step_ends_the_run_and_it_stays_finished(
    bound: str, stopped: int, here: Path, snapshot: SnapshotAssertion
) -> None:
    when = {"metric": "left", bound: 3.5}
    config = write_config(stop={"last_step": 10, "when": when})
    answers = [command("train", config, "--run-dir", "run")]
    assert saved(here / "run")[-1] == stopped
    walks.Walk.built = walks.Walk.closed = 0
    answers += [command("resume", "run"), command("resume", "run", "--num-steps", 1)]
    assert saved(here / "run")[-1] == stopped
    changed = {"below": 2.5, "above": 100}[bound]
    answers.append(command("resume", "run", "--set", f"stop.when.{bound}={changed}"))
    assert saved(here / "run")[-1] == {"below": 9, "above": 10}[bound]
    answers.append(command("resume", "run", "--set", "stop.when=null"))
    assert saved(here / "run")[-1] == 10
    assert [answer.code for answer in answers] == [0] * 5
    assert [said(answer, here) for answer in answers] == snapshot
    assert same_values(run_to(here / "run"), run_to(here / "whole"))


def test_nan_is_neither_below_nor_above(here: Path) -> None:
    class Undefined(walks.Plain):
        def step(self, state: dict[str, Any], step: int, rng: Any) -> dict[str, float]:
            state["n"] += 1
            return {"delta": float("nan")}

    walks.Undefined = Undefined  # type: ignore[attr-defined]
    for bound in ("below", "above"):
        stop = {"when": {"metric": "delta", bound: 0.0}}
        program = {"name": "tests.support.walks:Undefined"}
        assert run_to(here / bound, 3, program=program, stop=stop)["n"] == 3


# --- data files


def test_the_content_of_a_file_argument_is_part_of_the_run(
    here: Path, snapshot: SnapshotAssertion
) -> None:
    for name in ("a", "b", "c"):
        Path(name).write_bytes(name.encode())
    program = {"name": "tests.support.walks:Walk", "table": "a", "tables": ["b", "c"]}
    answer = command("train", write_config(program=program), "--run-dir", "run", "--last-step", 2)
    assert answer.code == 0
    assert events(here / "run", "start")[0]["data"].count(";") == 2
    answers = []
    Path("c").rename("moved")
    moved = "program.tables=[b, moved]"
    answers.append(command("resume", "run", "--set", moved, "--num-steps", 1))
    assert answers[-1].code == 0
    for name in ("a", "moved"):
        before = Path(name).read_bytes()
        Path(name).write_bytes(b"changed")
        answers.append(command("resume", "run", "--num-steps", 1))
        assert answers[-1].code == 2
        Path(name).write_bytes(before)
    Path("a").unlink()
    answers.append(command("resume", "run", "--num-steps", 1))
    assert answers[-1].code == 2
    Path("a").write_bytes(b"changed")
    answers.append(command("resume", "run", "--num-steps", 1, "--allow-change", "program"))
    assert answers[-1].code == 0
    assert [said(answer, here) for answer in answers] == snapshot
    assert saved(here / "run")[-1] == 4


# --- determinism and locked keys


@pytest.mark.parametrize("case", ["numpy", "python", "entropy"])
def test_a_program_with_other_randomness_is_found(
    case: str, here: Path, snapshot: SnapshotAssertion
) -> None:
    answer = command("train", write_config(program=broken(f"drawn:{case}")), "--run-dir", "run")
    assert answer.code == 0
    assert said(answer, here) == snapshot


def test_a_correct_program_gives_no_warning(here: Path) -> None:
    answer = command("train", write_config(), "--run-dir", "run")
    assert answer.code == 0
    assert "warning" not in answer.stderr


def test_the_program_and_its_arguments_are_locked(here: Path, snapshot: SnapshotAssertion) -> None:
    command("train", write_config(), "--run-dir", "run", "--last-step", 2)
    changes = ("program.scale=2", "program.name=tests.support.walks:Plain", "seed=5")
    answers = [command("resume", "run", "--set", change) for change in changes]
    assert [answer.code for answer in answers] == [2, 2, 2]
    assert [said(answer, here) for answer in answers] == snapshot
    allowed = ("--set", "program.scale=2", "--allow-change", "program", "--num-steps", 8)
    assert command("resume", "run", *allowed).code == 0
    assert saved(here / "run")[-1] == 10


# --- commands


def test_all_commands_work_on_a_program(here: Path) -> None:
    config = write_config(
        evaluate={"every": 5, "metric": "distance", "mode": "min"},
        log={"every": 2, "csv": True, "tensorboard": True},
    )
    codes = {
        words: command(*words.split()).code
        for words in (
            f"config check {config}",
            f"plan {config}",
            f"train {config} --run-dir run --dry-run --json",
            f"train {config} --run-dir run --or-resume",
            f"train {config} --run-dir run --or-resume -q",
            "resume run --num-steps 2",
            "plan run --num-steps 5",
            "inspect run/checkpoints/step-00000004.h5",
            "inspect run --json",
            "verify run",
            "verify run --replay 4:12",
            "fork run --at 4 --run-dir fork",
            "resume fork --last-step 12",
            "diff run fork",
            "runs . --json",
            "plot run --metric norm",
            "prune run --keep-last 1",
            "resume run --from-step 12 --num-steps 1",
        )
    }
    assert {words: code for words, code in codes.items() if code != 0} == {}
    header = Path("run/metrics.csv").read_text().partition("\n")[0].split(",")
    assert "steps_per_second" in header
    assert not {"epoch", "samples_per_second"} & {*header}
    assert any(Path("run/tensorboard").iterdir())


@pytest.mark.parametrize(
    "words",
    [
        "train c.yaml --run-dir run",
        "train c.yaml --dry-run",
        "plan c.yaml",
        "config check c.yaml",
        "resume run --num-steps 1",
        "fork run --run-dir fork",
        "verify run --replay 0:2",
        "plan run --num-steps 3",
        "resume run --set evaluate.metric=x",
        "plan run --set evaluate.metric=x",
        "fork run --run-dir run",
        "verify run --replay 0:1",
    ],
)
def test_every_instance_is_closed(words: str, here: Path) -> None:
    write_config()
    if "run --" in words or words.startswith("fork"):
        command("train", "c.yaml", "--run-dir", "run", "--last-step", 2)
    walks.Walk.built = walks.Walk.closed = 0
    command(*words.split())
    is_early = words in ("fork run --run-dir run",)
    assert (walks.Walk.built > 0) != is_early


def test_several_processes_are_refused(snapshot: SnapshotAssertion) -> None:
    class Two(Comm):
        size = 2

    config = parse_config(yaml.Document(BASE))
    with pytest.raises(ConfigError) as caught:
        assemble(config, comm=Two())
    assert str(caught.value) == snapshot


# --- the API


def test_the_api_steps_and_evaluates_a_program(here: Path, snapshot: SnapshotAssertion) -> None:
    with stepctl.create(BASE, here / "run", say=lambda message: None) as run:
        metrics = run.step()
        assert metrics is not None
        assert list(metrics) == ["norm", "left"]
        assert run.step(3) == {"norm": run.state.program.live["norms"][-1], "left": 7.0}  # type: ignore[union-attr]
        assert run.evaluate() == run.evaluate()
        assert run.global_step == 4
        messages = [repr(run.state)]
        with pytest.raises(ConfigError) as caught:
            run.evaluate(average=True)
        messages.append(str(caught.value))
    with stepctl.resume(here / "run", say=lambda message: None) as run:
        run.train()
    assert same_values(stepctl.load_checkpoint(here / "run").values, run_to(here / "whole"))
    plain = BASE | {"program": {"name": "tests.support.walks:Plain"}}
    with stepctl.create(plain, here / "plain", say=lambda message: None) as run:
        with pytest.raises(ConfigError) as caught:
            run.evaluate()
        messages.append(str(caught.value))
    assert [without_paths(message) for message in messages] == snapshot
