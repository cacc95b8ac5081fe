"""runs/README.md, the page of run directories and checkpoint files: it describes all that runs write."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import stepctl
from stepctl.cli.main import cli
from stepctl.hooks.base import Hook
from stepctl.rundir import ledger as ledgers
from stepctl.rundir.lock import Holder
from tests.support.mpi_jobs import job
from tests.support.run_files import rows
from tests.support.runs import make_config, resume, train

PAGE = (Path(__file__).parents[2] / "runs" / "README.md").read_text()
METRICS = r"(loss|accuracy|learning_rate|gradient_norm|parameter_norm|staleness)"
PLACEHOLDERS = {
    "<metric>": METRICS,
    "<step>": r"\d{8,}",
    "<n>": r"\d+",
    "<path>": r"[\w.-]+(/[\w.-]+)*",
}


def section(heading: str) -> str:
    """Return the text below a heading, up to the next one."""
    found = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    assert found is not None, heading
    return found[1]


def table(text: str) -> list[list[str]]:
    """Return the cells of the first table in a text, without its heading."""
    lines = re.search(r"(^\|.*\n)+", text, re.M)
    assert lines is not None
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[0].splitlines()[2:]]


def names(cell: str) -> list[str]:
    """Return the names in code spans."""
    return re.findall(r"`([^`]+)`", cell)


def is_described(name: str, patterns: list[str]) -> bool:
    for pattern in patterns:
        parts = re.split(r"(<\w+>)", pattern)
        regex = "".join(
            PLACEHOLDERS.get(part, r"[\w.-]+") if part.startswith("<") else re.escape(part)
            for part in parts
        )
        if re.fullmatch(regex, name):
            return True
    return False


class Counts(Hook):
    """A hook with an array of its own."""

    name = "counts"

    def __init__(self) -> None:
        self.steps = np.zeros(2, np.uint8)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with everything that one process writes: it was resumed, changed, taken back, forked and pruned."""
    folder = tmp_path_factory.mktemp("runs")
    config = make_config(
        model={"name": "mlp", "hidden": [8], "batch_norm": True},
        ema={"decay": 0.9},
        log={"every": 3, "norms": True, "means": True, "csv": True},
        evaluate={"every": 4, "ema": True},
        checkpoint={"every": 2, "keep_last": None},
        on_nonfinite="skip",
        stop={"last_step": 7},
    )
    path = folder / "run"
    train(config, path, (Counts(),))
    resume(path, last_step=9, hooks=(Counts(),), assignments=("checkpoint.every=4",))
    resume(path, last_step=9, hooks=(Counts(),), from_step=4)
    plain = folder / "plain"
    train(make_config(stop={"last_step": 4}, checkpoint={"every": 1}), plain)
    for arguments in (
        ("fork", plain, "--at", 2, "--run-dir", folder / "fork", "--set", "seed=5"),
        ("prune", plain, "--keep-last", 2),
    ):
        assert call(*arguments) == 0
    (plain / "checkpoints" / "step-00000003.h5").unlink()
    assert call("prune", plain, "--forget-missing") == 0
    (folder / "no-folder").touch()
    url = f"file://{folder}/no-folder/mirror"
    more = ("--num-steps", 1, "--set", "mirror.wait_at_stop=0")
    assert call("resume", plain, "--mirror", url, *more) == 0
    return path


def call(*arguments: object) -> int:
    return CliRunner().invoke(cli, list(map(str, arguments))).exit_code


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of all runs in a folder."""
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    return [event for run in runs for event in rows(run, "ledger.jsonl")]


def ledger_tables() -> dict[str, list[tuple[list[str], bool]]]:
    """Return event -> [(keys, whether they are always there)]."""
    parts = re.split(r"^`(\w+)`:", section("The ledger"), flags=re.M)
    return {
        event: [(names(row[0]), row[1].strip() == "always") for row in table(text)]
        for event, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def check_events(found: list[dict[str, Any]]) -> None:
    tables = ledger_tables()
    for event in found:
        described = {key for keys, _ in tables[event["event"]] for key in keys}
        required = {key for keys, always in tables[event["event"]] if always for key in keys}
        assert event.keys() - {"event", "time"} <= described, event["event"]
        assert required <= event.keys(), event["event"]


@pytest.mark.training
def test_every_key_of_the_ledger_is_described(run: Path) -> None:
    found = events(run.parent)
    assert {event["event"] for event in found} == set(ledger_tables())
    check_events(found)
    keys = defaultdict(set)
    for event in found:
        keys[event["event"]] |= event.keys()
    assert {"changes", "config", "exact", "run_id", "set_aside"} <= keys["start"]
    assert {"parent", "child", "changes"} <= keys["fork"]
    assert "missing" in keys["prune"]
    assert "error" in keys["mirror"]


def test_every_typed_key_of_the_ledger_is_described() -> None:
    tables = ledger_tables()
    for kind in get_args(ledgers.LedgerEvent):
        (event,) = get_args(get_type_hints(kind)["event"])
        described = {key for keys, _ in tables[event] for key in keys}
        assert kind.__annotations__.keys() - {"event", "time"} <= described


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_keys_of_several_processes_are_described(mode: str, tmp_path: Path) -> None:
    config = make_config(
        data={"name": "digits", "batch_size": 48, "shards": 2, "validation_fraction": 0.5},
        distributed={"mode": mode},
        stop={"last_step": 4},
    )
    (tmp_path / "config.yaml").write_text(config.text)
    done = job(2, "train", "--config", "config.yaml", "--run-dir", "run", "-q", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    check_events(events(tmp_path))
    check_rows(rows(tmp_path / "run", "metrics.jsonl"))


def check_rows(found: list[dict[str, Any]]) -> None:
    described = [(names(row[0]), row[1].strip()) for row in table(section("Metrics rows"))]
    for row in found:
        patterns = [
            name for keys, kind in described if kind in ("all", row["kind"]) for name in keys
        ]
        for key in row:
            assert is_described(key, patterns), key


@pytest.mark.training
def test_every_key_of_the_rows_is_described(run: Path) -> None:
    found = rows(run, "metrics.jsonl")
    check_rows(found)
    keys = set().union(*found)
    assert {"extra", "epoch", "mean_loss", "ema_loss", "parameter_norm"} <= keys


@pytest.mark.training
def test_every_file_of_a_run_is_described(run: Path) -> None:
    patterns = [name for row in table(section("The run directory")) for name in names(row[0])]
    patterns.append("checkpoints/step-<step>.h5.aside-<n>")
    found = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    assert len(found) > 8
    for path in found:
        assert is_described(str(path), patterns), path


def test_every_key_of_the_lock_is_described() -> None:
    (content,) = (
        row[1] for row in table(section("The run directory")) if names(row[0]) == ["lock"]
    )
    (described,) = names(content)
    assert re.findall(r"\w+", described) == list(Holder._fields)


@pytest.mark.training
def test_every_object_of_a_checkpoint_is_described(run: Path, tmp_path: Path) -> None:
    state = {"x": np.zeros(2), "n": 1}
    with stepctl.loop(tmp_path / "script", state, last_step=1) as script:
        for _ in script:
            state["n"] += 1
    attributes = {
        name: row[1].strip() for row in table(section("Root attributes")) for name in names(row[0])
    }
    datasets = [(names(row[0]), row[1].strip()) for row in table(section("Datasets"))]
    found: dict[str, Any] = {}
    for path in (
        run / "checkpoints" / "step-00000009.h5",
        tmp_path / "script" / "checkpoints" / "step-00000001.h5",
    ):
        with h5py.File(path) as file:
            assert set(file.attrs) == set(attributes)
            for name, kind in attributes.items():
                is_number = isinstance(file.attrs[name], np.int64)
                assert kind == ("int64" if is_number else "string")
            found |= dataset_types(file)
    for path, dtype in found.items():
        kind = "string" if dtype.kind == "S" else str(dtype)
        fitting = [types for patterns, types in datasets if is_described(path, patterns)]
        assert any(kind in types.split(", ") for types in fitting), path
    folders = {path.split("/")[1] for path in found}
    assert folders == {names(row[0])[0].split("/")[1] for row in table(section("Datasets"))}


def dataset_types(file: h5py.File) -> dict[str, Any]:
    """Return the dtype of each dataset, by its path."""
    found: dict[str, Any] = {}

    def visit(path: str, one: object) -> None:
        if isinstance(one, h5py.Dataset):
            found[f"/{path}"] = one.dtype

    file.visititems(visit)
    return found


@pytest.mark.training
def test_the_bytes_before_the_objects_are_as_described(run: Path) -> None:
    data = (run / "checkpoints" / "step-00000009.h5").read_bytes()
    first_line = re.search(r"^stepctl-checkpoint \d+$", section("User block"), re.M)
    assert first_line is not None
    assert data.startswith(first_line[0].encode() + b"\n")
    described = {row[0].strip(): row[1] for row in table(section("HDF5 layout"))}
    assert data[512:520] == bytes.fromhex(names(described["512..519"])[0])
    assert data[520:524] == bytes.fromhex(names(described["520..523"])[0])
    assert int.from_bytes(data[524:532], "little") == 512
    assert data[532:540] == b"\xff" * 8
    assert int.from_bytes(data[540:548], "little") == len(data)
