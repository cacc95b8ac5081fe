"""What the command line answers to a mistake: the exit code, one clear line on stderr, and nothing left behind."""

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

from stepctl import run, yamlio
from stepctl.cli.main import cli
from stepctl.errors import Exit

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
NO_NPZ = "cannot be read as a NumPy archive (.npz): it is not a zip archive; save x and y together with np.savez"
EITHER = "give either last_step (absolute) or num_steps (from the segment's start)"
SECTIONS = "seed, dtype, initial_step, data, model, task, optimizer, ema, stop, log, evaluate, samples, checkpoint, "
SECTIONS += "on_nonfinite, check_determinism, numerics, distributed"


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    stdout: str
    stderr: str


def stepctl(*arguments: object) -> Answer:
    """Run the command line in this process."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return Answer(result.exit_code, result.stdout, result.stderr)


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file, and None for every folder, below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def write_config(**sections: Any) -> None:
    full = {**CONFIG, **sections}
    Path("c.yaml").write_text(yamlio.dumps({key: value for key, value in full.items() if value is not None}))


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
    return {"data": {"name": "idx", "images": "images", "labels": "labels", "batch_size": 2, **options}}


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


TRAIN: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no data file": (
        nothing,
        data(path="nowhere.npz"),
        "HERE/nowhere.npz: no such file; check the path in the config's data section",
    ),
    "a folder for a data file": (
        nothing,
        data(path="."),
        "HERE: cannot be read as a NumPy archive (.npz): Is a directory",
    ),
    "x without features": (npz(x=X[:, 0], y=Y), {}, "HERE/a.npz: x has shape (10,); (rows, features, ...) is needed"),
    "x of no columns": (npz(x=X[:, :0], y=Y), {}, "HERE/a.npz: x has shape (10, 0); at least one feature is needed"),
    "y of the wrong shape": (
        npz(x=X, y=X),
        {},
        "HERE/a.npz: y has shape (10, 2); a classification needs one label a row",
    ),
    "rows that do not match": (npz(x=X, y=Y[:7]), {}, "HERE/a.npz: x has 10 rows, but y has 7; they must be equal"),
    "no rows": (npz(x=X[:0], y=Y[:0]), {}, "HERE/a.npz: holds no rows; a data set needs at least one"),
    "text for numbers": (npz(x=X.astype(str), y=Y), {}, "HERE/a.npz: x has dtype <U32; numbers are needed"),
    "too few classes": (
        nothing,
        data(n_classes=2),
        "HERE/a.npz: row 2: label 2 is outside 0..1; mend the row, or raise data.n_classes",
    ),
    "a label that is not whole": (
        npz(x=X, y=replaced(Y.astype(float), 4, 1.5)),
        {},
        "HERE/a.npz: row 4: label 1.5 is not one of 0, 1, 2, ...; mend the row",
    ),
    "a label that is not a number": (
        npz(x=X, y=replaced(Y.astype(float), 4, np.nan)),
        {},
        "HERE/a.npz: row 4: label nan is not one of 0, 1, 2, ...; mend the row",
    ),
    "a negative label": (
        npz(x=X, y=replaced(Y, 7, -1)),
        {},
        "HERE/a.npz: row 7: label -1 is not one of 0, 1, 2, ...; mend the row",
    ),
    "labels all negative": (
        npz(x=X, y=Y - 3),
        {},
        "HERE/a.npz: row 0: label -3 is not one of 0, 1, 2, ...; mend the row",
    ),
    "an enormous label": (
        npz(x=X, y=replaced(Y.astype(float), 3, 1e20)),
        {},
        "HERE/a.npz: row 3: label 1e+20 is not one of 0, 1, 2, ...; mend the row",
    ),
    "a column of ids for labels": (
        npz(x=X, y=Y + 10**9),
        {},
        "HERE/a.npz: label 1000000002 makes more classes than the 10 rows there are; "
        "choose the right column, or set data.n_classes",
    ),
    "a value that is not finite": (
        npz(x=replaced(X, (6, 1), np.inf), y=Y),
        {},
        "HERE/a.npz: row 6: x holds a value that is not finite as float32; mend or drop the row",
    ),
    "a value too large for float32": (
        npz(x=replaced(X, (6, 1), 1e300), y=Y),
        {},
        "HERE/a.npz: row 6: x holds a value that is not finite as float32; mend or drop the row",
    ),
    "a target that is not finite": (
        npz(x=X, y=replaced(Y.astype(float), 8, np.nan)),
        {"task": {"name": "regression"}},
        "HERE/a.npz: row 8: y holds a value that is not finite as float32; mend or drop the row",
    ),
    "targets of no columns": (
        npz(x=X, y=X[:, :0]),
        {"task": {"name": "regression"}},
        "HERE/a.npz: y has shape (10, 0); (rows,) or (rows, columns) is needed",
    ),
    "classes in a regression": (
        nothing,
        {**data(n_classes=3), "task": {"name": "regression"}},
        "data.n_classes: the targets of regression are numbers, not classes; leave it out",
    ),
    "binary with three classes": (
        nothing,
        {"task": {"name": "binary_classification"}},
        "task.name: binary_classification needs labels 0 and 1, but the largest label, or data.n_classes - 1, is 2; "
        "subtract 1 from labels 1 and 2; for more than two classes use classification",
    ),
    "npz without y": (
        npz(x=X, labels=Y),
        {},
        "HERE/a.npz: cannot be read as a NumPy archive (.npz): no array 'y' in it; it holds x, labels",
    ),
    "npz of objects": (
        npz(x=X, y=np.array([None] * 10, object)),
        {},
        "HERE/a.npz: cannot be read as a NumPy archive (.npz): Object arrays cannot be loaded when allow_pickle=False",
    ),
    "npz that is text": (file("a.npz", b"x,y\n1,2\n"), {}, f"HERE/a.npz: {NO_NPZ}"),
    "npz that is empty": (file("a.npz", b""), {}, f"HERE/a.npz: {NO_NPZ}"),
    "npy for npz": (
        file("a.npz", b"\x93NUMPY\1\0" + bytes(99)),
        {},
        f"HERE/a.npz: {NO_NPZ}",
    ),
    "npz cut short": (
        lambda: Path("a.npz").write_bytes(Path("a.npz").read_bytes()[:300]),
        {},
        "HERE/a.npz: cannot be read as a NumPy archive (.npz): File is not a zip file",
    ),
    "npz with a flipped byte": (
        lambda: Path("a.npz").write_bytes(Path("a.npz").read_bytes()[:200] + b"?" + Path("a.npz").read_bytes()[201:]),
        {},
        "HERE/a.npz: cannot be read as a NumPy archive (.npz): Bad CRC-32 for file 'x.npy'",
    ),
    "csv with names, not said": (
        file("a.csv", b"a,b,label\n" + ROWS),
        csv(),
        "HERE/a.csv: cannot be read as CSV: line 1: column 1: 'a' is not a number; "
        "if the first line holds names, set data.header: true",
    ),
    "csv, no such column name": (
        file("a.csv", b"a,b,label\n" + ROWS),
        csv(header=True, target="lable"),
        "HERE/a.csv: cannot be read as CSV: no column 'lable'; it has a, b, label",
    ),
    "csv, no such column number": (
        file("a.csv", ROWS),
        csv(target=3),
        "HERE/a.csv: cannot be read as CSV: no column 3; it has 3",
    ),
    "csv, a name without a header": (
        file("a.csv", ROWS),
        csv(target="label"),
        "HERE/a.csv: cannot be read as CSV: data.target is the name 'label', but data.header is false; set it to true",
    ),
    "csv with a short row": (
        file("a.csv", ROWS + b"1,2\n"),
        csv(),
        "HERE/a.csv: cannot be read as CSV: line 11: 2 columns, but 3 in the rows before",
    ),
    "csv with a word": (
        file("a.csv", ROWS + b"1,two,2\n"),
        csv(),
        "HERE/a.csv: cannot be read as CSV: line 11: column 2: 'two' is not a number",
    ),
    "csv of nothing": (file("a.csv", b""), csv(), "HERE/a.csv: cannot be read as CSV: it holds no rows"),
    "csv of a header alone": (
        file("a.csv", b"a,b,c\n"),
        csv(header=True),
        "HERE/a.csv: cannot be read as CSV: it holds no rows",
    ),
    "csv of one column": (
        file("a.csv", b"1\n2\n"),
        csv(),
        "HERE/a.csv: x has shape (2, 0); at least one feature is needed",
    ),
    "csv, gzip damaged": (
        file("a.csv", GZIPPED[:20] + b"????" + GZIPPED[24:]),
        csv(),
        "HERE/a.csv: cannot be read as CSV: Error -3 while decompressing data: ",
    ),
    "idx with a wrong magic number": (
        both_idx(b"\x89PNG" + IMAGES[4:], LABELS),
        idx(),
        "HERE/images: cannot be read as IDX: it begins with 89504e47, not with an IDX magic number",
    ),
    "idx cut short": (
        both_idx(IMAGES[:-4], LABELS),
        idx(),
        "HERE/images: cannot be read as IDX: its header promises 36 bytes for shape (10, 1, 2), but it has 32",
    ),
    "idx cut short in its header": (
        both_idx(IMAGES, LABELS[:6]),
        idx(),
        "HERE/labels: cannot be read as IDX: it ends after 6 bytes, inside its header",
    ),
    "idx, images for labels": (
        both_idx(IMAGES, IMAGES),
        idx(),
        "HERE/images and HERE/labels: y has shape (10, 1, 2); (rows,) or (rows, columns) is needed",
    ),
    "idx, gzip cut short": (
        both_idx(gzip.compress(IMAGES)[:-9], LABELS),
        idx(),
        "HERE/images: cannot be read as IDX: Compressed file ended before the end-of-stream marker was reached",
    ),
    "idx, one validation file": (
        both_idx(IMAGES, LABELS),
        idx(validation_images="images"),
        "data: give validation_images and validation_labels together, or neither",
    ),
    "not hdf5": (
        file("a.h5", b"PK\3\4" + bytes(99)),
        HDF5,
        "HERE/a.h5: cannot be read as HDF5: Unable to synchronously open file (file signature not found)",
    ),
    "hdf5, no such dataset": (
        hdf5(images=X, y=Y),
        HDF5,
        "HERE/a.h5: cannot be read as HDF5: no dataset 'x' in it; it holds images, y",
    ),
    "hdf5 of text": (
        hdf5(x=X, y=["a"] * 10),
        HDF5,
        "HERE/a.h5: cannot be read as HDF5: 'y' has dtype object; numbers are needed",
    ),
    "hdf5, a value that is not finite": (
        hdf5(x=replaced(X, (5, 0), np.nan), y=Y),
        HDF5,
        "HERE/a.h5: row 5: x holds a value that is not finite as float32; mend or drop the row",
    ),
    "hdf5, a value too large for float32": (
        hdf5(x=replaced(X, (5, 0), 1e300), y=Y),
        HDF5,
        "HERE/a.h5: row 5: x holds a value that is not finite as float32; mend or drop the row",
    ),
    "hdf5, a value too large once scaled": (
        hdf5(x=replaced(X, (5, 0), 1e30), y=Y),
        {"data": {**HDF5["data"], "scale": 1e30}},
        "HERE/a.h5: row 5: x holds a value that is not finite as float32; mend or drop the row",
    ),
    "hdf5, a label that is not whole": (
        hdf5(x=X, y=replaced(Y.astype(float), 9, 0.5)),
        HDF5,
        "HERE/a.h5: row 9: label 0.5 is not one of 0, 1, 2, ...; mend the row",
    ),
    "nothing left to train on": (
        nothing,
        data(validation_fraction=0.97),
        "HERE/a.npz: data.validation_fraction 0.97 of 10 rows leaves 0 to train on and 10 to validate; "
        "each needs at least one",
    ),
    "nothing left to validate": (
        nothing,
        data(validation_fraction=0.01),
        "HERE/a.npz: data.validation_fraction 0.01 of 10 rows leaves 10 to train on and 0 to validate; "
        "each needs at least one",
    ),
    "an evaluation without validation rows": (
        nothing,
        {"evaluate": {"every": 2}},
        "evaluate.every: there is no validation part; set data.validation_fraction, or name validation files in data",
    ),
    "validation rows twice": (
        nothing,
        data(validation_fraction=0.5, validation_path="a.npz"),
        "data.validation_fraction: validation files are named too; give one or the other",
    ),
    "validation rows of another shape": (
        lambda: np.savez("b.npz", x=X[:, :1], y=Y),
        data(validation_path="b.npz"),
        "HERE/b.npz: samples of shape (1,) and targets (), but HERE/a.npz has (2,) and (); they must be equal",
    ),
    "a validation label that training has not": (
        lambda: np.savez("b.npz", x=X, y=Y + 1),
        data(validation_path="b.npz", n_classes=3),
        "HERE/b.npz: row 2: label 3 is outside 0..2; mend the row, or raise data.n_classes",
    ),
    "an end before the beginning": (
        nothing,
        {"initial_step": 4},
        "stop.last_step: 3 is below initial_step 4; raise it",
    ),
    "two ends": (nothing, {"stop": {"last_step": 3, "num_steps": 3}}, f"c.yaml:5:7: stop: {EITHER}"),
    "no end": (nothing, {"stop": {}}, f"c.yaml:5:7: stop: {EITHER}"),
    "no stop section": (nothing, {"stop": None}, "c.yaml:1:1: config: stop is missing"),
    "a cadence of 0": (
        nothing,
        {"checkpoint": {"every": 0}},
        "c.yaml:6:21: checkpoint.every: 0 is wrong; should be greater than or equal to 1",
    ),
    "a cadence that never comes": (
        nothing,
        {"log": {"every": 5, "offset": 5}},
        "c.yaml:8:6: log: offset 5 never comes with every 5; it must be below it",
    ),
    "a component that there is not": (
        nothing,
        {"model": {"name": "liner"}},
        "c.yaml:2:15: model.name: no models component is called 'liner'; did you mean 'linear'?; "
        "allowed: linear, mlp, or your own as 'package.module:Name'",
    ),
    "a key that there is not": (
        nothing,
        {"modle": {"name": "linear"}},
        f"c.yaml:8:1: modle: unknown key; did you mean 'model'?; allowed: {SECTIONS}",
    ),
    "nesterov without momentum": (
        nothing,
        {"optimizer": {"name": "sgd", "learning_rate": 0.1, "nesterov": True}},
        "c.yaml:4:12: optimizer: sgd: nesterov needs a momentum above 0",
    ),
    "shards that do not divide": (
        nothing,
        data(batch_size=4, shards=3),
        "c.yaml:1:7: data: shards 3 does not divide batch_size 4; a batch is cut into equal parts",
    ),
    "a batch of more than a hundred epochs": (
        nothing,
        data(batch_size=1001),
        "data.batch_size: 1001 is over 100 times the 10 rows; lower it",
    ),
    "a kernel that this CPU has not": (
        nothing,
        {"numerics": {"threads": 1, "blas_kernel": "Nonesuch"}},
        "numerics.blas_kernel: NumPy was loaded with ",
    ),
}
# lines whose end is a library's own words
PREFIXES = {"csv, gzip damaged", "a kernel that this CPU has not"}


@pytest.mark.parametrize("case", TRAIN)
def test_train_refuses_before_it_begins(case: str, folder: Path) -> None:
    prepare, sections, line = TRAIN[case]
    write_config(**sections)
    prepare()
    before = everything(folder)
    for arguments in (["train", "--config", "c.yaml"], ["train", "--config", "c.yaml", "--run-dir", "new/run"]):
        answer = stepctl(*arguments)
        expected = "stepctl: " + line.replace("HERE", str(folder))
        assert answer.stderr.startswith(expected), answer.stderr
        assert case in PREFIXES or answer.stderr == f"{expected}\n"
        assert answer.stderr.count("\n") == 1
        assert (answer.code, answer.stdout) == (Exit.USAGE, "")
        assert everything(folder) == before


# train and resume: what the command line itself asks for

RANGE = "is not in the range 0<=x<=4611686018427387903."
USAGE: dict[str, tuple[list[str], str]] = {
    "no config file": (
        ["train", "--config", "nowhere.yaml"],
        "stepctl: nowhere.yaml: cannot be read: No such file or directory; check the path",
    ),
    "a folder for a config": (["train", "--config", "."], "stepctl: .: cannot be read: Is a directory; check the path"),
    "data for a config": (["train", "--config", "a.npz"], "stepctl: a.npz: not UTF-8 text: "),
    "no config at all": (["train"], "Error: no config: give a YAML file, such as: stepctl train "),
    "both targets": (
        ["train", "--config", "c.yaml", "--num-steps", "3", "--last-step", "4"],
        "stepctl: --num-steps and --last-step: give one (steps from here, or an absolute step)",
    ),
    "a target below 0": (
        ["train", "--config", "c.yaml", "--num-steps", "-1"],
        f"Error: Invalid value for '--num-steps': -1 {RANGE}",
    ),
    "a target that is no number": (
        ["train", "--config", "c.yaml", "--last-step", "1e3"],
        "Error: Invalid value for '--last-step': '1e3' is not a whole number.",
    ),
    "a setting without a value": (
        ["train", "--config", "c.yaml", "--set", "seed"],
        "stepctl: --set seed: give KEY=VALUE, such as optimizer.learning_rate=1e-3",
    ),
    "a setting of the wrong type": (
        ["train", "--config", "c.yaml", "--set", "seed=1.5"],
        "stepctl: --set seed:1:1: seed: 1.5 is wrong; a whole number is needed",
    ),
    "a setting that there is not": (
        ["train", "--config", "c.yaml", "--set", "data.batchsize=3"],
        "stepctl: --set data.batchsize: data.batchsize: unknown key; did you mean 'batch_size'?; allowed: path, "
        "validation_path, x, y, scale, batch_size, n_classes, shards, validation_fraction",
    ),
    "a run directory that is a file": (
        ["train", "--config", "c.yaml", "--run-dir", "a.npz"],
        "stepctl: a.npz: not a directory to keep a run in: Not a directory",
    ),
    "a run directory below a file": (
        ["train", "--config", "c.yaml", "--run-dir", "a.npz/run"],
        "stepctl: a.npz/run: ",
    ),
    "somebody's folder": (
        ["train", "--config", "c.yaml", "--run-dir", "."],
        "stepctl: .: holds 'a.npz', which no run made; choose another --run-dir",
    ),
    "somebody's folder, dry": (
        ["train", "--config", "c.yaml", "--run-dir", ".", "--dry-run"],
        "stepctl: .: holds 'a.npz', which no run made; choose another --run-dir",
    ),
    "resume of nothing": (
        ["resume", "nowhere"],
        "stepctl: nowhere: no run is there (no config.yaml); start one with: stepctl train",
    ),
    "resume of somebody's folder": (
        ["resume", "."],
        "stepctl: .: no run is there (no config.yaml); start one with: stepctl train",
    ),
    "resume of a file": (
        ["resume", "a.npz"],
        "stepctl: a.npz: is a file; give the run's directory (and --from-step N to go back)",
    ),
    "a config without a name": (
        ["train", "--config", ""],
        "Error: Invalid value for '--config': it is empty; give a path.",
    ),
    "a run directory without a name": (
        ["train", "--config", "c.yaml", "--run-dir", ""],
        "Error: Invalid value for '--run-dir': it is empty; give a path.",
    ),
    "a run without a name": (["resume", ""], "Error: Invalid value for 'RUN': it is empty; give a path."),
    "a name too long for a file": (
        ["train", "--config", "c.yaml", "--run-dir", "a" * 300],
        f"Error: Invalid value for '--run-dir': '{'a' * 60}': File name too long; give another path.",
    ),
    "a run whose name is too long": (
        ["resume", "a" * 300],
        f"Error: Invalid value for 'RUN': '{'a' * 60}': File name too long; give another path.",
    ),
    "no name of a file": (
        ["resume", "a\0b"],
        r"Error: Invalid value for 'RUN': 'a\x00b': embedded null byte; give another path.",
    ),
    "a name that a terminal would obey": (
        ["train", "--config", "a\nb\x1b[31m\u202e"],
        r"stepctl: a\nb\x1b[31m\u202e: cannot be read: No such file or directory; check the path",
    ),
    "an option that a terminal would obey": (["train", "--a\x1b[31m"], "Error: No such option"),
    "a pipe for a config": (
        ["train", "--config", "/dev/null"],
        "stepctl: /dev/null: cannot be read: not a regular file; copy its content into one; check the path",
    ),
    "a number of other digits": (
        ["train", "--config", "c.yaml", "--num-steps", "\u0663"],
        "Error: Invalid value for '--num-steps': '\u0663' is not a whole number.",
    ),
    "a number with a gap": (
        ["resume", "run", "--from-step", "1_0"],
        "Error: Invalid value for '--from-step': '1_0' is not a whole number.",
    ),
    "a number without end": (
        ["resume", "run", "--num-steps", "9" * 30_000],
        "Error: Invalid value for '--num-steps': '999",
    ),
    "two configs": (
        ["train", "c.yaml", "--config", "c.yaml"],
        "Error: two configs: c.yaml and --config c.yaml; give one",
    ),
    "a plan in JSON, not asked for": (
        ["train", "--config", "c.yaml", "--json"],
        "Error: --json prints the plan of --dry-run: give both",
    ),
    "a target and another setting of it": (
        ["train", "--config", "c.yaml", "--num-steps", "1", "--set", "stop.last_step=5"],
        f"stepctl: --num-steps: stop: {EITHER}",
    ),
    "more steps than can be counted": (
        ["train", "--config", "c.yaml", "--num-steps", str(2**62 - 1), "--set", f"initial_step={2**62 - 1}"],
        f"stepctl: stop: {2**63 - 2} is more steps than can be counted; lower stop or initial_step",
    ),
    "no such command": (["tarin"], "Error: No such command 'tarin'."),
    "no such option": (["train", "--confg", "c.yaml"], "Error: No such option"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_usage(case: str, folder: Path) -> None:
    arguments, line = USAGE[case]
    before = everything(folder)
    answer = stepctl(*arguments)
    assert (answer.code, answer.stdout) == (Exit.USAGE, "")
    last = answer.stderr.splitlines()[-1]
    assert last.startswith(line), answer.stderr
    assert last == answer.stderr.rstrip("\n") or answer.stderr.startswith("Usage: stepctl ")
    assert answer.stderr.replace("\n", "").isprintable()
    assert len(last) < 1100
    assert everything(folder) == before


OWN = """
from dataclasses import dataclass
from stepctl.models.base import Model
from stepctl.schedules import Schedule
from stepctl.tasks.supervised import Classification

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
MISTAKES: dict[str, tuple[str, int, str]] = {
    "a model that ends the program": (
        "model={name: 'own_mistakes:Leaves'}",
        Exit.USAGE,
        "model: own_mistakes:Leaves cannot be built: SystemExit: 0 (own_mistakes.py:9)\n",
    ),
    "a model that ends it later": (
        "model={name: 'own_mistakes:LeavesLater'}",
        Exit.NEGATIVE,
        "unexpected SystemExit: 0 (own_mistakes.py:13); see more with: stepctl --debug COMMAND ...\n",
    ),
    "an error of two lines": (
        "model={name: 'own_mistakes:odd'}",
        Exit.USAGE,
        r"model: own_mistakes:odd cannot be built: a\nb\x1b[31m (own_mistakes.py:19)" + "\n",
    ),
    "a task without targets": (
        "task={name: 'own_mistakes:NoTargets'}",
        Exit.USAGE,
        "task.name: own_mistakes:NoTargets does not say its targets: one of classes, values\n",
    ),
    "a rate that is a word": (
        RATE % "Word",
        Exit.USAGE,
        "optimizer.learning_rate: gives 'fast' at step 0; a number from 0 on is needed\n",
    ),
    "a rate that is not finite": (
        RATE % "Endless",
        Exit.USAGE,
        "optimizer.learning_rate: gives inf at step 0; a number from 0 on is needed\n",
    ),
    "a rate that ends the program": (
        RATE % "Ends",
        Exit.USAGE,
        "optimizer.learning_rate: fails at step 0: SystemExit: 0 (own_mistakes.py:32)\n",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_user_s_own_module(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assignment, code, line = MISTAKES[case]
    (folder / "own_mistakes.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_mistakes", raising=False)
    before = everything(folder)
    assert stepctl("train", "--config", "c.yaml", "--set", assignment) == (code, "", f"stepctl: {line}")
    assert everything(folder) == before


def test_every_problem_of_a_config_has_its_line(folder: Path) -> None:
    Path("c.yaml").write_text("seed: 1\nseed: 2\ndata: &a {name: digits}\nmodel: *a\n")
    assert stepctl("train", "--config", "c.yaml").stderr.splitlines() == [
        "stepctl: c.yaml:2:1: duplicate key 'seed'; the first stands at c.yaml:1:1",
        "c.yaml:3:7: anchor &a; write each value out where it is used",
        "c.yaml:4:8: alias *a; write the value out",
    ]


def test_a_user_s_own_config_is_not_a_run_s(folder: Path) -> None:
    Path("mine").mkdir()
    shutil.move("c.yaml", "mine/config.yaml")
    before = everything(folder)
    answer = stepctl("train", "--config", "mine/config.yaml", "--run-dir", "mine")
    assert answer == (
        Exit.USAGE,
        "",
        "stepctl: mine: holds 'config.yaml', which no run made; choose another --run-dir\n",
    )
    assert everything(folder) == before


# A run that is there


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run to step 3, with every checkpoint kept; copied for each test."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "a.npz", x=X, y=Y)
    config = {**CONFIG, "data": {**CONFIG["data"], "path": str(folder / "a.npz")}}
    (folder / "c.yaml").write_text(yamlio.dumps({**config, "checkpoint": {"every": 1, "keep_last": None}}))
    answer = stepctl("train", "--config", folder / "c.yaml", "--run-dir", folder / "run", "-q")
    assert answer == (Exit.DONE, "", "")
    return folder


@pytest.fixture
def there(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with that run in it, in "run"."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RESULT = "would change the result, so a resume refuses it"
THERE: dict[str, tuple[list[str], int, str]] = {
    "train again": (
        ["train", "--config", "c.yaml", "--run-dir", "run"],
        Exit.USAGE,
        "run: holds a run already; go on with: stepctl resume run",
    ),
    "a locked key": (
        ["resume", "run", "--set", "seed=5", "--num-steps", "1"],
        Exit.USAGE,
        f"seed: 0 -> 5 {RESULT}; keep 0, or pass --allow-change seed to stepctl resume",
    ),
    "a locked key by another config": (
        ["train", "--config", "other.yaml", "--run-dir", "run", "--or-resume"],
        Exit.USAGE,
        f"data.batch_size: 2 -> 4 {RESULT}; keep 2, or pass --allow-change data.batch_size to stepctl resume",
    ),
    "another locked key allowed": (
        ["resume", "run", "--set", "optimizer.learning_rate=1", "--allow-change", "seed"],
        Exit.USAGE,
        f"optimizer.learning_rate.value: 0.1 -> 1.0 {RESULT}; "
        "keep 0.1, or pass --allow-change optimizer.learning_rate.value to stepctl resume",
    ),
    "a key to allow that there is not": (
        ["resume", "run", "--allow-change", "nonsense"],
        Exit.USAGE,
        "--allow-change nonsense: no such key",
    ),
    "a setting of the wrong type": (
        ["resume", "run", "--set", "log.every=0"],
        Exit.USAGE,
        "--set log.every:1:1: log.every: 0 is wrong; should be greater than or equal to 1",
    ),
    "a model that does not fit": (
        ["resume", "run", "--set", "model={name: mlp, hidden: [4]}", "--allow-change", "model"],
        Exit.NO_CHECKPOINT,
        "step-00000003.h5: does not fit this config\n"
        "  /params/dense0/weight: expected float32 (2, 4), found float32 (2, 3)\n"
        "  /params/dense0/bias: expected float32 (4,), found float32 (3,)\n"
        "  /params/dense1/weight: expected float32 (4, 3), found nothing\n"
        "  /params/dense1/bias: expected float32 (3,), found nothing",
    ),
    "a step that there is not": (
        ["resume", "run", "--from-step", "7"],
        Exit.NO_CHECKPOINT,
        "run/checkpoints: no checkpoint of step 7; there are: 0, 1, 2, 3",
    ),
    "both targets": (
        ["resume", "run", "--num-steps", "1", "--last-step", "9"],
        Exit.USAGE,
        "--num-steps and --last-step: give one (steps from here, or an absolute step)",
    ),
    "inspect of nothing": (
        ["inspect", "nowhere"],
        Exit.USAGE,
        "nowhere: no run is there, and no checkpoint; list the runs with: stepctl runs",
    ),
    "inspect of another file": (
        ["inspect", "c.yaml"],
        Exit.NO_CHECKPOINT,
        "c.yaml: not a stepctl checkpoint, or its first 512 bytes are damaged",
    ),
    "inspect of another folder": (
        ["inspect", "."],
        Exit.NO_CHECKPOINT,
        ".: neither a checkpoint nor a run (no checkpoints/ in it)",
    ),
    "a config that there is not": (
        ["config", "check", "nowhere.yaml"],
        Exit.USAGE,
        "nowhere.yaml: cannot be read: No such file or directory; check the path",
    ),
}


@pytest.mark.parametrize("case", THERE)
def test_beside_a_run(case: str, there: Path) -> None:
    arguments, code, line = THERE[case]
    text = Path("c.yaml").read_text().replace("batch_size: 2", "batch_size: 4")
    Path("other.yaml").write_text(text)
    before = everything(there)
    assert stepctl(*arguments) == (code, "", f"stepctl: {line}\n")
    assert everything(there) | {"run/lock": b""} == before | {"run/lock": b""}


def test_a_locked_key_may_be_allowed(there: Path) -> None:
    options = ["--set", "optimizer.learning_rate=0.5", "--allow-change", "optimizer.learning_rate", "-q"]
    assert stepctl("resume", "run", "--num-steps", "1", *options) == (Exit.DONE, "", "")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows if row["step"] in (1, 4)] == [0.1, 0.5]
    starts = [json.loads(line) for line in Path("run/ledger.jsonl").read_text().splitlines() if '"start"' in line]
    assert starts[-1]["changes"] == [{"key": "optimizer.learning_rate.value", "old": 0.1, "new": 0.5}]


def test_a_finished_run_says_so(there: Path) -> None:
    before = everything(there)
    line = "run: at global step 3, target 3: nothing to do (more: --num-steps N)\n"
    assert stepctl("resume", "run") == (Exit.DONE, "", line)
    assert stepctl("train", "--config", "c.yaml", "--run-dir", "run", "--or-resume") == (Exit.DONE, "", line)
    assert everything(there) | {"run/lock": b""} == before | {"run/lock": b""}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_passed_over(there: Path) -> None:
    damage(Path("run/checkpoints/step-00000003.h5"))
    answer = stepctl("inspect", "run", "--step")
    reason = "step-00000003.h5: damaged (sha256 differs); using step-00000002.h5\n"
    assert answer == (Exit.DONE, "2\n", reason)
    assert stepctl("resume", "run", "-q") == (Exit.DONE, "", reason)


def test_no_good_checkpoint_is_left(there: Path) -> None:
    for path in Path("run/checkpoints").iterdir():
        damage(path) if path.name < "step-00000002" else path.unlink()
    before = everything(there)
    reasons = "; ".join(f"step-0000000{step}.h5: damaged (sha256 differs)" for step in (1, 0))
    line = f"run/checkpoints: no usable checkpoint (2 files, none good: {reasons}); start again in a new --run-dir"
    for command in ("resume", "inspect"):
        assert stepctl(command, "run") == (Exit.NO_CHECKPOINT, "", f"stepctl: {line}\n")
    assert everything(there) | {"run/lock": b""} == before | {"run/lock": b""}


def test_a_lost_config_is_in_the_checkpoints(there: Path) -> None:
    Path("run/config.yaml").unlink()
    line = "stepctl: run/config.yaml: is missing; its checkpoints hold it (stepctl inspect run): put it back\n"
    assert stepctl("resume", "run", "--num-steps", "1") == (Exit.USAGE, "", line)
    assert "\nconfig\n  seed: 0\n" in stepctl("inspect", "run").stdout


def test_moved_data_are_noted_and_changed_data_are_named(there: Path, trained: Path) -> None:
    moved = ["--set", f"data.path={there}/a.npz"]
    note = f"note: the data are the same under another path (data.path: {trained}/a.npz -> {there}/a.npz)\n"
    assert stepctl("resume", "run", "--num-steps", "1", "-q", *moved) == (Exit.DONE, "", note)
    np.savez("a.npz", x=X + 1, y=Y)
    before = everything(there)
    reason = "the data are not those that the run was trained on; a resume would not be exact"
    remedy = "bring them back, or pass --allow-change data to stepctl resume"
    expected = f"stepctl: {there}/a.npz: {reason}; {remedy}\n"
    assert stepctl("resume", "run", "--num-steps", "1") == (Exit.USAGE, "", expected)
    Path("a.npz").unlink()
    missing = f"stepctl: {there}/a.npz: no such file; check the path in the config's data section\n"
    assert stepctl("resume", "run", "--num-steps", "1") == (Exit.USAGE, "", missing)
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


IN_USE = "stepctl: run: in use by process 4321 on node7; wait for it, or stop it\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["resume", "run", "--num-steps", "5"],
        ["resume", "run", "--from-step", "1"],
        ["train", "--config", "c.yaml", "--run-dir", "run", "--or-resume"],
    ],
    ids=" ".join,
)
def test_a_run_in_use_is_left_alone(arguments: list[str], held: Path) -> None:
    before = everything(held)
    assert stepctl(*arguments) == (Exit.IN_USE, "", IN_USE)
    assert everything(held) == before


def test_a_run_in_use_may_be_looked_at(held: Path) -> None:
    assert stepctl("inspect", "run", "--step") == (Exit.DONE, "3\n", "")


# The process itself: its exit code and its streams


def test_the_exit_codes_are_a_promise() -> None:
    promised = {"DONE": 0, "NEGATIVE": 1, "USAGE": 2, "NO_CHECKPOINT": 3, "IN_USE": 4, "STOPPED": 75}
    promised["INTERRUPTED"] = 130
    assert {code.name: code.value for code in Exit} == promised


def process(*arguments: str) -> Answer:
    command = [sys.executable, "-m", "stepctl.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


def test_the_process_gives_the_same_answers(held: Path) -> None:
    write_config(**data(path="nowhere.npz"))
    line = f"stepctl: {held}/nowhere.npz: no such file; check the path in the config's data section\n"
    assert process("train", "--config", "c.yaml", "--run-dir", "new") == (Exit.USAGE, "", line)
    assert process("resume", "run") == (Exit.IN_USE, "", IN_USE)
    assert process("inspect", "c.yaml").code == Exit.NO_CHECKPOINT
    assert not Path("new").exists()


def test_a_traceback_is_for_the_asking(folder: Path) -> None:
    answer = process("--debug", "train", "--config", "nowhere.yaml")
    assert (answer.code, answer.stdout) == (1, "")
    assert answer.stderr.startswith("Traceback")
    assert "stepctl.errors.ConfigError: nowhere.yaml: cannot be read" in answer.stderr


def test_what_nobody_foresaw_is_one_line_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr(run, "create", fail)
    code, out, text = stepctl("train", "--config", "c.yaml")
    assert (code, out) == (Exit.NEGATIVE, "")
    where = rf"\({re.escape(__file__)}:\d+\)"
    assert re.fullmatch(
        rf"stepctl: unexpected KeyError: 'a\\nb' {where}; see more with: stepctl --debug COMMAND ...\n", text
    )


def test_what_the_system_refuses_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "a\nb")

    monkeypatch.setattr(run, "create", fail)
    where = f"{__file__}:{fail.__code__.co_firstlineno + 1}"
    line = f"stepctl: a\\nb: Input/output error ({where}); mend that, and run the command again\n"
    assert stepctl("train", "--config", "c.yaml") == (Exit.NEGATIVE, "", line)


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
