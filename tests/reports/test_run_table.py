"""`stepctl runs` shows the state of each run, tolerates other files, and changes nothing."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stepctl.cli.main import cli
from stepctl.cli.runs import print_table
from stepctl.errors import NonFiniteError
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.reports.config_columns import differing_values, short_names
from stepctl.reports.run_table import RunSummary, list_runs, summarize
from stepctl.rundir.directory import RunDirectory
from stepctl.state.train_state import TrainState
from stepctl.writers.jsonl import as_number
from tests.support.runs import make_config, resume, train

NOW = datetime.datetime.now(datetime.UTC)
LAST = "step-00000012.h5"


class Killed(BaseException):
    """Stands for a kill."""


class At(Hook):
    """Calls something after a step."""

    name = "at"
    essential = True  # a kill leaves nothing to save

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self._step, self._act = step, act

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self._step:
            self._act()


def small(**sections: Any) -> Any:
    return make_config(
        **{"stop": {"last_step": 12}, "log": {"every": 2}, "checkpoint": {"every": 4}, **sections}
    )


def one(path: Path) -> RunSummary:
    found = summarize(RunDirectory(path), NOW)
    assert found is not None
    return found


def train_rates(folder: Path) -> None:
    """Train with four learning rates, the last of them too high."""
    for rate in (0.01, 0.1, 0.001, 1e30):
        config = small(
            optimizer={"name": "adam", "learning_rate": rate}, evaluate={"every": 4}, seed=0
        )
        with contextlib.suppress(NonFiniteError):
            train(config, folder / f"rate-{rate:g}")


@pytest.mark.training
def test_runs_that_differ_in_a_key_are_compared_and_sorted(tmp_path: Path) -> None:
    train_rates(tmp_path)
    done = call(tmp_path, "--sort", "accuracy")
    head, *lines = (line.split() for line in done.stdout.splitlines())
    assert head == [
        "run",
        "step",
        "target",
        "learning_rate",
        "metric",
        "last",
        "best",
        "state",
        "age",
    ]
    best = [float(line[7]) for line in lines]
    assert best == sorted(best, reverse=True)
    assert {line[0]: line[3] for line in lines} == {
        "rate-0.01": "0.01", "rate-0.1": "0.1", "rate-0.001": "0.001", "rate-1e+30": "1e+30",
    }  # fmt: skip
    assert {line[0]: line[8] for line in lines if line[8] != "finished"} == {"rate-1e+30": "failed"}
    assert done.stderr.startswith("rate-1e+30: NonFiniteError: step 2: the loss is ")
    by_loss = json.loads(call(tmp_path, "--sort", "loss", "--json").stdout)
    losses = [run["best"] for run in by_loss]
    assert losses == sorted(losses)
    assert by_loss[0]["differing"].keys() == {"optimizer.learning_rate.value"}
    wrong = call(tmp_path, "--sort", "acuracy")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    hint = "no run has this metric (did you mean 'accuracy'?); there are: accuracy, "
    assert f"--sort acuracy: {hint}" in wrong.stderr


def config_of(**changes: Any) -> dict[str, Any]:
    common = {
        "seed": 0,
        "data.name": "digits",
        "optimizer.learning_rate.value": 0.1,
        "log.every": 10,
    }
    return {**common, **{key.replace("__", "."): value for key, value in changes.items()}}


def test_only_keys_that_two_configs_have_with_different_values_differ() -> None:
    configs = [
        config_of(seed=1, model__hidden=[8]),
        None,
        config_of(optimizer__learning_rate__value=0.2, stop__last_step=7, checkpoint__every=5),
        config_of(log__every=20, stop__last_step=8),
    ]
    found = differing_values(configs)
    assert found[1] == {}
    assert list(found[0]) == ["optimizer.learning_rate.value", "seed", "log.every"]
    assert found[2] == {"optimizer.learning_rate.value": 0.2, "seed": 0, "log.every": 10}


def test_keys_that_the_data_decide_do_not_differ() -> None:
    decided = {"data.sample_shape": [4], "data.n_classes": 3, "data.encodings": [{"mean": 1.0}]}
    configs = [{**config_of(seed=1), **decided}, {**config_of(), **dict.fromkeys(decided)}]
    assert differing_values(configs) == [{"seed": 1}, {"seed": 0}]


def test_heads_are_the_shortest_ends_that_are_unique() -> None:
    keys = ["optimizer.learning_rate.value", "log.every", "checkpoint.every", "a.step", "seed"]
    heads = ["learning_rate", "log.every", "checkpoint.every", "a.step", "seed"]
    assert short_names(keys, ["run", "step"]) == heads


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_values(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        RunSummary(
            name=f"run-{number}",
            step=1000,
            target=1000,
            metric="validation accuracy",
            last=0.912345,
            best=0.923456,
            state="finished",
            reason="",
            age=90,
            differing={"optimizer.learning_rate.value": 0.1 * number, "optimizer.name": "adamw"},
        )
        for number in range(3)
    ]
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(runs)
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= width
    assert "\u2026" not in shown.out
    kept = lines[0].split()
    assert {"run", "state"} <= set(kept)
    for line in lines[1:]:
        values = (
            line.replace("validation accuracy", "validation_accuracy").replace(" s", "s").split()
        )
        assert len(values) == len(kept)
    dropped = shown.err.removeprefix(f"left out in {width} columns: ").strip().split(", ")
    everything = [
        "run",
        "step",
        "target",
        "learning_rate",
        "name",
        "metric",
        "last",
        "best",
        "state",
        "age",
    ]
    assert sorted([*kept, *dropped] if shown.err else kept) == sorted(everything)
    assert ("target" in kept) == (width >= 100)
    assert "metric" in kept or not {"last", "best"} & set(kept)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["runs", *map(str, arguments)])


def kill() -> None:
    raise Killed


@pytest.mark.training
def test_a_finished_run_that_is_extended_and_broken_off(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(), path)
    assert (one(path).state, one(path).step, one(path).target) == ("finished", 12, 12)
    with pytest.raises(Killed):
        resume(path, last_step=20, hooks=(At(19, kill),))
    assert (one(path).state, one(path).step, one(path).target) == ("interrupted", 16, 20)
    assert one(path).reason == "Killed: "
    resume(path)
    assert (one(path).state, one(path).step) == ("finished", 20)


@pytest.mark.process
def test_a_killed_process_leaves_an_interrupted_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(), path)
    lines = (path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (path / "ledger.jsonl").write_text("".join(lines[:-1]))
    ended = subprocess.Popen(["true"])
    ended.wait()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    dead = {"host": socket.gethostname(), "boot_id": boot, "pid": ended.pid}
    (path / "lock").write_text(json.dumps(dead))
    assert (one(path).state, one(path).reason) == ("interrupted", "no end is recorded")
    (path / "lock").write_text(
        json.dumps({**dead, "boot_id": "before the power cut", "pid": os.getpid()})
    )
    assert one(path).state == "interrupted"
    (path / "lock").write_text(json.dumps({**dead, "host": "elsewhere"}))
    assert (one(path).state, one(path).reason) == ("held", f"process {ended.pid} on elsewhere")


@pytest.mark.training
def test_an_end_event_without_done_is_judged_by_its_step(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(), path)
    ledger = path / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"done": true', '"other": 1'))
    assert one(path).state == "finished"
    ledger.write_text(ledger.read_text().replace('"target": 12', '"target": 13'))
    assert one(path).state == "interrupted"


@pytest.mark.training
def test_a_run_in_training_is_running_and_its_lock_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "run", []
    monkeypatch.setattr("stepctl.writers.row_buffer.HOLD_SECONDS", 0)

    def look_now() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", lambda *arguments: pytest.fail("the lock was touched"))
            seen.append(one(path))

    train(small(), path, (At(10, look_now),))
    assert [(run.state, run.step, run.target) for run in seen] == [("running", 10, 12)]
    assert seen[0].reason == f"process {os.getpid()} on {socket.gethostname()}"


def damage(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(2000)
        file.write(b"?")


DAMAGES: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "damaged": (lambda path: damage(path / LAST), f"{LAST}: damaged (sha256 mismatch)", 8),
    "lost": (
        lambda path: (path / LAST).unlink(),
        f"{LAST}: acknowledged in ledger.jsonl, but missing",
        8,
    ),
    "an older one lost": (
        lambda path: (path / "step-00000004.h5").unlink(),
        "step-00000004.h5: acknowledged in ledger.jsonl, but missing",
        12,
    ),
    "all lost": (
        lambda path: [file.unlink() for file in path.iterdir()],
        f"{LAST}: acknowledged in ledger.jsonl, but missing",
        0,
    ),
}


@pytest.mark.training
@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_detected_and_reported(case: str, tmp_path: Path) -> None:
    spoil, reason, step = DAMAGES[case]
    train(small(), tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoints")
    run = one(tmp_path / "run")
    assert (run.state, run.reason, run.step) == ("damaged", reason, step)
    done = call(tmp_path)
    assert (done.exit_code, done.stderr) == (0, f"run: {reason}\n")


@pytest.mark.training
def test_pruned_and_set_aside_checkpoints_are_not_reported_as_lost(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(checkpoint={"every": 2, "keep_last": 4}), path)
    resume(path, from_step=8, last_step=9)
    assert (one(path).state, one(path).step) == ("finished", 9)


METRICS: list[tuple[list[dict[str, Any]], tuple[str | None, float | None, float | None]]] = [
    ([], (None, None, None)),
    (
        [{"step": 1, "kind": "train", "loss": 2.0}, {"step": 2, "kind": "train", "loss": 3}],
        ("training loss", 3.0, 2.0),
    ),
    (
        [{"step": 1, "kind": "eval", "loss": "NaN"}, {"step": 2, "kind": "train", "loss": 1.0}],
        ("validation loss", None, None),
    ),
    (
        [
            {"step": 1, "kind": "eval", "critic_loss": 2.0},
            {"step": 2, "kind": "eval", "critic_loss": -1.0, "extra": True},
        ],
        ("validation critic_loss", -1.0, -1.0),
    ),
    (
        [{"step": 1, "kind": "eval", "loss": [1]}, {"step": 2, "kind": "eval", "loss": 10**400}],
        (None, None, None),
    ),
]


@pytest.mark.parametrize(("rows", "expected"), METRICS)
def test_the_metric_is_the_loss_of_evaluations_if_there_are_some(
    rows: Any, expected: Any, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LAST).touch()
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = one(tmp_path)
    last = None if run.last != run.last else run.last  # NaN is the last that there was
    assert (run.metric, last, run.best) == expected


@pytest.mark.training
def test_the_metric_of_keep_best_comes_first(tmp_path: Path) -> None:
    best = {"metric": "accuracy", "mode": "max"}
    config = small(evaluate={"every": 4}, checkpoint={"every": 4, "keep_best": best})
    train(config, tmp_path / "run")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    values = [row["accuracy"] for row in rows if row["kind"] == "eval"]
    run = one(tmp_path / "run")
    assert (run.metric, run.last, run.best) == ("validation accuracy", values[-1], max(values))


@pytest.mark.training
def test_age_counts_from_the_newest_line_of_the_ledger(tmp_path: Path) -> None:
    train(small(), tmp_path / "run")
    line = json.loads((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[-1])
    then = datetime.datetime.fromisoformat(line["time"])
    found = list_runs(str(tmp_path), then + datetime.timedelta(hours=3))
    assert [run.age for run in found] == [3 * 3600]
    assert [run.age for run in list_runs(str(tmp_path), then - datetime.timedelta(hours=3))] == [0]
    RunDirectory(tmp_path / "run").append_ledger("fork", step=4, sha256="", child="elsewhere")
    [run] = list_runs(str(tmp_path), then + datetime.timedelta(hours=3))
    assert run.age == 3 * 3600, "a fork's line is none of its own life"


def hostile(folder: Path) -> None:
    """Fill a folder with what no run leaves behind."""
    for name in (
        "pipe",
        "loop",
        "folder",
        "deep",
        "odd\x1b[31mname\udcff",
        "texts",
        "stillborn",
        "empty",
    ):
        (folder / name / "checkpoints").mkdir(parents=True)
    (folder / "a file").touch()
    (folder / "stillborn" / "lock").touch()
    for name in ("ledger.jsonl", "metrics.jsonl", "lock", "config.yaml"):
        os.mkfifo(folder / "pipe" / name)
        (folder / "loop" / name).symlink_to(name)
        (folder / "folder" / name).mkdir()
        (folder / "deep" / name).write_text("[" * 100_000 + "\n")
    os.mkfifo(folder / "deep" / "checkpoints" / LAST)
    (folder / "odd\x1b[31mname\udcff" / "checkpoints" / LAST).symlink_to(LAST)
    lines: list[Any] = [
        {
            "event": "start",
            "segment": 1,
            "step": 10**4000,
            "target": -(10**4000),
            "data": "",
            "time": 5,
        }
    ]
    lines += [
        {
            "event": "start",
            "segment": 1,
            "step": 1,
            "target": 1,
            "data": "",
            "config": [1],
            "set_aside": 5,
        }
    ]
    lines += [{"event": "checkpoint", "step": 1, "sha256": "", "pruned": 7, "time": "\x1b[31m"}]
    lines += [{"event": "end", "segment": 1, "step": True, "reason": "\x1b]0;x\x07", "done": "no"}]
    (folder / "texts" / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)))
    row = {"step": 10**4000, "kind": "train", "\x1b[31mloss": 1.0, "loss": {}}
    (folder / "texts" / "metrics.jsonl").write_text(json.dumps(row))
    (folder / "texts" / "lock").write_text(json.dumps({"host": "\x1b[31m", "pid": "x"}))


def test_nothing_in_the_folder_makes_it_fail_or_wait_or_reach_the_terminal(tmp_path: Path) -> None:
    hostile(tmp_path)
    found = list_runs(str(tmp_path), NOW)
    assert {run.name: run.state for run in found} == {
        "deep": "damaged",
        "folder": "damaged",
        "odd\x1b[31mname\udcff": "damaged",
        "pipe": "damaged",
        "loop": "damaged",
        "texts": "held",
    }
    for options in ([], ["--json"]):
        done = call(tmp_path, *options)
        assert done.exit_code == 0, done.output
        assert done.output.replace("\n", "").isprintable()
        assert max(map(len, done.stderr.splitlines())) < 1100
    assert max(map(len, call(tmp_path).stdout.splitlines())) < 300


@pytest.mark.training
def test_lines_and_json_say_the_same(tmp_path: Path) -> None:
    train(small(), tmp_path / "a")
    train(small(stop={"last_step": 7}), tmp_path / "b")
    head, *lines = call(tmp_path).stdout.splitlines()
    assert head.split() == ["run", "step", "target", "metric", "last", "best", "state", "age"]
    runs = json.loads(call(tmp_path, "--json").stdout)
    assert [run["differing"] for run in runs] == [{}, {}]
    assert [line.split()[:3] for line in lines] == [["a", "12", "12"], ["b", "7", "7"]]
    for line, run in zip(lines, runs, strict=True):
        assert line.split()[3:8] == [
            *run["metric"].split(),
            f"{run['last']:.4g}",
            f"{run['best']:.4g}",
            run["state"],
        ]


@pytest.mark.training
def test_a_run_itself_can_be_named(tmp_path: Path) -> None:
    train(small(), tmp_path / "a")
    assert [run["name"] for run in json.loads(call(tmp_path / "a", "--json").stdout)] == ["a"]


def test_a_missing_folder_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    done = call(tmp_path / "nowhere")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "nowhere: cannot be listed: No such file or directory; give the folder that holds runs\n"
    )
    done = call(tmp_path)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "no runs; start one" in done.stderr


@pytest.mark.parametrize("value", [True, None, "text", [1], {"a": 1}, 10**400])
def test_a_metric_that_is_not_a_number_is_refused(value: object) -> None:
    assert as_number(value) is None


def sparse(path: Path) -> None:
    os.truncate(path, 1 << 40)


def one_long_line(path: Path) -> None:
    os.truncate(path, path.stat().st_size + (1 << 25))


@pytest.mark.training
@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
@pytest.mark.parametrize("spoil", [sparse, one_long_line])
def test_huge_records_of_one_run_are_its_own_affair(
    spoil: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    for run in ("good", "huge"):
        train(small(), tmp_path / run)
    spoil(tmp_path / "huge" / name)
    good, huge = list_runs(str(tmp_path), NOW)
    assert (good.name, good.state, good.step) == ("good", "finished", 12)
    assert (huge.name, huge.state) == ("huge", "damaged")
    assert f"{name}: " in huge.reason
    assert "a line has more than the maximum of 16,777,216 bytes" in huge.reason
