"""The same data under another path resume exactly, with one note; other data are refused."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from syrupy.assertion import SnapshotAssertion

from stepctl.cli.main import cli
from stepctl.config import registry, yaml
from stepctl.config.model import parse_config
from stepctl.errors import ConfigError, Exit
from stepctl.reports import verify
from stepctl.reports.replay import replay
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.records import read_records
from stepctl.state.arena import Array
from tests.support.messages import without_paths
from tests.support.runs import BASE, make_config, resume, train

N = 60
X = np.random.default_rng(0).integers(0, 200, (N, 4)).astype(np.uint8)
Y = (np.arange(N) % 3).astype(np.uint8)


def write_csv(path: Path, x: Array, y: Array) -> None:
    table = "".join(
        ",".join(map(str, [*row, label])) + "\n" for row, label in zip(x, y, strict=True)
    )
    path.write_text(table)


def write_npz(path: Path, x: Array, y: Array) -> None:
    np.savez(path, x=x, y=y)


def write_hdf5(path: Path, x: Array, y: Array, **options: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, **options)
        file.create_dataset("y", data=y, **options)


def idx_bytes(array: Array) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(path: Path, x: Array, y: Array) -> None:
    path.write_bytes(idx_bytes(x.reshape(len(x), 2, 2)))
    path.with_name(f"{path.name}.labels").write_bytes(idx_bytes(y))


def one_path(name: str) -> Callable[[Path, Path], dict[str, Any]]:
    return lambda train, held: {"name": name, "path": str(train), "validation_path": str(held)}


def idx_paths(train: Path, held: Path) -> dict[str, Any]:
    return {
        "name": "idx",
        "images": str(train),
        "labels": f"{train}.labels",
        "validation_images": str(held),
        "validation_labels": f"{held}.labels",
    }


KINDS: dict[
    str, tuple[Callable[[Path, Array, Array], None], Callable[[Path, Path], dict[str, Any]]]
] = {
    "csv": (write_csv, one_path("csv")),
    "arrays": (write_npz, one_path("arrays")),
    "hdf5": (write_hdf5, one_path("hdf5")),
    "idx": (write_idx, idx_paths),
}


class Place:
    """A folder of data files, a.npz and b.npz (whatever they hold), and the config's section that names them."""

    def __init__(self, kind: str, folder: Path, x: Array = X) -> None:
        self.kind, self.folder = kind, folder
        folder.mkdir()
        write, _ = KINDS[kind]
        write(folder / "a.npz", x, Y)
        write(folder / "b.npz", x[: N // 2], Y[: N // 2])

    def section(self, folder: Path | None = None) -> dict[str, Any]:
        folder = folder or self.folder
        files = KINDS[self.kind][1](folder / "a.npz", folder / "b.npz")
        return {**files, "scale": 0.005, "batch_size": 8}

    def config(self, last_step: int, folder: Path | None = None) -> dict[str, Any]:
        sections = {"checkpoint": {"every": 2, "keep_last": None}, "evaluate": {"every": 2}}
        return {**BASE, "data": self.section(folder), "stop": {"last_step": last_step}, **sections}

    def assignments(self, folder: Path) -> tuple[str, ...]:
        before, after = self.section(), self.section(folder)
        return tuple(f"data.{key}={after[key]}" for key in after if after[key] != before[key])

    def all_files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(request.param, tmp_path / "data")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


def moved(place: Place, tmp_path: Path) -> Path:
    return place.folder.rename(tmp_path / "scratch")


def linked(place: Place, tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(place.folder)
    return tmp_path / "link"


MOVES = {"moved": moved, "linked": linked}


@pytest.mark.process
@pytest.mark.parametrize("move", MOVES)
def test_a_resume_from_another_path_is_exact_and_says_so_once(
    move: str, place: Place, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    run = tmp_path / "run"
    said: list[str] = []
    expected = train(make_config(**place.config(6)), tmp_path / "unbroken")
    train(make_config(**place.config(3)), run)
    folder = MOVES[move](place, tmp_path)
    assignments = place.assignments(folder)
    resume(run, last_step=4, assignments=assignments, say=said.append)
    (line,) = said
    assert without_paths(line, HERE=tmp_path) == snapshot
    assert resume(run, last_step=6, say=pytest.fail).same_bits(expected)
    changes = [
        row.get("changes") for row in RunDirectory(run).read_ledger() if row["event"] == "start"
    ]
    old, new = place.section(), place.section(folder)
    keys = [f"data.{key}" for key in old if old[key] != new[key]]
    assert [change["key"] for change in changes[1]] == keys
    assert (changes[0], changes[2]) == (None, None)
    assert verify.verify(str(run))[1] == []
    assert [
        differences for _, differences in replay(read_records(RunDirectory(run)), 0, 6, pytest.fail)
    ] == [[]] * 4


@pytest.mark.training
def test_train_or_resume_finds_the_data_at_their_new_path(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    expected = train(make_config(**place.config(6)), tmp_path / "unbroken")
    train(make_config(**place.config(3)), run)
    folder = moved(place, tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.dumps(place.config(6, folder)))
    for _ in range(2):
        done = call("train", "--config", tmp_path / "c.yaml", "--run-dir", run, "--or-resume", "-q")
        assert done.exit_code == Exit.DONE, done.stderr
    assert resume(run).same_bits(expected)


@pytest.mark.training
@pytest.mark.parametrize("kind", ["csv", "idx"])
@pytest.mark.parametrize("first", ["packed", "plain"])
def test_a_file_may_be_unpacked_or_packed(kind: str, first: str, tmp_path: Path) -> None:
    plain, packed = Place(kind, tmp_path / "plain"), Place(kind, tmp_path / "packed")
    for file in packed.all_files():
        file.write_bytes(gzip.compress(file.read_bytes()))
    before, after = (packed, plain) if first == "packed" else (plain, packed)
    expected = train(make_config(**before.config(4)), tmp_path / "unbroken")
    train(make_config(**before.config(2)), tmp_path / "run")
    assignments = before.assignments(after.folder)
    assert resume(tmp_path / "run", last_step=4, assignments=assignments).same_bits(expected)


@pytest.mark.training
def test_an_hdf5_set_may_be_compressed(tmp_path: Path) -> None:
    place = Place("hdf5", tmp_path / "data")
    (tmp_path / "small").mkdir()
    write_hdf5(tmp_path / "small" / "a.npz", X, Y, compression="gzip")
    write_hdf5(tmp_path / "small" / "b.npz", X[: N // 2], Y[: N // 2], chunks=True)
    expected = train(make_config(**place.config(4)), tmp_path / "unbroken")
    train(make_config(**place.config(2)), tmp_path / "run")
    assignments = place.assignments(tmp_path / "small")
    assert resume(tmp_path / "run", last_step=4, assignments=assignments).same_bits(expected)


@pytest.mark.training
def test_one_changed_value_is_refused(
    place: Place, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    run = tmp_path / "run"
    train(make_config(**place.config(2)), run)
    x = X.copy()
    x[N // 2 + 1, 1] += 1  # in the training file alone
    other = Place(place.kind, tmp_path / "other", x)
    before = (run / "ledger.jsonl").read_bytes()
    assignments = place.assignments(other.folder)
    with pytest.raises(ConfigError) as caught:
        resume(run, last_step=4, assignments=assignments)
    key, _, _ = assignments[0].partition("=")
    assert str(caught.value).startswith(f"{key}: ")
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert (run / "ledger.jsonl").read_bytes() == before
    resume(run, last_step=4, assignments=assignments, allow_change=("data",))
    with pytest.raises(ConfigError) as caught:
        list(replay(read_records(RunDirectory(run)), 0, 4, lambda message: None))
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot(name="replay")
    assert [
        differences for _, differences in replay(read_records(RunDirectory(run)), 2, 4, pytest.fail)
    ] == [[]]


@pytest.mark.training
def test_validation_data_count_too(place: Place, tmp_path: Path) -> None:
    train(make_config(**place.config(2)), tmp_path / "run")
    other = Place(place.kind, tmp_path / "other", X + 1)
    assignments = [
        item for item in place.assignments(other.folder) if item.startswith("data.validation_")
    ]
    with pytest.raises(ConfigError, match="the data differ from the ones"):
        resume(tmp_path / "run", last_step=4, assignments=tuple(assignments))


@pytest.mark.training
def test_other_keys_of_data_stay_locked(
    place: Place, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    train(make_config(**place.config(2)), tmp_path / "run")
    assignments = (*place.assignments(linked(place, tmp_path)), "data.scale=0.01")
    with pytest.raises(ConfigError) as caught:
        resume(tmp_path / "run", last_step=4, assignments=assignments)
    assert str(caught.value) == snapshot


@pytest.mark.training
def test_without_a_record_of_the_data_a_path_stays_locked(place: Place, tmp_path: Path) -> None:
    train(make_config(**place.config(2)), tmp_path / "run")
    (tmp_path / "run" / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match="would change the result"):
        resume(
            tmp_path / "run", last_step=4, assignments=place.assignments(linked(place, tmp_path))
        )


@pytest.mark.training
def test_a_plan_asks_for_no_permission_either(place: Place, tmp_path: Path) -> None:
    train(make_config(**place.config(2)), tmp_path / "run")
    options = [
        word for item in place.assignments(linked(place, tmp_path)) for word in ("--set", item)
    ]
    done = call("plan", tmp_path / "run", *options, "--last-step", 4)
    assert done.exit_code == Exit.DONE
    assert "--allow-change" not in done.stdout
    other = Place(place.kind, tmp_path / "other", X + 1)
    options = [word for item in place.assignments(other.folder) for word in ("--set", item)]
    assert (
        "--allow-change data." in call("plan", tmp_path / "run", *options, "--last-step", 4).stdout
    )


@pytest.mark.training
def test_a_run_whose_data_were_recorded_by_an_earlier_version_resumes(tmp_path: Path) -> None:
    """The fingerprint of an HDF5 set was that of its file's size, too."""
    place, run = Place("hdf5", tmp_path / "data"), tmp_path / "run"
    expected = train(make_config(**place.config(4)), tmp_path / "unbroken")
    train(make_config(**place.config(2)), run)
    context = {"targets": "classes", "dtype": "float32"}
    spec = parse_config(yaml.Document(place.config(2))).data.spec()
    sources = registry.build("data", spec, **context)
    former = "; ".join(source.former_fingerprint() for source in sources)
    ledger = RunDirectory(run).read_ledger().events
    assert former != ledger[0]["data"]
    lines = [row | ({"data": former} if row["event"] == "start" else {}) for row in ledger]
    (run / "ledger.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert resume(run, last_step=4).same_bits(expected)
    write_hdf5(tmp_path / "other.h5", X + 1, Y)
    os.replace(tmp_path / "other.h5", place.folder / "a.npz")
    with pytest.raises(ConfigError, match="the data differ from the ones"):
        resume(run, last_step=5)


@pytest.mark.process
def test_a_source_of_the_user_s_own_takes_part_by_its_annotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
from stepctl.data.arrays import arrays
from stepctl.data.base import Sources, Targets
from stepctl.config.registry import File

def own(*, place: File, name: str = "", targets: Targets, dtype: str) -> Sources:
    return arrays(path=place, targets=targets, dtype=dtype)
"""
    (tmp_path / "own_moved.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    place = Place("arrays", tmp_path / "data")
    data = {"name": "own_moved:own", "place": str(place.folder / "a.npz"), "batch_size": 8}
    train(make_config(**{**place.config(2), "data": data, "evaluate": {}}), tmp_path / "run")
    assignment = f"data.place={moved(place, tmp_path)}/a.npz"
    resume(tmp_path / "run", last_step=3, assignments=(assignment,))
    assert verify.verify(str(tmp_path / "run"))[1] == []
