"""`verify`, `verify --replay` and `diff`: their results, and that they detect every change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from stepctl.checkpoint import codec, names
from stepctl.cli.diff import describe_difference
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.reports import diff, verify
from stepctl.rundir.directory import RunDirectory
from stepctl.state.train_state import SavedHook, TrainState
from tests.support.runs import RUN_ID, file_bytes, make_config, resume, train

KEEP = {"every": 10, "keep_last": None}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three segments, one of which was stopped off every grid."""
    path = tmp_path_factory.mktemp("verify") / "run"
    train(make_config(checkpoint=KEEP, stop={"last_step": 13}), path)
    resume(path, last_step=25)
    resume(path, last_step=40)
    return path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def call(*arguments: object, expect: int = 0) -> Any:
    done = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert done.exit_code == expect, done.output
    return json.loads(done.stdout)


def file(run: Path, step: int) -> Path:
    return run / "checkpoints" / names.file_name(step)


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Rewrite a file of JSON lines; a row that becomes None is left out."""
    changed = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed if row is not None))


def altered(run: Path, step: int, path: str, index: int, change: Callable[[Any], Any]) -> None:
    """Change one element of a checkpoint, behind a right digest and with the ledger's word for it."""
    with codec.Reader(file(run, step)) as reader:
        header = reader.header
        arrays = {name: np.concatenate(list(reader.parts(name))) for name in reader.array_shapes()}
        shapes = reader.array_shapes()
    from stepctl.state.arena import Arena
    from stepctl.state.counters import Counters

    def arena(prefix: str) -> Arena:
        found = {
            name.removeprefix(prefix): shapes[name][0] for name in shapes if name.startswith(prefix)
        }
        made = Arena(found, "float32")
        for name in found:
            made[name] = arrays[prefix + name].reshape(found[name])
        return made

    arrays[path][index] = change(arrays[path][index])
    folders = ("params", "optimizers/model/first_moment", "optimizers/model/second_moment")
    hooks: dict[str, dict[str, Any]] = {}
    for name in (name for name in arrays if name.startswith("hooks/")):
        _, hook, key = name.split("/")
        hooks.setdefault(hook, {})[key] = arrays[name].reshape(shapes[name][0])
    remembered = [SavedHook(name, values) for name, values in hooks.items()]
    state = TrainState(
        Counters(header.counters),
        {folder: arena(f"{folder}/") for folder in folders},
        hooks=remembered,
    )
    image = codec.encode(
        state,
        run=header.run,
        run_id=header.run_id or RUN_ID,
        config=header.config,
        numerics=header.numerics,
    )
    file(run, step).write_bytes(data := file_bytes(image))
    digest = data.split(b"sha256: ")[1][:64].decode()
    edit(
        run / "ledger.jsonl",
        lambda row: row | {"sha256": digest} if row.get("file") == file(run, step).name else row,
    )


# --- verify


@pytest.mark.training
def test_a_good_run_is_good(run: Path) -> None:
    answer = call("verify", run)
    assert answer["ok"]
    assert [good["step"] for good in answer["files"]] == [0, 10, 13, 20, 25, 30, 40]
    assert answer["problems"] == []
    assert call("verify", file(run, 13))["ok"]


def cut(run: Path) -> None:
    os.truncate(file(run, 20), 5000)


def removed(run: Path) -> None:
    file(run, 20).unlink()


def renamed(run: Path) -> None:
    file(run, 20).rename(file(run, 21))


def of_another_run(run: Path) -> None:
    train(make_config(seed=2, stop={"last_step": 20}), run.parent / "other")
    shutil.copy(file(run.parent / "other", 20), file(run, 20))


def unknown(run: Path) -> None:
    edit(
        run / "ledger.jsonl",
        lambda row: None if row.get("step") == 20 and row["event"] == "checkpoint" else row,
    )


def row_twice(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 21, "kind": "train", "loss": 1.0}\n')


def row_missing(run: Path) -> None:
    edit(
        run / "metrics.jsonl",
        lambda row: None if (row["step"], row["kind"]) == (30, "eval") else row,
    )


def row_damaged(run: Path) -> None:
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content.replace(b'"step": 21, ', b'"st\0p": 21, ', 1))


def rows_exchanged(run: Path) -> None:
    first, second, *others = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([second, first, *others]))


def row_late(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 41, "kind": "train", "loss": 1.0}\n')


def config_lost(run: Path) -> None:
    (run / "config.yaml").unlink()


def config_edited(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("batch_size: ", "batch_size: 1"))


def config_of_another_program(run: Path) -> None:
    (run / "config.yaml").write_text("- 1\n")


def config_with_a_strange_key(run: Path) -> None:
    with open(run / "config.yaml", "a") as file:
        file.write("model2: {}\n")


def config_broken(run: Path) -> None:
    with open(run / "config.yaml", "a") as file:
        file.write("seed: {\n")


WRONG: dict[Callable[[Path], None], set[tuple[str, str]]] = {
    cut: {("length", "step-00000020.h5")},
    removed: {("lost", "step-00000020.h5")},
    renamed: {("step", "step-00000021.h5"), ("lost", "step-00000020.h5")},
    of_another_run: {("other", "step-00000020.h5"), ("run", "step-00000020.h5")},
    unknown: {("unknown", "step-00000020.h5")},
    row_twice: {("twice", "metrics.jsonl"), ("order", "metrics.jsonl")},
    row_missing: {("row", "metrics.jsonl")},
    row_damaged: {("line", "metrics.jsonl"), ("row", "metrics.jsonl")},
    rows_exchanged: {("order", "metrics.jsonl")},
    row_late: {("row", "metrics.jsonl")},
    config_lost: {("config", "config.yaml")},
    config_edited: {("config", "config.yaml")},
    config_broken: {("config", "config.yaml")},
    config_of_another_program: {("config", "config.yaml")},
    config_with_a_strange_key: {("config", "config.yaml")},
}


@pytest.mark.training
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_every_problem_of_a_run_is_found(wrong: Callable[[Path], None], run: Path) -> None:
    wrong(run)
    answer = call("verify", run, expect=1)
    assert not answer["ok"]
    assert {(problem["code"], problem["file"]) for problem in answer["problems"]} == WRONG[wrong]
    assert all(problem["file"] in problem["message"] for problem in answer["problems"])


@pytest.mark.training
def test_nothing_that_a_run_s_config_names_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may come from anybody, and its model need not be here."""
    path = tmp_path / "run"
    train(
        make_config(
            model={"name": "tests.support.user_model:TwoLayers"},
            checkpoint=KEEP,
            stop={"last_step": 20},
        ),
        path,
    )
    monkeypatch.delitem(sys.modules, "tests.support.user_model")
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if not Path(entry, "tests").exists()]
    )
    assert call("verify", path)["ok"]
    assert "tests.support.user_model" not in sys.modules


@pytest.mark.training
def test_pruned_and_set_aside_checkpoints_are_not_reported_as_lost(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(make_config(checkpoint={"every": 5, "keep_last": 2}), path)
    assert call("verify", path)["ok"]
    resume(path, from_step=35, last_step=50)
    assert call("verify", path)["ok"]
    call("prune", path, "--keep-last", 1)
    assert call("verify", path)["ok"]


@pytest.mark.training
@pytest.mark.parametrize(
    "line",
    [
        {"event": "checkpoint", "step": 10**13, "sha256": "", "pruned": [10**13]},
        {"event": "checkpoint", "step": 10**4000, "sha256": "", "pruned": []},
        {"event": "start", "segment": 9, "step": 40, "target": 10**40, "data": ""},
        *(
            {"event": "start", "segment": 9, "step": 40, "target": 40, "data": "", "config": bad}
            for bad in (5, "", [1])
        ),
        {
            "event": "start",
            "segment": 9,
            "step": 40,
            "target": 40,
            "data": "",
            "config": {"log": [1], "evaluate": 5},
        },
        *(
            {"event": "start", "segment": 9, "step": 40, "target": 40, "data": "", "changes": bad}
            for bad in (5, [1])
        ),
    ],
    ids=lambda line: str(line)[:100],
)
def test_no_ledger_makes_a_command_crash_or_hang(
    line: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    with (run / "ledger.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    for number, command in enumerate(
        (["verify", run], ["plan", run], ["fork", run, "--run-dir", tmp_path / "fork"])
    ):
        done = CliRunner().invoke(cli, [*map(str, command)])
        assert done.exit_code in (0, 1 if number == 0 else 2), done.output
        assert "unexpected" not in done.output


@pytest.mark.training
def test_a_run_that_was_killed_is_good(tmp_path: Path) -> None:
    """Rows past the newest checkpoint are cut by the next resume; until then they are no mistake."""
    path = tmp_path / "run"
    train(make_config(checkpoint=KEEP, stop={"last_step": 24}), path)
    file(path, 24).unlink()
    edit(
        path / "ledger.jsonl",
        lambda row: None if row["step"] == 24 and row["event"] != "start" else row,
    )
    assert call("verify", path)["ok"]


@pytest.mark.training
@pytest.mark.parametrize("target", [30, 40], ids=["nothing to do", "steps to make"])
def test_a_checkpoint_whose_line_a_kill_prevented_gets_it_by_the_next_resume(
    target: int, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    train(make_config(checkpoint=KEEP, stop={"last_step": 30}), path)
    edit(
        path / "ledger.jsonl",
        lambda row: None if row["step"] == 30 and row["event"] != "start" else row,
    )
    [problem] = call("verify", path, expect=1)["problems"]
    assert (problem["code"], problem["file"]) == ("unknown", "step-00000030.h5")
    assert "the next resume adds it" in problem["message"]
    resume(path, last_step=target)
    assert call("verify", path)["ok"]


@pytest.mark.training
def test_a_file_that_was_exchanged_is_still_another_after_a_resume(run: Path) -> None:
    altered(run, 40, "params/dense0/weight", 0, lambda value: value + 1)
    edit(
        run / "ledger.jsonl",
        lambda row: row | {"sha256": 64 * "0"} if row.get("file") == "step-00000040.h5" else row,
    )
    resume(run, last_step=45)
    assert {"other", "unknown"} <= {
        problem["code"] for problem in call("verify", run, expect=1)["problems"]
    }


@pytest.mark.training
def test_a_cadence_changed_on_the_way_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(make_config(checkpoint=KEEP, stop={"last_step": 20}), path)
    resume(path, last_step=40, assignments=("log.every=3", "evaluate.every=null"))
    assert call("verify", path)["ok"]
    edit(path / "metrics.jsonl", lambda row: None if row["step"] == 33 else row)
    (problem,) = call("verify", path, expect=1)["problems"]
    assert "the train row of step 33 is missing" in problem["message"]


@pytest.mark.parametrize(
    ("make", "code"), [(lambda path: path.write_text("no"), "foreign"), (Path.touch, "foreign")]
)
def test_a_file_that_is_not_a_checkpoint_has_its_code(
    make: Callable[[Path], object], code: str, tmp_path: Path
) -> None:
    make(tmp_path / "file")
    assert [
        problem["code"] for problem in call("verify", tmp_path / "file", expect=1)["problems"]
    ] == [code]


@pytest.mark.parametrize(
    "command",
    [["inspect", "there/is/none"], ["verify", "there/is/none"], ["diff", ".", "there/is/none"]],
)
def test_a_missing_path_is_a_usage_error(command: list[str]) -> None:
    done = CliRunner().invoke(cli, command)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("stepctl: there/is/none: no such run")


@pytest.mark.training
def test_one_problem_is_one_and_one_element_too(run: Path) -> None:
    shutil.copy(file(run, 40), run / "before.h5")
    altered(run, 40, "params/dense0/bias", 5, lambda value: value + np.float32(0.5))
    said = CliRunner().invoke(cli, ["diff", str(run / "before.h5"), str(file(run, 40))]).stdout
    assert "params/dense0/bias: 1 element differs, first at 5; max abs difference 0.5 (" in said
    removed(run)
    assert CliRunner().invoke(cli, ["verify", str(run)]).stdout.endswith(": 1 problem\n")


def test_the_distance_of_integers_is_not_in_ulp() -> None:
    found = diff.compare_arrays(parts([1, 2], "int64"), parts([1, 5], "int64"))
    assert found == {"equal": False, "n_different": 1, "first": 1, "max_abs": 3.0, "max_ulp": None}
    assert "ULP" not in describe_difference({"path": "hooks/log/count", **found})


@pytest.mark.process
@pytest.mark.parametrize(("other", "code"), [(40, 0), (30, 1)])
def test_an_answer_that_nobody_reads_keeps_its_exit_code(other: int, code: int, run: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "stepctl", "diff", str(file(run, 40)), str(file(run, other))]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, "")


# --- replay


@pytest.mark.training
def test_a_replay_of_a_good_run_is_the_same(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    answer = call("verify", run, "--replay", "0:40")
    assert [(leg["step"], leg["equal"]) for leg in answer["steps"]] == [
        (n, True) for n in (10, 13, 20, 25, 30, 40)
    ]
    assert call("verify", run, "--replay", "13:20")["equal"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.training
def test_a_replay_with_other_data_is_refused(tmp_path: Path) -> None:
    """What would differ is not the training."""
    path, data = tmp_path / "run", tmp_path / "data.npz"
    np.savez(data, x=np.eye(64, 8, dtype="f4"), y=np.arange(64) % 3)
    source = {"name": "arrays", "path": str(data), "batch_size": 4, "validation_fraction": 0.5}
    train(make_config(data=source, checkpoint=KEEP, stop={"last_step": 20}), path)
    assert call("verify", path, "--replay", "10:20")["equal"]
    np.savez(data, x=np.eye(64, 8, dtype="f4"), y=np.arange(1, 65) % 3)
    done = CliRunner().invoke(cli, ["verify", str(path), "--replay", "10:20"])
    assert done.exit_code == 2
    assert f"{data}: not the data that {path} was trained on" in done.output


@pytest.mark.training
@pytest.mark.parametrize(("steps", "code"), [("2:4", 3), ("4:6", 3), ("6:8", 0)])
def test_only_steps_of_the_newest_config_are_replayed(
    steps: str, code: int, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    config = make_config(checkpoint={"every": 2, "keep_last": None}, stop={"last_step": 4})
    train(config, path)
    key = "optimizer.learning_rate"
    change = ["--set", f"{key}=0.5", "--allow-change", key]
    call("resume", path, "--last-step", "8", *change)
    done = CliRunner().invoke(cli, ["verify", str(path), "--replay", steps])
    assert done.exit_code == code
    if code:
        assert "a replay uses the newest config" in done.stderr
        assert "replay from a checkpoint that was saved after the change" in done.stderr


@pytest.mark.training
def test_a_replay_says_where_it_first_differs(run: Path) -> None:
    altered(run, 25, "params/dense1/bias", 3, lambda value: np.nextafter(value, np.float32(9)))
    answer = call("verify", run, "--replay", "10:40", expect=1)
    assert [(leg["step"], leg["equal"]) for leg in answer["steps"]] == [
        (13, True),
        (20, True),
        (25, False),
    ]
    (difference,) = answer["steps"][-1]["differences"]
    assert difference["path"] == "params/dense1/bias"
    assert (difference["n_different"], difference["first"], difference["max_ulp"]) == (1, 3, 1)
    assert not call("verify", run, "--replay", "25:40", expect=1)["equal"], (
        "from a state that was altered"
    )


@pytest.mark.training
@pytest.mark.parametrize(
    ("steps", "code"), [("40:10", 2), ("10:10", 2), ("x", 2), ("10:11", 3), ("1:40", 3)]
)
def test_a_replay_that_cannot_be_is_refused(steps: str, code: int, run: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(run), "--replay", steps])
    assert done.exit_code == code
    assert done.stderr.count("\n") == 1


# --- diff


@pytest.mark.training
def test_a_checkpoint_is_equal_to_itself_and_to_its_runs_newest(run: Path) -> None:
    assert call("diff", file(run, 40), file(run, 40))["equal"]
    assert call("diff", file(run, 40), run)["equal"]


@pytest.mark.training
def test_a_run_stopped_twice_is_equal_to_the_unbroken_one_but_for_its_stop(
    run: Path, tmp_path: Path
) -> None:
    train(make_config(checkpoint=KEEP), tmp_path / "unbroken")
    answer = call("diff", run, tmp_path / "unbroken")
    assert answer["equal"]
    assert [item["key"] for item in answer["config"]] == ["stop.last_step"]


@pytest.mark.training
def test_differences_are_listed(run: Path) -> None:
    shutil.copy(file(run, 40), run / "before.h5")
    altered(run, 40, "params/dense0/bias", 5, lambda value: value + np.float32(0.5))
    answer = call("diff", run / "before.h5", file(run, 40), expect=1)
    assert (answer["equal"], answer["counters"], answer["config"]) == (False, [], [])
    (found,) = [array for array in answer["arrays"] if not array["equal"]]
    assert (found["path"], found["n_different"], found["first"]) == ("params/dense0/bias", 1, 5)
    assert found["max_abs"] == pytest.approx(0.5, rel=1e-6)
    counters = call("diff", file(run, 30), file(run, 40), expect=1)["counters"]
    assert counters[0] == {"key": "global_step", "a": 30, "b": 40}


@pytest.mark.training
def test_arrays_of_other_shapes_are_listed(run: Path, tmp_path: Path) -> None:
    train(
        make_config(model={"name": "mlp", "hidden": [5]}, stop={"last_step": 1}), tmp_path / "other"
    )
    answer = call("diff", run, tmp_path / "other", expect=1)
    shapes = {array["path"]: (array["a"], array["b"]) for array in answer["arrays"] if "a" in array}
    assert shapes["params/dense0/bias"] == ("float32 (16,)", "float32 (5,)")


def parts(values: list[float], dtype: str, *cuts: int) -> Iterator[Any]:
    return iter(np.split(np.array(values, dtype), cuts))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_differences_are_measured_in_ulp_and_in_numbers(dtype: str) -> None:
    one, tiny = np.array(1, dtype), np.finfo(dtype).smallest_subnormal
    up = float(np.nextafter(np.nextafter(one, np.array(2, dtype)), np.array(2, dtype)))
    found = diff.compare_arrays(parts([0, 1, 2, 3], dtype, 1), parts([0, up, 2, 3], dtype, 2, 3))
    assert (found["n_different"], found["first"], found["max_ulp"]) == (1, 1, 2)
    assert found["max_abs"] == up - 1
    across = diff.compare_arrays(parts([-tiny], dtype), parts([tiny], dtype))
    assert across["max_ulp"] == 2, "through zero"
    zeros = diff.compare_arrays(parts([0.0], dtype), parts([-0.0], dtype))
    assert (zeros["equal"], zeros["max_ulp"], zeros["n_different"]) == (False, 0, 1)
    nan = diff.compare_arrays(parts([np.nan, 1], dtype), parts([1, 1], dtype))
    assert (nan["equal"], nan["n_different"], nan["max_abs"]) == (False, 1, 0)
    assert diff.compare_arrays(parts([np.nan, np.inf], dtype), parts([np.nan, np.inf], dtype)) == {
        "equal": True
    }
    assert diff.compare_arrays(parts([], dtype), parts([], dtype)) == {"equal": True}


def test_the_ledger_of_nobody_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "ledger.jsonl").write_text(
        '[]\n{"event": "prune", "steps": ["x", null]}\n{"event": "checkpoint"}\n'
    )
    found, problems = verify.verify(str(tmp_path))
    assert (found, [problem.code for problem in problems]) == ([], ["config"])
    ledger = RunDirectory(tmp_path).read_ledger()
    assert (ledger.run_id, ledger.acknowledged) == (None, {})
    assert yaml.flatten({}) == {}
