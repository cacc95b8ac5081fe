"""Series: a row of a step is durable with its checkpoint, cut back on a resume, and never doubled."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.config.model import parse_config
from stepctl.errors import ConfigError, DataError
from stepctl.reports.verify import verify
from stepctl.rundir import series
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.series import RecordType, series_folder
from stepctl.runs.open import create_run
from stepctl.system.folder import Folder
from stepctl.writers import series as writer
from tests.support.run_files import events
from tests.support.stops import some_of

pytestmark = [pytest.mark.training, pytest.mark.usefixtures("in_tmp_path")]

N = 12


def walk(path: str, last: int = N, stop_in: int | None = None, every: int = 5) -> None:
    """Run a script with two series; with `stop_in` an error leaves that step halfway."""
    state = {"x": np.zeros(3)}
    with stepctl.loop(path, state, last_step=last, checkpoint_every=every, keep_last=None) as run:
        for step in run:
            state["x"] += run.rng("a").standard_normal(3)
            run.append("x", state["x"])
            if step % 2:
                run.append("odd", step)
            if step == stop_in:
                raise RuntimeError("the power is gone")


def files(path: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path, "series").iterdir()}


@pytest.mark.parametrize("stop_in", some_of(range(N), every=3))
@pytest.mark.parametrize("every", [1, 5])
def test_a_run_that_failed_in_any_step_ends_with_the_same_series(stop_in: int, every: int) -> None:
    walk("whole")
    with pytest.raises(RuntimeError):
        walk("broken", stop_in=stop_in, every=every)
    walk("broken", every=every)
    assert files("broken") == files("whole")
    assert verify("broken")[1] == []


def test_rows_have_the_step_that_they_lead_to() -> None:
    walk("run")
    steps, values = stepctl.load_series("run", "x", steps=True)
    assert steps.tolist() == list(range(1, N + 1))
    assert (values.shape, values.dtype) == ((N, 3), np.float64)
    np.testing.assert_array_equal(stepctl.load_series("run", "x"), values)
    steps, odd = stepctl.load_series("run", "odd", steps=True)
    assert (steps.tolist(), odd.tolist()) == ([2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11])


def test_numpy_reads_the_file_alone() -> None:
    walk("run")
    kind = json.loads(Path("run/series/x.json").read_text())
    record = [("step", "<i8"), ("value", kind["dtype"], tuple(kind["shape"]))]
    records = np.fromfile("run/series/x.bin", record)
    np.testing.assert_array_equal(records["value"], stepctl.load_series("run", "x"))


@pytest.mark.parametrize("dtype", sorted(series.DTYPES))
@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_every_dtype_and_shape_comes_back(dtype: str, shape: tuple[int, ...]) -> None:
    rows = [np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype) + i for i in range(3)]
    with stepctl.loop("run", {"n": 0}, last_step=3, checkpoint_every=None) as run:
        for step in run:
            run.append("s", np.array(rows[step], order="F"))
    found = stepctl.load_series("run", "s")
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (np.asarray(rows[0]).dtype, (3, *shape))
    np.testing.assert_array_equal(found, np.stack(rows))


def test_a_checkpoint_rewrites_nothing() -> None:
    walk("run", last=5)
    path = Path("run/series/x.bin")
    before = (path.stat().st_ino, path.read_bytes())
    walk("run", last=N)
    assert path.stat().st_ino == before[0]
    assert path.read_bytes().startswith(before[1])


def test_the_ledger_counts_the_rows_of_each_checkpoint() -> None:
    walk("run")
    counted = {event["step"]: event.get("series") for event in events(Path("run"), "checkpoint")}
    assert counted == {
        0: None,
        5: {"odd": 2, "x": 5},
        10: {"odd": 5, "x": 10},
        N: {"odd": 6, "x": N},
    }


def test_rows_are_durable_before_their_checkpoint_is_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []
    fsync = writer.fsync
    append = RunDirectory.append_ledger

    def recorded_fsync(descriptor: int) -> None:
        rows = os.fstat(descriptor).st_size // 32
        happened.append(f"{rows} rows durable")
        fsync(descriptor)

    def recorded_append(directory: RunDirectory, event: str, **facts: Any) -> None:
        if event == "checkpoint":
            happened.append(f"step {facts['step']} acknowledged")
        append(directory, event, **facts)

    monkeypatch.setattr(writer, "fsync", recorded_fsync)
    monkeypatch.setattr(RunDirectory, "append_ledger", recorded_append)
    with stepctl.loop("run", {"n": 0}, last_step=4, checkpoint_every=2) as run:
        for step in run:
            run.append("x", np.full(3, float(step)))
            run.save()
    for step in range(1, 5):
        acknowledged = happened.index(f"step {step} acknowledged")
        assert f"{step} rows durable" in happened[:acknowledged]


@pytest.mark.parametrize("extra", [1, 31, 32, 33])
def test_a_part_of_a_record_is_cut(extra: int) -> None:
    walk("run", last=8)
    expected = Path("run/series/x.bin").read_bytes()
    with Path("run/series/x.bin").open("ab") as file:
        file.write((9).to_bytes(8, "little") + bytes(extra - 8) if extra >= 8 else bytes(extra))
    walk("run", last=8)
    folder = series_folder(RunDirectory("run"))
    assert len(series.read(folder, "x", last=8)) == 8
    walk("run", last=9)
    assert Path("run/series/x.bin").read_bytes()[: len(expected)] == expected
    assert verify("run")[1] == []


def test_zeros_that_a_power_cut_left_are_no_rows_of_the_newest_checkpoint() -> None:
    """The cut came between the checkpoint and its line in the ledger."""
    walk("whole")
    walk("broken", last=10)
    ledger = Path("broken/ledger.jsonl")
    lines = ledger.read_text().splitlines(keepends=True)
    newest = max(i for i, line in enumerate(lines) if '"event": "checkpoint"' in line)
    ledger.write_text("".join(lines[:newest]))
    for name in ("x", "odd"):
        with open(f"broken/series/{name}.bin", "ab") as file:
            file.write(bytes(3 * 32))
    walk("broken")
    assert files("broken") == files("whole")
    assert verify("broken")[1] == []


def test_bisection_finds_the_rows_up_to_a_step(tmp_path: Path) -> None:
    kind = RecordType("int8", ())
    steps = [3, 4, 9, 20, 21]
    records = np.zeros(len(steps), kind.record)
    records["step"] = steps
    (tmp_path / "s.bin").write_bytes(records.tobytes())
    descriptor = os.open(tmp_path / "s.bin", os.O_RDONLY)
    try:
        for step in range(25):
            found = series.count(descriptor, kind.record.itemsize, step)
            assert found == sum(each <= step for each in steps)
    finally:
        os.close(descriptor)


def append(*rows: Any, name: Any = "s") -> None:
    with stepctl.loop("run", {"n": 0}, last_step=len(rows)) as run:
        for step in run:
            run.append(name, rows[step])


@pytest.mark.parametrize(
    "rows",
    [
        (np.zeros(2), np.zeros(3)),
        (np.zeros(2), np.zeros(2, np.float32)),
        (1.0, 1),
        ("text",),
        (None,),
    ],
    ids=["shape", "dtype", "int after float", "text", "None"],
)
def test_a_row_that_does_not_fit_is_refused(rows: Any, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        append(*rows)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", 3, "x" * 101])
def test_a_name_that_is_no_file_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^series .*: use letters, digits"):
        append(1.0, name=name)
    assert not Path("run/series").exists()


def append_twice() -> None:
    with stepctl.loop("run", {"n": 0}, last_step=2) as run:
        for _ in run:
            run.append("s", 1.0)
            run.append("s", 2.0)


def test_two_rows_of_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="'s' has a row already in this step"):
        append_twice()


@pytest.mark.parametrize("kind", ["array", "list", "list of arrays"])
def test_a_row_is_copied_when_it_is_appended(kind: str) -> None:
    numbers = np.zeros(2)
    row = {"array": numbers, "list": [0.0, 0.0], "list of arrays": [numbers[:1], numbers[1:]]}[kind]
    with stepctl.loop("run", {"n": 0}, last_step=2) as run:
        for _ in run:
            run.append("s", row)
            for number in range(2):
                row[number] += 1
    found = stepctl.load_series("run", "s")
    assert isinstance(found, np.ndarray)
    assert found.reshape(2, 2).tolist() == [[0, 0], [1, 1]]


def test_a_series_that_there_is_not_is_named(snapshot: SnapshotAssertion) -> None:
    walk("run")
    with pytest.raises(ConfigError) as caught:
        stepctl.load_series("run", "od")
    assert str(caught.value) == snapshot


@pytest.mark.parametrize("text", ["", "{}", '{"dtype": "object", "shape": []}', '{"dtype": "f8"}'])
def test_a_damaged_description_is_refused(text: str) -> None:
    walk("run")
    Path("run/series/x.json").write_text(text)
    with pytest.raises(DataError, match=r"series/x\.json: damaged"):
        stepctl.load_series("run", "x")
    assert [problem.file for problem in verify("run")[1]] == ["series/x.bin"]


def cut_rows(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[: -n * 32])


def swap_rows(path: Path, n: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[32:64] + data[:32] + data[64:])


@pytest.mark.parametrize("damage", [cut_rows, swap_rows])
def test_verify_finds_rows_that_are_lost_or_out_of_order(
    damage: Any, snapshot: SnapshotAssertion
) -> None:
    walk("run")
    damage(Path("run/series/x.bin"), 3)
    problems = verify("run")[1]
    assert [problem.code for problem in problems] == ["series"]
    assert problems[0].message == snapshot


def test_a_resume_reports_lost_rows(capsys: pytest.CaptureFixture[str]) -> None:
    walk("run")
    cut_rows(Path("run/series/x.bin"), 3)
    walk("run", last=N + 1)
    assert (
        "run: series 'x' lacks 3 rows up to step 12; restore series/x.bin"
        in capsys.readouterr().err
    )
    problems = verify("run")[1]
    assert [(problem.code, problem.file) for problem in problems] == [("series", "series/x.bin")]


@pytest.mark.parametrize("path", ["none", "run/checkpoints"])
def test_a_path_that_is_no_run_is_refused(path: str) -> None:
    walk("run")
    with pytest.raises(ConfigError, match="no run found"):
        stepctl.load_series(path, "x")


def test_steps_that_do_not_ascend_are_refused() -> None:
    walk("run")
    swap_rows(Path("run/series/x.bin"), 1)
    with pytest.raises(DataError, match="its steps do not ascend"):
        stepctl.load_series("run", "x")


def test_a_fork_has_rows_from_its_start_on_and_diff_compares_them() -> None:
    walk("run")
    fork = ["fork", "run", "--at", "5", "--run-dir", "child"]
    assert CliRunner().invoke(cli, fork).exit_code == 0
    walk("child")
    steps, _ = stepctl.load_series("child", "x", steps=True)
    assert steps.tolist() == list(range(6, N + 1))
    assert CliRunner().invoke(cli, ["diff", "run", "child"]).exit_code == 0
    path = Path("child/series/x.bin")
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # a bit of the value of the second row
    path.write_bytes(data)
    done = CliRunner().invoke(cli, ["diff", "run", "child"])
    assert done.exit_code == 1
    assert "series/x: 1 element differs, first at 3" in done.stdout


PROGRAM = """
import numpy as np
import stepctl


class Walk(stepctl.Program):
    def initial_state(self, rng):
        return {"x": np.zeros(3)}

    def step(self, state, step, rng):
        state["x"] += rng("a").standard_normal(3)
        rows = {"x": state["x"]}
        if step % 2:
            rows["odd"] = step
        return {"norm": state["x"] @ state["x"]}, rows
"""


def test_a_program_appends_the_same_rows_and_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("series_walk.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "series_walk", raising=False)
    document = {
        "program": {"name": "series_walk:Walk"},
        "stop": {"last_step": N},
        "checkpoint": {"every": 5, "keep_last": None},
    }
    with create_run(parse_config(yaml.Document(document)), RunDirectory("program")) as segment:
        segment.train()
    walk("script")
    assert files("program") == files("script")
    replay = ["verify", "program", "--replay", "0:12"]
    assert CliRunner().invoke(cli, replay).exit_code == 0
    path = Path("program/series/x.bin")
    data = bytearray(path.read_bytes())
    data[7 * 32 + 8] ^= 1
    path.write_bytes(data)
    done = CliRunner().invoke(cli, replay)
    assert done.exit_code == 1
    assert "/series/x: 1 element differs" in done.stdout


def test_a_step_that_returns_another_tuple_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("bad_walk.py").write_text(PROGRAM.replace("}, rows", "}, rows, 3"))
    monkeypatch.syspath_prepend(tmp_path)
    config = parse_config(
        yaml.Document(
            {
                "program": {"name": "bad_walk:Walk"},
                "stop": {"last_step": 1},
                "check_determinism": False,
            }
        )
    )
    with (
        pytest.raises(stepctl.errors.StepctlError, match="step returned a tuple of 3"),
        create_run(config, RunDirectory("program")) as segment,
    ):
        segment.train()


def test_steps_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "_BLOCK_BYTES", 100)  # four records of 24 bytes
    folder = Folder(tmp_path)
    kind = series.RecordType("float64", (2,))
    series.create(folder, "x", kind)
    assert series.read_steps(folder, "x").tolist() == []
    records = np.zeros(10, kind.record)
    records["step"] = range(1, 11)
    (tmp_path / "x.bin").write_bytes(records.tobytes() + b"half")
    assert series.read_steps(folder, "x").tolist() == list(range(1, 11))
