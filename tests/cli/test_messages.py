"""Error messages of the command line: exit code, one line on stderr, and no files left behind."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.errors import Exit
from tests.support.messages import normalize

X = np.arange(20.0).reshape(10, 2)
Y = np.arange(10) % 3
CONFIG: dict[str, Any] = {
    "data": {"name": "arrays", "path": "a.npz", "batch_size": 2},
    "model": {"name": "linear"},
    "task": {"name": "classification"},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "stop": {"last_step": 3},
    "checkpoint": {"every": 1},
    "numerics": {"threads": 1},
}


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    stdout: str
    stderr: str


def stepctl(*arguments: object) -> Answer:
    """Run the command line in this process."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(
        result.exception
    )
    assert "Traceback" not in result.output
    return Answer(result.exit_code, result.stdout, result.stderr)


def message(case: str, answer: Answer, folder: Path) -> str:
    """Return the stderr of an answer without what differs from run to run."""
    patterns = (LIBRARY_WORDS[case],) if case in LIBRARY_WORDS else ()
    return normalize(answer.stderr, patterns, HERE=folder)


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file, and None for every folder, below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def write_config(**sections: Any) -> None:
    full = {**CONFIG, **sections}
    Path("c.yaml").write_text(
        yaml.dumps({key: value for key, value in full.items() if value is not None})
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with good data and a good config."""
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x=X, y=Y)
    write_config()
    return tmp_path


# train: what stands in the files, the sections that differ, the line


def npz(**arrays: Any) -> Callable[[], Any]:
    return lambda: np.savez("a.npz", **arrays)


def file(name: str, content: bytes) -> Callable[[], Any]:
    return lambda: Path(name).write_bytes(content)


def csv(**options: Any) -> dict[str, Any]:
    return {"data": {"name": "csv", "path": "a.csv", "batch_size": 2, **options}}


def idx(**options: Any) -> dict[str, Any]:
    return {
        "data": {"name": "idx", "images": "images", "labels": "labels", "batch_size": 2, **options}
    }


def hdf5(**arrays: Any) -> Callable[[], Any]:
    def write() -> None:
        with h5py.File("a.h5", "w") as target:
            for name, array in arrays.items():
                target[name] = array

    return write


def data(**options: Any) -> dict[str, Any]:
    return {"data": {**CONFIG["data"], **options}}


def nothing() -> None:
    """Leave the good data as they are."""


IMAGES = b"\0\0\x08\x03\0\0\0\x0a\0\0\0\x01\0\0\0\x02" + bytes(range(20))
LABELS = b"\0\0\x08\x01\0\0\0\x0a" + bytes(Y.tolist())
HDF5 = {"data": {"name": "hdf5", "path": "a.h5", "batch_size": 2}}
ROWS = "".join(f"{a},{b},{label}\n" for (a, b), label in zip(X, Y, strict=True)).encode()
GZIPPED = gzip.compress(ROWS)


def replaced(array: Any, at: Any, value: Any) -> Any:
    array = array.copy()
    array[at] = value
    return array


def both_idx(images: bytes, labels: bytes) -> Callable[[], Any]:
    return lambda: (Path("images").write_bytes(images), Path("labels").write_bytes(labels))


TRAIN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "no data file": (nothing, data(path="nowhere.npz")),
    "a folder for a data file": (nothing, data(path=".")),
    "x without features": (npz(x=X[:, 0], y=Y), {}),
    "x of no columns": (npz(x=X[:, :0], y=Y), {}),
    "y of the wrong shape": (npz(x=X, y=X), {}),
    "rows that do not match": (npz(x=X, y=Y[:7]), {}),
    "no rows": (npz(x=X[:0], y=Y[:0]), {}),
    "text for numbers": (npz(x=X.astype(str), y=Y), {}),
    "too few classes": (nothing, data(n_classes=2)),
    "a label that is not whole": (npz(x=X, y=replaced(Y.astype(float), 4, 1.5)), {}),
    "a label that is not a number": (npz(x=X, y=replaced(Y.astype(float), 4, np.nan)), {}),
    "a negative label": (npz(x=X, y=replaced(Y, 7, -1)), {}),
    "labels all negative": (npz(x=X, y=Y - 3), {}),
    "an enormous label": (npz(x=X, y=replaced(Y.astype(float), 3, 1e20)), {}),
    "a column of ids for labels": (npz(x=X, y=Y + 10**9), {}),
    "a value that is not finite": (npz(x=replaced(X, (6, 1), np.inf), y=Y), {}),
    "a value too large for float32": (npz(x=replaced(X, (6, 1), 1e300), y=Y), {}),
    "a target that is not finite": (
        npz(x=X, y=replaced(Y.astype(float), 8, np.nan)),
        {"task": {"name": "regression"}},
    ),
    "targets of no columns": (npz(x=X, y=X[:, :0]), {"task": {"name": "regression"}}),
    "classes in a regression": (nothing, {**data(n_classes=3), "task": {"name": "regression"}}),
    "binary with three classes": (nothing, {"task": {"name": "binary_classification"}}),
    "npz without y": (npz(x=X, labels=Y), {}),
    "npz of objects": (npz(x=X, y=np.array([None] * 10, object)), {}),
    "npz that is text": (file("a.npz", b"x,y\n1,2\n"), {}),
    "npz that is empty": (file("a.npz", b""), {}),
    "npy for npz": (file("a.npz", b"\x93NUMPY\1\0" + bytes(99)), {}),
    "npz cut short": (lambda: Path("a.npz").write_bytes(Path("a.npz").read_bytes()[:300]), {}),
    "npz with a flipped byte": (
        lambda: Path("a.npz").write_bytes(
            Path("a.npz").read_bytes()[:200] + b"?" + Path("a.npz").read_bytes()[201:]
        ),
        {},
    ),
    "csv with names, not said": (file("a.csv", b"a,b,label\n" + ROWS), csv(header=False)),
    "csv, no such column name": (
        file("a.csv", b"a,b,label\n" + ROWS),
        csv(header=True, target="lable"),
    ),
    "csv, no such column number": (file("a.csv", ROWS), csv(target=3)),
    "csv, a name without a header": (file("a.csv", ROWS), csv(target="label")),
    "csv with a short row": (file("a.csv", ROWS + b"1,2\n"), csv()),
    "csv with a word": (file("a.csv", ROWS + b"1,two,2\n"), csv()),
    "csv of nothing": (file("a.csv", b""), csv()),
    "csv of a header alone": (file("a.csv", b"a,b,c\n"), csv(header=True)),
    "csv of one column": (file("a.csv", b"1\n2\n"), csv()),
    "csv, gzip damaged": (file("a.csv", GZIPPED[:20] + b"????" + GZIPPED[24:]), csv()),
    "idx with a wrong magic number": (both_idx(b"\x89PNG" + IMAGES[4:], LABELS), idx()),
    "idx cut short": (both_idx(IMAGES[:-4], LABELS), idx()),
    "idx cut short in its header": (both_idx(IMAGES, LABELS[:6]), idx()),
    "idx, images for labels": (both_idx(IMAGES, IMAGES), idx()),
    "idx, gzip cut short": (both_idx(gzip.compress(IMAGES)[:-9], LABELS), idx()),
    "idx, one validation file": (both_idx(IMAGES, LABELS), idx(validation_images="images")),
    "not hdf5": (file("a.h5", b"PK\3\4" + bytes(99)), HDF5),
    "hdf5, no such dataset": (hdf5(images=X, y=Y), HDF5),
    "hdf5 of text": (hdf5(x=X, y=["a"] * 10), HDF5),
    "hdf5, a value that is not finite": (hdf5(x=replaced(X, (5, 0), np.nan), y=Y), HDF5),
    "hdf5, a value too large for float32": (hdf5(x=replaced(X, (5, 0), 1e300), y=Y), HDF5),
    "hdf5, a value too large once scaled": (
        hdf5(x=replaced(X, (5, 0), 1e30), y=Y),
        {"data": {**HDF5["data"], "scale": 1e30}},
    ),
    "hdf5, a label that is not whole": (hdf5(x=X, y=replaced(Y.astype(float), 9, 0.5)), HDF5),
    "nothing left to train on": (nothing, data(validation_fraction=0.97)),
    "nothing left to validate": (nothing, data(validation_fraction=0.01)),
    "an evaluation without validation rows": (nothing, {"evaluate": {"every": 2}}),
    "validation rows twice": (nothing, data(validation_fraction=0.5, validation_path="a.npz")),
    "validation rows of another shape": (
        lambda: np.savez("b.npz", x=X[:, :1], y=Y),
        data(validation_path="b.npz"),
    ),
    "a validation label that training has not": (
        lambda: np.savez("b.npz", x=X, y=Y + 1),
        data(validation_path="b.npz", n_classes=3),
    ),
    "an end before the beginning": (nothing, {"initial_step": 4}),
    "two ends": (nothing, {"stop": {"last_step": 3, "num_steps": 3}}),
    "no end": (nothing, {"stop": {}}),
    "no stop section": (nothing, {"stop": None}),
    "a cadence of 0": (nothing, {"checkpoint": {"every": 0}}),
    "a cadence that never comes": (nothing, {"log": {"every": 5, "offset": 5}}),
    "a component that there is not": (nothing, {"model": {"name": "liner"}}),
    "a key that there is not": (nothing, {"modle": {"name": "linear"}}),
    "nesterov without momentum": (
        nothing,
        {"optimizer": {"name": "sgd", "learning_rate": 0.1, "nesterov": True}},
    ),
    "shards that do not divide": (nothing, data(batch_size=4, shards=3)),
    "a batch of more than a hundred epochs": (nothing, data(batch_size=1001)),
    "a kernel that this CPU has not": (
        nothing,
        {"numerics": {"threads": 1, "blas_kernel": "Nonesuch"}},
    ),
}
# what a library or this machine words, by case
LIBRARY_WORDS = {
    "csv, gzip damaged": r"(?<=decompressing data: ).*",
    "a kernel that this CPU has not": r"(?<=loaded with )\w+",
    "data for a config": r"(?<=not UTF-8 text: ).*",
    "an option that a terminal would obey": r"(?<=No such option).*",
    "no such option": r"(?<=No such option).*",
    "no such command": r"(?<=No such command 'tarin'\.).*",
    "a number without end": r"(?<='999).*",
}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses_before_it_begins(
    case: str, folder: Path, snapshot: SnapshotAssertion
) -> None:
    prepare, sections = TRAIN[case]
    write_config(**sections)
    prepare()
    before = everything(folder)
    answer = stepctl("train", "--config", "c.yaml")
    assert everything(folder) == before
    assert stepctl("train", "--config", "c.yaml", "--run-dir", "new/run") == answer
    assert everything(folder) == before
    assert (answer.code, answer.stdout) == (Exit.USAGE, "")
    assert answer.stderr.startswith("stepctl: ")
    assert answer.stderr.count("\n") == 1
    assert message(case, answer, folder) == snapshot


# train and resume: what the command line itself asks for

MOST = str(2**62 - 1)  # steps
USAGE: dict[str, list[str]] = {
    "no config file": ["train", "--config", "nowhere.yaml"],
    "a folder for a config": ["train", "--config", "."],
    "data for a config": ["train", "--config", "a.npz"],
    "no config at all": ["train"],
    "both targets": ["train", "--config", "c.yaml", "--num-steps", "3", "--last-step", "4"],
    "a target below 0": ["train", "--config", "c.yaml", "--num-steps", "-1"],
    "a target that is no number": ["train", "--config", "c.yaml", "--last-step", "1e3"],
    "a setting without a value": ["train", "--config", "c.yaml", "--set", "seed"],
    "a setting of the wrong type": ["train", "--config", "c.yaml", "--set", "seed=1.5"],
    "a setting that there is not": ["train", "--config", "c.yaml", "--set", "data.batchsize=3"],
    "a run directory that is a file": ["train", "--config", "c.yaml", "--run-dir", "a.npz"],
    "a run directory below a file": ["train", "--config", "c.yaml", "--run-dir", "a.npz/run"],
    "somebody's folder": ["train", "--config", "c.yaml", "--run-dir", "."],
    "somebody's folder, dry": ["train", "--config", "c.yaml", "--run-dir", ".", "--dry-run"],
    "resume of nothing": ["resume", "nowhere"],
    "resume of somebody's folder": ["resume", "."],
    "resume of a file": ["resume", "a.npz"],
    "a config without a name": ["train", "--config", ""],
    "a run directory without a name": ["train", "--config", "c.yaml", "--run-dir", ""],
    "a run without a name": ["resume", ""],
    "a name too long for a file": ["train", "--config", "c.yaml", "--run-dir", "a" * 300],
    "a run whose name is too long": ["resume", "a" * 300],
    "no name of a file": ["resume", "a\0b"],
    "a name that a terminal would obey": ["train", "--config", "a\nb\x1b[31m\u202e"],
    "an option that a terminal would obey": ["train", "--a\x1b[31m"],
    "a pipe for a config": ["train", "--config", "/dev/null"],
    "a number of other digits": ["train", "--config", "c.yaml", "--num-steps", "\u0663"],
    "a number with a gap": ["resume", "run", "--from-step", "1_0"],
    "a number without end": ["resume", "run", "--num-steps", "9" * 30_000],
    "two configs": ["train", "c.yaml", "--config", "c.yaml"],
    "a target and another setting of it": [
        "train",
        "--config",
        "c.yaml",
        "--num-steps",
        "1",
        "--set",
        "stop.last_step=5",
    ],
    "more steps than can be counted": [
        "train",
        "--config",
        "c.yaml",
        "--num-steps",
        MOST,
        "--set",
        f"initial_step={MOST}",
    ],
    "no such command": ["tarin"],
    "no such option": ["train", "--confg", "c.yaml"],
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case: str, folder: Path, snapshot: SnapshotAssertion) -> None:
    before = everything(folder)
    answer = stepctl(*USAGE[case])
    assert (answer.code, answer.stdout) == (Exit.USAGE, "")
    last = answer.stderr.splitlines()[-1]
    assert last == answer.stderr.rstrip("\n") or answer.stderr.startswith("Usage: stepctl ")
    assert answer.stderr.replace("\n", "").isprintable()
    assert len(last) < 1100
    assert everything(folder) == before
    assert message(case, answer, folder).splitlines()[-1] == snapshot


OWN = """
from dataclasses import dataclass
from stepctl.models.base import Model
from stepctl.optimizers.schedules import Schedule
from stepctl.programs.supervised import Classification

class Leaves(Model):
    def __init__(self, *, input_shape, n_outputs):
        raise SystemExit(0)
    def initialize(self, params, rng): ...
    def forward(self, params, x, workspace): ...
    def parameter_shapes(self):
        raise SystemExit(0)

class LeavesLater(Leaves):
    def __init__(self, *, input_shape, n_outputs): ...

def odd(*, input_shape):
    raise ValueError("a\\nb\\x1b[31m")

class NoTargets(Classification):
    targets = "words"

@dataclass(frozen=True, kw_only=True)
class Word(Schedule):
    def after_warmup(self, step):
        return "fast"

@dataclass(frozen=True, kw_only=True)
class Ends(Schedule):
    def after_warmup(self, step):
        raise SystemExit(0)

@dataclass(frozen=True, kw_only=True)
class Endless(Schedule):
    def after_warmup(self, step):
        return float("inf")
"""
RATE = "optimizer.learning_rate={name: 'own_mistakes:%s'}"
MISTAKES: dict[str, tuple[str, int]] = {
    "a model that ends the program": ("model={name: 'own_mistakes:Leaves'}", Exit.USAGE),
    "a model that ends it later": ("model={name: 'own_mistakes:LeavesLater'}", Exit.NEGATIVE),
    "an error of two lines": ("model={name: 'own_mistakes:odd'}", Exit.USAGE),
    "a task without targets": ("task={name: 'own_mistakes:NoTargets'}", Exit.USAGE),
    "a rate that is a word": (RATE % "Word", Exit.USAGE),
    "a rate that is not finite": (RATE % "Endless", Exit.USAGE),
    "a rate that ends the program": (RATE % "Ends", Exit.USAGE),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_an_error_in_a_user_s_module(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    assignment, code = MISTAKES[case]
    (folder / "own_mistakes.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_mistakes", raising=False)
    before = everything(folder)
    answer = stepctl("train", "--config", "c.yaml", "--set", assignment)
    assert (answer.code, answer.stdout) == (code, "")
    assert everything(folder) == before
    assert normalize(answer.stderr) == snapshot


def test_every_problem_of_a_config_has_its_line(folder: Path, snapshot: SnapshotAssertion) -> None:
    Path("c.yaml").write_text("seed: 1\nseed: 2\ndata: &a {name: digits}\nmodel: *a\n")
    answer = stepctl("train", "--config", "c.yaml")
    places = [
        line.partition(": ")[0] for line in answer.stderr.removeprefix("stepctl: ").splitlines()
    ]
    assert places == ["c.yaml:2:1", "c.yaml:3:7", "c.yaml:4:8"]
    assert normalize(answer.stderr) == snapshot


def test_a_user_s_own_config_is_not_a_run_s(folder: Path, snapshot: SnapshotAssertion) -> None:
    Path("mine").mkdir()
    shutil.move("c.yaml", "mine/config.yaml")
    before = everything(folder)
    answer = stepctl("train", "--config", "mine/config.yaml", "--run-dir", "mine")
    assert (answer.code, answer.stdout) == (Exit.USAGE, "")
    assert everything(folder) == before
    assert normalize(answer.stderr) == snapshot


# A run that is there


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run to step 3, with every checkpoint kept; copied for each test."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "a.npz", x=X, y=Y)
    config = {**CONFIG, "data": {**CONFIG["data"], "path": str(folder / "a.npz")}}
    (folder / "c.yaml").write_text(
        yaml.dumps({**config, "checkpoint": {"every": 1, "keep_last": None}})
    )
    answer = stepctl("train", "--config", folder / "c.yaml", "--run-dir", folder / "run", "-q")
    assert answer == (Exit.DONE, "", "")
    return folder


@pytest.fixture
def there(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with that run in it, in "run"."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


THERE: dict[str, tuple[list[str], int]] = {
    "train again": (["train", "--config", "c.yaml", "--run-dir", "run"], Exit.USAGE),
    "a locked key": (["resume", "run", "--set", "seed=5", "--num-steps", "1"], Exit.USAGE),
    "a locked key by another config": (
        ["train", "--config", "other.yaml", "--run-dir", "run", "--or-resume"],
        Exit.USAGE,
    ),
    "another locked key allowed": (
        ["resume", "run", "--set", "optimizer.learning_rate=1", "--allow-change", "seed"],
        Exit.USAGE,
    ),
    "a key to allow that there is not": (
        ["resume", "run", "--allow-change", "nonsense"],
        Exit.USAGE,
    ),
    "a setting of the wrong type": (["resume", "run", "--set", "log.every=0"], Exit.USAGE),
    "a model that does not fit": (
        ["resume", "run", "--set", "model={name: mlp, hidden: [4]}", "--allow-change", "model"],
        Exit.NO_CHECKPOINT,
    ),
    "a step that there is not": (["resume", "run", "--from-step", "7"], Exit.NO_CHECKPOINT),
    "both targets": (["resume", "run", "--num-steps", "1", "--last-step", "9"], Exit.USAGE),
    "inspect of nothing": (["inspect", "nowhere"], Exit.USAGE),
    "inspect of another file": (["inspect", "c.yaml"], Exit.NO_CHECKPOINT),
    "inspect of another folder": (["inspect", "."], Exit.NO_CHECKPOINT),
    "a config that there is not": (["config", "check", "nowhere.yaml"], Exit.USAGE),
}


@pytest.mark.process
@pytest.mark.parametrize("case", THERE)
def test_beside_a_run(case: str, there: Path, snapshot: SnapshotAssertion) -> None:
    arguments, code = THERE[case]
    text = Path("c.yaml").read_text().replace("batch_size: 2", "batch_size: 4")
    Path("other.yaml").write_text(text)
    before = everything(there)
    answer = stepctl(*arguments)
    assert (answer.code, answer.stdout) == (code, "")
    assert everything(there) | {"run/lock": b""} == before | {"run/lock": b""}
    assert normalize(answer.stderr) == snapshot


def test_a_locked_key_may_be_allowed(there: Path) -> None:
    options = [
        "--set",
        "optimizer.learning_rate=0.5",
        "--allow-change",
        "optimizer.learning_rate",
        "-q",
    ]
    assert stepctl("resume", "run", "--num-steps", "1", *options) == (Exit.DONE, "", "")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows if row["step"] in (1, 4)] == [0.1, 0.5]
    starts = [
        json.loads(line)
        for line in Path("run/ledger.jsonl").read_text().splitlines()
        if '"start"' in line
    ]
    assert starts[-1]["changes"] == [
        {"key": "optimizer.learning_rate.value", "old": 0.1, "new": 0.5}
    ]


def test_a_finished_run_says_so(there: Path, snapshot: SnapshotAssertion) -> None:
    before = everything(there)
    answer = stepctl("resume", "run")
    assert (answer.code, answer.stdout) == (Exit.DONE, "")
    assert normalize(answer.stderr) == snapshot
    assert stepctl("train", "--config", "c.yaml", "--run-dir", "run", "--or-resume") == answer
    assert everything(there) | {"run/lock": b""} == before | {"run/lock": b""}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.process
def test_a_damaged_checkpoint_is_named_and_passed_over(
    there: Path, snapshot: SnapshotAssertion
) -> None:
    damage(Path("run/checkpoints/step-00000003.h5"))
    answer = stepctl("inspect", "run", "--step")
    assert (answer.code, answer.stdout) == (Exit.DONE, "2\n")
    assert normalize(answer.stderr) == snapshot
    assert stepctl("resume", "run", "-q") == (Exit.DONE, "", answer.stderr)


@pytest.mark.process
def test_no_good_checkpoint_is_left(there: Path, snapshot: SnapshotAssertion) -> None:
    for path in Path("run/checkpoints").iterdir():
        damage(path) if path.name < "step-00000002" else path.unlink()
    before = everything(there)
    answer = stepctl("resume", "run")
    assert (answer.code, answer.stdout) == (Exit.NO_CHECKPOINT, "")
    assert normalize(answer.stderr) == snapshot
    assert stepctl("inspect", "run") == answer
    assert everything(there) | {"run/lock": b""} == before | {"run/lock": b""}


@pytest.mark.process
def test_a_lost_config_is_in_the_checkpoints(there: Path, snapshot: SnapshotAssertion) -> None:
    Path("run/config.yaml").unlink()
    answer = stepctl("resume", "run", "--num-steps", "1")
    assert (answer.code, answer.stdout) == (Exit.USAGE, "")
    assert normalize(answer.stderr) == snapshot
    assert "\nconfig\n  seed: 0\n" in stepctl("inspect", "run").stdout


def test_moved_data_are_noted_and_changed_data_are_named(
    there: Path, trained: Path, snapshot: SnapshotAssertion
) -> None:
    def message() -> str:
        answer = stepctl("resume", "run", "--num-steps", "1")
        assert (answer.code, answer.stdout) == (Exit.USAGE, "")
        return normalize(answer.stderr, HERE=there, TRAINED=trained)

    moved = ["--set", f"data.path={there}/a.npz"]
    answer = stepctl("resume", "run", "--num-steps", "1", "-q", *moved)
    assert (answer.code, answer.stdout) == (Exit.DONE, "")
    assert normalize(answer.stderr, HERE=there, TRAINED=trained) == snapshot(name="moved")
    np.savez("a.npz", x=X + 1, y=Y)
    before = everything(there)
    assert message() == snapshot(name="changed")
    Path("a.npz").unlink()
    assert message() == snapshot(name="missing")
    del before["a.npz"]
    assert everything(there) | {"run/lock": b""} == before | {"run/lock": b""}


@pytest.fixture
def held(there: Path) -> Iterator[Path]:
    """The run, held as another process on another machine would hold it."""
    Path("run/lock").write_text(json.dumps({"host": "node7", "boot_id": "?", "pid": 4321}))
    descriptor = os.open("run/lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield there
    os.close(descriptor)


@pytest.mark.parametrize(
    "arguments",
    [
        ["resume", "run", "--num-steps", "5"],
        ["resume", "run", "--from-step", "1"],
        ["train", "--config", "c.yaml", "--run-dir", "run", "--or-resume"],
    ],
    ids=" ".join,
)
def test_a_run_in_use_is_left_alone(
    arguments: list[str], held: Path, snapshot: SnapshotAssertion
) -> None:
    before = everything(held)
    answer = stepctl(*arguments)
    assert (answer.code, answer.stdout) == (Exit.IN_USE, "")
    assert everything(held) == before
    assert normalize(answer.stderr) == snapshot


@pytest.mark.process
def test_a_run_in_use_may_be_looked_at(held: Path) -> None:
    assert stepctl("inspect", "run", "--step") == (Exit.DONE, "3\n", "")


# The process itself: its exit code and its streams


def test_the_exit_codes_are_a_promise() -> None:
    promised = {
        "DONE": 0,
        "NEGATIVE": 1,
        "USAGE": 2,
        "NO_CHECKPOINT": 3,
        "IN_USE": 4,
        "STOPPED": 75,
    }
    promised["INTERRUPTED"] = 130
    assert {code.name: code.value for code in Exit} == promised


def process(*arguments: str) -> Answer:
    command = [sys.executable, "-m", "stepctl.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.mark.process
def test_the_process_gives_the_same_answers(held: Path) -> None:
    write_config(**data(path="nowhere.npz"))
    for code, *arguments in (
        (Exit.USAGE, "train", "--config", "c.yaml", "--run-dir", "new"),
        (Exit.IN_USE, "resume", "run"),
        (Exit.NO_CHECKPOINT, "inspect", "c.yaml"),
    ):
        answer = process(*arguments)
        assert answer == stepctl(*arguments)
        assert answer.code == code
    assert not Path("new").exists()


@pytest.mark.process
def test_a_traceback_is_for_the_asking(folder: Path) -> None:
    answer = process("--debug", "train", "--config", "nowhere.yaml")
    assert (answer.code, answer.stdout) == (1, "")
    assert answer.stderr.startswith("Traceback")
    assert "stepctl.errors.ConfigError: nowhere.yaml: cannot be read" in answer.stderr


def test_an_unexpected_error_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("stepctl.runs.open.create_run", fail)
    code, out, text = stepctl("train", "--config", "c.yaml")
    assert (code, out) == (Exit.NEGATIVE, "")
    where = rf"\({re.escape(__file__)}:\d+\)"
    assert re.fullmatch(
        rf"stepctl: unexpected KeyError: 'a\\nb' {where}; for the traceback: stepctl --debug COMMAND ...\n",
        text,
    )


def test_a_system_error_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "a\nb")

    monkeypatch.setattr("stepctl.runs.open.create_run", fail)
    where = f"{__file__}:{fail.__code__.co_firstlineno + 1}"
    line = f"stepctl: a\\nb: Input/output error ({where}); fix that and run the command again\n"
    assert stepctl("train", "--config", "c.yaml") == (Exit.NEGATIVE, "", line)


@pytest.mark.process
def test_a_ctrl_c_while_loading_is_silent(folder: Path) -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from stepctl.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (Exit.INTERRUPTED, "", "")
