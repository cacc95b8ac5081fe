"""The command line in real processes: output, exit codes and the files that a run leaves."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.checkpoint import codec, names
from stepctl.cli.main import cli
from stepctl.cli.parameter_types import Duration
from stepctl.config import yaml
from stepctl.config.model import Config
from stepctl.errors import ConfigError
from stepctl.rundir.directory import RunDirectory
from stepctl.state.arena import Arena
from stepctl.state.counters import Counters
from stepctl.state.train_state import SavedHook, TrainState
from stepctl.system import blas
from tests.support.messages import normalize
from tests.support.runs import RUN_ID, file_bytes, make_config, rows, train
from tests.support.stops import some_of

pytestmark = pytest.mark.usefixtures("in_tmp_path")

ROOT = Path(stepctl.__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
FOREVER = 1_000_000_000
DEADLINE = 120  # seconds: only a hang comes near it
COMMAND = [sys.executable, "-m", "stepctl.cli.main"]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def call(*arguments: object, expect: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `stepctl` to its end; it must exit with `expect`, and data and messages must not mix."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


class Running:
    """A `stepctl` that runs, and what it has said so far."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], env=environment(), stderr=subprocess.PIPE, text=True
        )
        self.said: list[str] = []

    def until(self, pattern: str, also: Callable[[], object] = lambda: True) -> re.Match[str]:
        """Read its messages until one matches and `also` holds."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            match = re.search(pattern, line)
            if match and also():
                return match
        raise AssertionError(f"never said {pattern!r}:\n{''.join(self.said)}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Return exit code and the rest of its messages."""
        assert self.process.stderr is not None
        rest = self.process.stderr.read()
        return self.process.wait(), rest


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[Running]:
    child = Running(*arguments)
    with child.process, killed_if_it_hangs(child.process):
        try:
            yield child
        finally:
            child.process.kill()


@contextlib.contextmanager
def killed_if_it_hangs(process: subprocess.Popen[Any]) -> Iterator[None]:
    watchdog = threading.Timer(DEADLINE, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def small(**sections: Any) -> Config:
    """Return a config of a run that takes milliseconds, and write its data."""
    generator = np.random.default_rng(0)
    np.savez("samples.npz", x=generator.normal(size=(60, 4)), y=generator.integers(0, 3, 60))
    base: dict[str, Any] = {
        "data": {
            "name": "arrays",
            "path": "samples.npz",
            "batch_size": 8,
            "validation_fraction": 0.5,
        },
        "model": {"name": "mlp", "hidden": [3], "dropout": 0.2},
        "log": {"every": 20},
    }
    return make_config(**base | sections)


def write(config: Config, name: str = "small.yaml") -> str:
    Path(name).write_text(yaml.dumps(config.plain()))
    return name


def bits(run: str, step: int) -> dict[str, bytes]:
    """Return every array and counter of a checkpoint by its path."""
    with codec.Reader(Path(run) / "checkpoints" / names.file_name(step)) as reader:
        texts = ("config", "numerics")
        return {
            path: dataset[()].tobytes()
            for path, dataset in reader.datasets.items()
            if path not in texts
        }


def unbroken_bits(config: Config, last_step: int) -> dict[str, bytes]:
    train(config.with_values({"stop.last_step": last_step}), Path("unbroken"))
    return bits("unbroken", last_step)


def ledger(run: str, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(run) / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def saved(run: str) -> list[str]:
    return sorted(path.name for path in (Path(run) / "checkpoints").glob("step-*.h5"))


# --- from the first command to the last


@pytest.mark.process
def test_the_quick_start(tmp_path: Path) -> None:
    first = call("train", "--config", QUICKSTART)
    second = call("resume", "runs/quickstart", "--num-steps", 100)
    assert (first.stdout, second.stdout) == ("", "")
    assert "step 100/100  epoch" in first.stderr
    assert "global step 100 to 200, from step-00000100.h5" in second.stderr
    assert "step 110/200 (local 10)" in second.stderr
    assert "done at global step 200 (local 100)" in second.stderr
    shown = call("inspect", "runs/quickstart/checkpoints/step-00000200.h5", "--step")
    assert (shown.stdout, shown.stderr) == ("200\n", "")

    call("train", "--config", QUICKSTART, "--last-step", 200, "--run-dir", "whole", "--quiet")
    broken, whole = (
        json.loads(call("inspect", run, "--json").stdout) for run in ("runs/quickstart", "whole")
    )
    assert broken["arrays"] == whole["arrays"]
    assert (
        broken["counters"]
        == whole["counters"]
        == {"global_step": 200, "samples_seen": 12800, "model": 200}
    )
    assert bits("runs/quickstart", 200) == bits("whole", 200)
    assert rows(Path("runs/quickstart")) == rows(Path("whole"))


@pytest.mark.process
def test_or_resume_does_whichever_applies(snapshot: SnapshotAssertion) -> None:
    name = write(small(stop={"last_step": 30}))
    line = ("train", "--config", name, "--or-resume", "--run-dir", "run")
    assert "from the initial state" in call(*line, "--last-step", 12).stderr
    refusal = call("train", "--config", name, "--run-dir", "run", expect=2)
    assert normalize(refusal.stderr) == snapshot
    assert "global step 12 to 30, from step-00000012.h5" in call(*line).stderr
    again = call(*line)
    assert normalize(again.stderr) == snapshot
    assert bits("run", 30) == unbroken_bits(small(), 30)


DURATIONS = {
    "90": 90,
    "90s": 90,
    "55m": 3300,
    "55min": 3300,
    "1h30m": 5400,
    "2d": 172800,
    "1d2h3m4s": 93784,
    "1.5h": 5400,
    "0.5": 0.5,
    ".5s": 0.5,
    "1.d": 86400,
    "1:30:00": 5400,
    "0:00:01": 1,
    "100:00:00": 360000,
    "2-12:00:00": 216000,
}


@pytest.mark.parametrize("text", DURATIONS)
def test_a_time_is_read_as_it_is_written(text: str) -> None:
    assert Duration().convert(text, None, None) == DURATIONS[text]


NO_DURATIONS = [
    "0",
    "0s",
    "-5",
    "h",
    "",
    "1x",
    "1:30",
    "1:60:00",
    "1:5:0",
    "1h1d",
    "1e3",
    "nan",
    "inf",
    "9" * 400,
]
NO_DURATIONS += ["\u0663s"]


@pytest.mark.parametrize("text", NO_DURATIONS, ids=lambda text: ascii(text[:9]))
def test_an_invalid_time_is_one_line(text: str) -> None:
    result = CliRunner().invoke(cli, ["resume", "run", f"--max-time={text}"])
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: Invalid value for '--max-time': ")
    assert line.endswith("give one such as 90s, 55m, 1.5h, 2d or 1:30:00 (hours:minutes:seconds)")


@pytest.mark.process
def test_a_time_stops_a_run() -> None:
    config = small(stop={"last_step": FOREVER})
    done = call("train", write(config), "--run-dir", "run", "--max-time", "0:00:01", expect=75)
    assert "stopped at global step" in done.stderr


@pytest.mark.process
def test_the_config_needs_no_option() -> None:
    call("train", write(small(stop={"last_step": 3})), "--run-dir", "a", "-q")
    call("train", "--config", "small.yaml", "--run-dir", "b", "-q")
    assert bits("a", 3) == bits("b", 3)
    call("train", "small.yaml", "-q")  # the run is called as the config is
    assert saved("runs/small") == saved("a")
    call("train", "small.yaml", "--or-resume", "--last-step", 5, "-q")
    assert saved("runs/small")[-1] == "step-00000005.h5"


@pytest.mark.process
def test_a_run_of_no_steps_is_a_run() -> None:
    call("train", "--config", write(small()), "--num-steps", 0, "--run-dir", "run")
    assert saved("run") == ["step-00000000.h5"]
    assert "from step-00000000.h5" in call("resume", "run", "--num-steps", 2).stderr
    assert saved("run")[-1] == "step-00000002.h5"


def all_steps(event: dict[str, Any]) -> list[int]:
    return sorted([*range(event["first"], event["last"] + 1, event["every"]), *event["also"]])


@pytest.mark.process
def test_the_plan_of_a_dry_run_equals_the_steps_of_the_run() -> None:
    cadence: dict[str, Any] = {
        "log": {"every": 7, "offset": 2},
        "evaluate": {"every": 10},
        "checkpoint": {"every": 8, "keep_last": None},
        "stop": {"last_step": 33},
        "initial_step": 3,
    }
    config = small(**cadence)
    line = ("train", "--config", write(config), "--run-dir", "run", "--dry-run")
    before = sorted(os.listdir())
    dry = call(*line, "--json")
    text = call(*line).stdout
    assert dry.stderr == ""
    assert sorted(os.listdir()) == before

    plan, state = json.loads(dry.stdout), train(config, Path("run"))
    assert plan["steps"] == [3, 33]
    for event, kind in (("log", "train"), ("evaluate", "eval")):
        written = [row["step"] for row in rows(Path("run")) if row["kind"] == kind]
        assert all_steps(plan["events"][event]) == written, event
    assert all_steps(plan["events"]["save"]) == [
        line["step"] for line in ledger("run", "checkpoint")
    ]
    sizes = {path.stat().st_size for path in Path("run/checkpoints").iterdir()}
    assert sizes == {plan["bytes"]["checkpoint"]}
    assert plan["parameters"] == {name: list(view.shape) for name, view in state.params.items()}
    assert plan["n_parameters"] == sum(view.size for view in state.params.values())
    assert plan["samples"] == {"training": 30, "validation": 30, "shape": [4]}
    for words in (
        f"{plan['bytes']['checkpoint']:,} bytes",
        "3 to 33",
        "dense0/weight",
        "3, 8, 16, 24, 32, 33",
    ):
        assert words in text


@pytest.mark.process
def test_a_dry_run_never_touches_a_run() -> None:
    name = write(small(stop={"last_step": 3}))
    train(small(stop={"last_step": 3}), Path("run"))
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for more in ((), ("--or-resume", "--last-step", 9)):
        call("train", "--config", name, "--run-dir", "run", "--dry-run", *more)
        assert {
            path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()
        } == before


# --- inspect


def odd_checkpoint() -> dict[str, Any]:
    """Write odd.h5, and return its arrays by path."""
    generator = np.random.default_rng(3)
    params = Arena(
        {"wide/weight": (3, 5), "wide/bias": (5,), "scalar": (), "empty": (0, 2)}, "float32"
    )
    arenas = {"params": params, "optimizers/model/momentum": params.like()}
    for view in (view for arena in arenas.values() for view in arena.values()):
        view[...] = generator.normal(100, 3, view.shape)
    params["wide/bias"][:2] = np.nan, -np.inf
    best = {
        "steps": np.array([5, 2**40]),
        "flags": np.array([0, 255], np.uint8),
        "none": np.array([np.nan]),
    }
    counters = Counters({"global_step": 7, "samples_seen": 56, "model": 7})
    state = TrainState(counters, arenas, hooks=[SavedHook("best", best)])
    data = file_bytes(
        codec.encode(
            state, run="moon", run_id=RUN_ID, config="seed: 3\n", numerics='{"threads": 1}'
        )
    )
    Path("odd.h5").write_bytes(data)
    return state.arrays()


def figures(array: Any) -> dict[str, Any]:
    finite = array[np.isfinite(array)].astype(np.float64)
    counts = {"count": array.size, "non_finite": array.size - finite.size}
    if not finite.size:
        return counts | dict.fromkeys(("min", "max", "mean", "std"))
    return counts | {
        "min": finite.min(),
        "max": finite.max(),
        "mean": finite.mean(),
        "std": finite.std(),
    }


@pytest.mark.process
def test_inspect_prints_the_values_that_numpy_reads() -> None:
    arrays = odd_checkpoint()
    done = call("inspect", "odd.h5", "--json")
    facts = json.loads(done.stdout)
    assert done.stderr == ""
    assert (facts["global_step"], facts["run"], facts["parameters"]) == (7, "moon", 21)
    assert facts["config"] == {"seed": 3}
    assert facts["numerics"] == {"threads": 1}
    assert [array["path"] for array in facts["arrays"]] == list(arrays)
    for found in facts["arrays"]:
        array = arrays[found["path"]]
        assert (found["shape"], found["dtype"]) == (list(array.shape), array.dtype.name)
        for figure, value in figures(array).items():
            assert found[figure] == (
                pytest.approx(value, rel=1e-12) if value is not None else None
            ), found["path"]


@pytest.mark.process
def test_inspect_prints_a_table_with_the_same_figures() -> None:
    arrays = odd_checkpoint()
    done = call("inspect", "odd.h5", "--path", "params/wide/*")
    assert done.stderr == ""
    table = [
        re.split(r"\s{2,}", line.strip())
        for line in done.stdout.splitlines()
        if line.startswith("params/")
    ]
    assert [row[0] for row in table] == ["params/wide/weight", "params/wide/bias"]
    assert "optimizers/" not in done.stdout
    for path, shape, dtype, *cells in table:
        values = figures(arrays[path])
        expected = [
            str(values["count"]),
            *(f"{values[key]:.4g}" for key in ("min", "max", "mean", "std")),
        ]
        assert cells == [*expected, str(values["non_finite"])]
        assert (shape, dtype) == (str(arrays[path].shape), "float32")
    assert "global step 7" in done.stdout


# --- signals


@pytest.mark.parametrize("command", ["train --config x.yaml", "resume x"])
def test_signals_are_held_before_the_ranks_of_a_job_join(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes most of a job's start; one that came in it would end the job with another code than 75."""

    def communicator() -> None:
        held.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        raise ConfigError("enough")

    held = set[int]()
    monkeypatch.setattr("stepctl.cli.ranks.communicator", communicator)
    assert CliRunner().invoke(cli, command.split()).exit_code == 2
    assert held >= {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU]


@pytest.mark.process
@pytest.mark.parametrize("number", some_of(STOPS, every=3), ids=lambda number: number.name)
def test_a_signal_stops_with_a_durable_checkpoint_and_the_run_resumes_exactly(
    number: signal.Signals,
) -> None:
    config = small(stop={"last_step": FOREVER})
    with running("train", "--config", write(config), "--run-dir", "run") as child:
        child.until("step 60/")
        child.signal(number)
        code, rest = child.end()
    assert code == 75
    match = re.search(
        r"stopped at global step (\d+) \((.*)\); continue with: stepctl resume run$", rest.strip()
    )
    assert match, rest
    step = int(match[1])
    assert match[2] == f"signal {number.name}"
    assert saved("run")[-1] == names.file_name(step)
    assert ledger("run", "end")[-1]["reason"] == f"signal {number.name}"
    call("resume", "run", "--last-step", step + 25, "--quiet")
    assert bits("run", step + 25) == unbroken_bits(config, step + 25)
    assert rows(Path("run")) == rows(Path("unbroken"))


@pytest.mark.process
def test_a_killed_run_resumes_exactly() -> None:
    config = small(stop={"last_step": FOREVER}, checkpoint={"every": 25})
    with running("train", "--config", write(config), "--run-dir", "run") as child:
        child.until("step 60/")
        child.signal(signal.SIGKILL)
        assert child.end()[0] == -signal.SIGKILL
    newest = int(saved("run")[-1][5:13])
    assert newest >= 25  # 50 may still have been in flight
    call("resume", "run", "--num-steps", 30, "--quiet")
    assert bits("run", newest + 30) == unbroken_bits(config, newest + 30)
    assert rows(Path("run")) == rows(Path("unbroken"))


@pytest.mark.process
def test_sigusr2_saves_and_training_continues() -> None:
    config = small(stop={"last_step": FOREVER}, checkpoint={"every": FOREVER, "keep_last": None})
    with running("train", "--config", write(config), "--run-dir", "run") as child:
        child.until("step 60/")
        assert saved("run") == ["step-00000000.h5"]
        child.signal(signal.SIGUSR2)
        child.until(r"step \d+/", also=lambda: len(saved("run")) == 2)
        step = int(saved("run")[-1][5:13])
        assert step >= 60
        while int(child.until(rf"step (\d+)/{FOREVER}")[1]) <= step + 20:
            pass
        child.signal(signal.SIGKILL)
        child.end()
    assert bits("run", step) == unbroken_bits(config, step)


@pytest.mark.process
def test_nobody_need_read_the_messages() -> None:
    """As after Ctrl-C in `stepctl train ... 2>&1 | tee log`, which ends tee as well."""
    config = small(stop={"last_step": FOREVER}, checkpoint={"every": FOREVER})
    with running("train", "--config", write(config), "--run-dir", "run") as child:
        child.until("step 60/")
        assert child.process.stderr is not None
        child.process.stderr.close()
        child.signal(signal.SIGINT)
        assert child.process.wait() == 75
    (end,) = ledger("run", "end")
    assert end["reason"] == "signal SIGINT"
    assert saved("run") == ["step-00000000.h5", names.file_name(end["step"])]


@pytest.mark.process
@pytest.mark.parametrize(
    "command", some_of(["inspect {}", "plot {}", "runs", "verify {}", "doctor"], every=2)
)
def test_there_need_not_be_a_stdout(command: str, tmp_path: Path) -> None:
    train(small(stop={"last_step": 3}), tmp_path / "runs" / "run")
    words = command.format(tmp_path / "runs" / "run").split()
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *words],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    some_of(
        ["--help", "--version", "runs", "inspect {}", "config schema", "train --help"], every=2
    ),
)
def test_output_that_a_full_disk_refuses_is_reported(command: str, tmp_path: Path) -> None:
    """Not by the exit code 120 that Python has for it, and a traceback."""
    train(small(stop={"last_step": 3}), tmp_path / "runs" / "run")
    words = command.format(tmp_path / "runs" / "run").split()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *words],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE,
        )
    said = "stepctl: <stdout>: No space left on device; fix that and run the command again\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.process
def test_debug_shows_where_the_system_refused() -> None:
    with open("/dev/full", "w") as full:
        command = [*COMMAND, "--debug", "config", "schema"]
        done = subprocess.run(
            command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "No space left on device" in done.stderr


@pytest.mark.process
def test_a_closed_stderr_is_no_error() -> None:
    train(small(stop={"last_step": 3}), Path("run"))
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "resume", "run", "--last-step", "5"]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (0, b"")
    assert saved("run")[-1] == "step-00000005.h5"


STUCK = """
import os, signal, sys
from dataclasses import dataclass
from stepctl.optimizers.schedules import Schedule

@dataclass(frozen=True, kw_only=True)
class Stuck(Schedule):
    def after_warmup(self, step: int) -> float:
        if step == 3:
            arrived, arrives = os.pipe()
            os.set_blocking(arrives, False)
            signal.set_wakeup_fd(arrives)
            while True:
                print("in step 4", file=sys.stderr, flush=True)
                os.read(arrived, 1)
        return 0.1
"""


@pytest.mark.process
def test_a_second_sigint_stops_at_once(snapshot: SnapshotAssertion) -> None:
    """In the middle of an update that never ends, where the first one waits in vain."""
    Path("stuck.py").write_text(STUCK)
    config = small(
        optimizer={"name": "sgd", "learning_rate": {"name": "stuck:Stuck"}}, checkpoint={"every": 2}
    )
    with running("train", "--config", write(config), "--run-dir", "run") as child:
        for _ in range(2):
            child.until("in step 4")
            while not ledger("run", "checkpoint")[1:]:  # that of step 2 may be in flight
                pass
            child.signal(signal.SIGINT)
        code, rest = child.end()
    assert code == 75
    assert normalize(rest) == snapshot
    assert saved("run") == ["step-00000000.h5", "step-00000002.h5"]
    assert bits("run", 2) == unbroken_bits(config, 2)


# --- exit codes and messages


@pytest.mark.process
def test_refusals_have_their_exit_codes_and_one_plain_line() -> None:
    name = write(small(stop={"last_step": 3}))
    train(small(stop={"last_step": 3}), Path("run"))
    Path("junk.h5").write_text("junk")
    refusals: list[tuple[int, tuple[object, ...], str]] = [
        (2, ("train", "--config", "missing.yaml"), "missing.yaml"),
        (
            2,
            ("train", "--config", name, "--num-steps", 1, "--last-step", 1),
            "--num-steps and --last-step: give one",
        ),
        (2, ("resume", "nowhere"), "nowhere: no run found"),
        (
            2,
            ("resume", "run", "--set", "seed=2", "--last-step", 9),
            "seed: 1 -> 2 would change the result",
        ),
        (3, ("inspect", "junk.h5"), "junk.h5: not a stepctl checkpoint"),
        (3, ("resume", "run", "--from-step", 2), "no checkpoint of step 2; available steps: 0, 3"),
    ]
    for code, arguments, words in refusals:
        done = call(*arguments, expect=code)
        assert done.stdout == ""
        assert done.stderr.startswith("stepctl: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    with RunDirectory(Path("run")).lock():
        done = call("resume", "run", "--last-step", 9, expect=4)
        assert done.stderr.startswith(f"stepctl: run: in use by process {os.getpid()} on ")


@pytest.mark.process
def test_verbose_says_what_is_saved_and_quiet_says_nothing() -> None:
    name = write(small(stop={"last_step": 3}))
    said = call("train", "--config", name, "--run-dir", "loud", "-v").stderr
    assert "saved step-00000000.h5" in said
    assert "saved step-00000003.h5" in said
    assert call("train", "--config", name, "--run-dir", "quiet", "-q").stderr == ""


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.process
def test_help_imports_nothing_heavy() -> None:
    every = [list(path) for path in commands(cli)]
    assert ["train"] in every
    assert ["config", "schema"] in every
    code = (
        "import json, sys\n"
        "from stepctl.cli.main import cli\n"
        "for path in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        cli.main([*path, '--help'], prog_name='stepctl')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, path\n"
        "print('imported:', *sorted({'numpy', 'h5py', 'pydantic', 'rich', 'threadpoolctl'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(every)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    assert done.stdout.count("Usage: stepctl") == len(every)
    assert done.stdout.splitlines()[-1] == "imported:"


# --- numerics


@pytest.mark.process
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_stay_as_at_the_start_for_any_environment(threads: int) -> None:
    if (os.cpu_count() or 1) < threads:
        pytest.skip("one core: BLAS runs one thread")
    config = small(
        stop={"last_step": 5}, numerics={"threads": threads}, model={"name": "mlp", "hidden": [64]}
    )
    name, other = write(config), str(3 - threads)
    call(
        "train",
        "--config",
        name,
        "--run-dir",
        "run",
        "-q",
        OPENBLAS_NUM_THREADS=other,
        OMP_NUM_THREADS=other,
    )
    call("resume", "run", "--last-step", 9, "-q", OPENBLAS_NUM_THREADS=other, OMP_NUM_THREADS=other)
    starts = ledger("run", "start")
    assert [start["numerics"]["threads"] for start in starts] == [threads] * 2
    assert starts[1]["exact"] is True
    assert bits("run", 9) == unbroken_bits(config, 9)


@pytest.mark.process
def test_the_kernel_stays_the_one_the_run_started_with() -> None:
    usual, other = blas.set_threads(1)["blas_kernel"], "Nehalem"
    name = write(small(stop={"last_step": 5}, numerics={}))
    call("train", "--config", name, "--run-dir", "run", "-q", OPENBLAS_CORETYPE=other)
    if ledger("run", "start")[0]["numerics"]["blas_kernel"] == usual:
        pytest.skip("this BLAS has no second kernel to choose")
    call("resume", "run", "--last-step", 9, "--strict-numerics", "-q")
    assert [start["numerics"]["blas_kernel"] for start in ledger("run", "start")] == [other, other]


@pytest.mark.process
def test_different_numerics_are_reported_recorded_and_refused_if_strict(
    snapshot: SnapshotAssertion,
) -> None:
    config = small(stop={"last_step": 5})
    train(config, Path("run"))
    path = Path("run/checkpoints/step-00000005.h5")
    state = train(config, Path("same"))
    with codec.Reader(path) as reader:
        header = reader.header
    here = json.loads(header.numerics)
    elsewhere = json.dumps(here | {"blas_kernel": "Z80", "numpy": "1.0"})
    image = codec.encode(
        state,
        run=header.run,
        run_id=header.run_id or RUN_ID,
        config=header.config,
        numerics=elsewhere,
    )
    path.write_bytes(file_bytes(image))

    refusal = call("resume", "run", "--last-step", 9, "--strict-numerics", expect=3)
    differences = f"BLAS kernel Z80 -> {here['blas_kernel']}; NumPy 1.0 -> {np.__version__}"
    assert refusal.stderr.startswith(f"stepctl: this machine computes other bits: {differences}; ")
    assert saved("run")[-1] == path.name
    said = call("resume", "run", "--last-step", 9, "-q").stderr
    assert normalize(said, DIFFERENCES=differences) == snapshot
    start = ledger("run", "start")[-1]
    assert start["exact"] is False
    assert start["inexact_because"] == differences.split("; ")
    assert saved("run")[-1] == "step-00000009.h5"


@pytest.mark.process
def test_a_run_without_recorded_random_streams_resumes_but_is_not_exact(
    snapshot: SnapshotAssertion,
) -> None:
    config = small(stop={"last_step": 5})
    state = train(config, Path("run"))
    path = Path("run/checkpoints/step-00000005.h5")
    with codec.Reader(path) as reader:
        header = reader.header
    recorded = json.loads(header.numerics)
    assert recorded.pop("streams") == blas.STREAMS == 2
    image = codec.encode(
        state,
        run=header.run,
        run_id=header.run_id,
        config=header.config,
        numerics=json.dumps(recorded),
    )
    path.write_bytes(file_bytes(image))

    refusal = call("resume", "run", "--last-step", 9, "--strict-numerics", expect=3)
    assert refusal.stderr.startswith(
        "stepctl: this machine computes other bits: random streams 1 -> 2; "
    )
    assert saved("run")[-1] == path.name
    said = call("resume", "run", "--last-step", 9, "-q").stderr
    assert normalize(said) == snapshot
    start = ledger("run", "start")[-1]
    assert (start["exact"], start["numerics"]["streams"]) == (False, 2)
    assert call("resume", "run", "--last-step", 12, "--strict-numerics", "-q").stderr == ""
    assert ledger("run", "start")[-1]["exact"] is True


# --- how it looks


def on_a_terminal(*arguments: object, **variables: str) -> str:
    """Run `stepctl` with a terminal for its messages; return what it wrote there."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, *map(str, arguments)]
    written = b""
    variables |= {"TERM": "xterm-256color"}
    with (
        subprocess.Popen(command, env=environment(**variables), stderr=theirs) as child,
        killed_if_it_hangs(child),
    ):
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while part := os.read(ours, 1 << 16):
                written += part
    os.close(ours)
    assert child.returncode == 0, written
    return written.decode()


@pytest.mark.process
def test_a_terminal_gets_a_bar_and_no_color_is_heeded() -> None:
    name = write(small(stop={"last_step": 8}))
    call("train", "--config", name, "--run-dir", "run", "--last-step", 3)
    color = r"\x1b\[[0-9;]*m"
    bright = on_a_terminal("resume", "run", "--last-step", 6)
    assert re.search(color, bright)
    assert "6/6" in bright
    assert "done at global step" in bright
    plain = on_a_terminal("resume", "run", "--last-step", 8, NO_COLOR="1")
    assert "8/8" in plain
    assert not re.search(color, plain)


@pytest.mark.process
def test_anything_but_a_terminal_gets_plain_lines() -> None:
    name = write(small(stop={"last_step": 8}, log={"every": 4}))
    lines = call(
        "train", "--config", name, "--run-dir", "run", TERM="xterm-256color"
    ).stderr.splitlines()
    assert not [line for line in lines if "\x1b" in line or "\r" in line]
    shown = [line.split("  ")[0] for line in lines if line.startswith("step ")]
    assert shown == [
        "step 1/8",
        "step 4/8",
        "step 8/8",
        "step 8/8",
    ]
