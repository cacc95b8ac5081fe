"""Run ids in the ledger and in checkpoints; checkpoints of another run are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl import api
from stepctl.checkpoint import codec
from stepctl.errors import CheckpointError, Exit
from stepctl.reports.inspect import inspect_path
from stepctl.reports.replay import replay
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.prune import prune
from stepctl.runs.records import read_records
from tests.support.checkpoints import refused, small_state
from tests.support.messages import without_paths
from tests.support.runs import RUN_ID, file_bytes, forked, make_config, resume, rows, silent, train

VERSION_1 = (
    Path(__file__).parents[1] / "support" / "version_1" / "run"
)  # made by the last commit whose format had no run_id


def small(**sections: object) -> object:
    checkpoint = {"every": 2, "keep_last": None}
    return make_config(
        **{
            "model": {"name": "linear"},
            "stop": {"last_step": 6},
            "checkpoint": checkpoint,
            **sections,
        }
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one config."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        train(small(), folder / name)
    return folder


@pytest.fixture
def copies(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def first_line(path: Path) -> dict[str, object]:
    return json.loads((path / "ledger.jsonl").read_text().splitlines()[0])


def file(path: Path, step: int) -> Path:
    return path / "checkpoints" / f"step-{step:08d}.h5"


def run_id(path: Path) -> str | None:
    with codec.Reader(path) as reader:
        return reader.header.run_id


@pytest.mark.training
def test_each_run_has_an_id_of_its_own_in_the_ledger_and_in_each_checkpoint(runs: Path) -> None:
    ids = [first_line(runs / name)["run_id"] for name in ("one", "two")]
    assert len(set(ids)) == 2
    for name, known in zip(("one", "two"), ids, strict=True):
        assert {run_id(path) for path in (runs / name / "checkpoints").iterdir()} == {known}
        assert "run_id" not in (runs / name / "config.yaml").read_text()
        assert api.load_checkpoint(runs / name).run_id == known
        assert inspect_path(str(runs / name), "*")["contents"]["run_id"] == known


@pytest.mark.training
def test_the_same_state_of_one_run_is_the_same_bytes(copies: Path) -> None:
    shutil.copytree(copies / "one", copies / "three")
    shutil.move(copies / "three", copies / "other" / "one")  # a checkpoint holds the run's name too
    for path in (copies / "one", copies / "other" / "one"):
        resume(path, last_step=9)
    assert file(copies / "one", 9).read_bytes() == file(copies / "other" / "one", 9).read_bytes()
    assert verify(str(copies / "other" / "one"))[1] == []


@pytest.mark.process
def test_a_fork_draws_an_id_of_its_own(copies: Path) -> None:
    forked(copies / "one", copies / "child", 4)
    known = first_line(copies / "child")["run_id"]
    assert known not in (first_line(copies / "one")["run_id"], None)
    assert run_id(file(copies / "child", 4)) == known
    resume(copies / "child", last_step=8)
    assert run_id(file(copies / "child", 8)) == known
    assert RunDirectory(copies / "one").read_ledger().run_id == first_line(copies / "one")["run_id"]
    assert verify(str(copies / "child"))[1] == verify(str(copies / "one"))[1] == []


@pytest.mark.training
def test_a_checkpoint_of_another_run_is_passed_over_for_an_older_own_one(copies: Path) -> None:
    expected = resume(Path(shutil.copytree(copies / "one", copies / "expected")), last_step=10)
    resume(copies / "two", last_step=8)
    shutil.copy(file(copies / "two", 8), file(copies / "one", 8))
    said: list[str] = []
    state = resume(copies / "one", last_step=10, say=said.append)
    assert said[0].startswith("step-00000008.h5: belongs to another run (run_id ")
    assert said[0].endswith("; using step-00000006.h5")
    assert state.same_bits(expected)
    assert rows(copies / "one") == rows(copies / "expected")


def without_run_ids(text: str, **paths: object) -> str:
    return without_paths(text, (r"\b[0-9a-f]{32}\b",), **paths)


OPENED_BY = {
    "resume": lambda path: resume(path, from_step=4),
    "fork": lambda path: forked(path, path.parent / "child", 4),
    "replay": lambda path: list(replay(read_records(RunDirectory(path)), 2, 4, silent)),
}


@pytest.mark.training
@pytest.mark.parametrize("use", OPENED_BY.values(), ids=OPENED_BY.keys())
def test_a_requested_checkpoint_of_another_run_is_refused(
    use: object, copies: Path, snapshot: SnapshotAssertion
) -> None:
    shutil.copy(file(copies / "two", 4), file(copies / "one", 4))
    with pytest.raises(CheckpointError) as caught:
        use(copies / "one")  # type: ignore[operator]
    assert without_run_ids(str(caught.value), HERE=copies) == snapshot
    assert (caught.value.code, caught.value.exit_code) == ("run", Exit.NO_CHECKPOINT)
    assert ("run", "step-00000004.h5") in {
        (found.code, found.file) for found in verify(str(copies / "one"))[1]
    }


@pytest.mark.training
def test_without_a_checkpoint_of_the_run_itself_the_exit_code_is_3(
    copies: Path, snapshot: SnapshotAssertion
) -> None:
    for path in (copies / "one" / "checkpoints").iterdir():
        path.unlink()
    shutil.copy(file(copies / "two", 6), file(copies / "one", 6))
    with pytest.raises(CheckpointError, match="no usable checkpoint") as caught:
        resume(copies / "one", last_step=9)
    assert caught.value.exit_code == Exit.NO_CHECKPOINT
    with pytest.raises(CheckpointError) as caught:
        prune(RunDirectory(copies / "one"), {}, silent, dry_run=False)
    assert without_run_ids(str(caught.value), HERE=copies) == snapshot


@pytest.mark.training
def test_a_run_whose_ledger_is_lost_resumes_under_its_id(copies: Path) -> None:
    known = first_line(copies / "one")["run_id"]
    (copies / "one" / "ledger.jsonl").unlink()
    resume(copies / "one", last_step=8)
    assert RunDirectory(copies / "one").read_ledger().run_id == known
    assert run_id(file(copies / "one", 8)) == known


@pytest.mark.parametrize("run_id", ["", "x" * 32, RUN_ID.upper(), RUN_ID + "0", RUN_ID[:-1]])
def test_an_id_that_is_not_32_hexadecimal_digits_is_refused(run_id: str, tmp_path: Path) -> None:
    image = codec.encode(
        small_state(), run="moon", run_id=run_id, config="seed: 0\n", numerics="{}"
    )
    path = tmp_path / "step-00000007.h5"
    path.write_bytes(file_bytes(image))
    error = refused(path)
    assert error.code == "attribute"
    assert "run_id" in str(error)


# --- format version 1, which has no run_id


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VERSION_1, tmp_path / "run"))


def test_a_run_of_version_1_is_read(version_1: Path) -> None:
    assert verify(str(version_1))[1] == []
    facts = inspect_path(str(version_1), "*")["contents"]
    assert (facts["global_step"], facts["run_id"], facts["run"]) == (8, None, "run")
    assert api.load_checkpoint(file(version_1, 4)).arrays["params/dense0/weight"].shape == (64, 4)


@pytest.mark.training
def test_a_run_of_version_1_resumes_and_gets_an_id(version_1: Path) -> None:
    resume(version_1, last_step=12)
    known = RunDirectory(version_1).read_ledger().run_id
    assert known is not None
    assert [run_id(file(version_1, step)) for step in (8, 12)] == [None, known]
    resume(version_1, from_step=8, last_step=16)
    assert run_id(file(version_1, 16)) == known
    assert RunDirectory(version_1).read_ledger().run_id == known
    assert verify(str(version_1))[1] == []


@pytest.mark.training
def test_a_file_of_version_1_that_the_ledger_does_not_acknowledge_is_passed_over(
    version_1: Path,
    snapshot: SnapshotAssertion,
) -> None:
    lines = (version_1 / "ledger.jsonl").read_text().splitlines(keepends=True)
    (version_1 / "ledger.jsonl").write_text(
        "".join(line for line in lines if "step-00000008.h5" not in line)
    )
    assert ("run", "step-00000008.h5") in {
        (found.code, found.file) for found in verify(str(version_1))[1]
    }
    said: list[str] = []
    resume(version_1, last_step=5, say=said.append)
    assert said[0] == snapshot


@pytest.mark.training
def test_a_file_of_version_1_from_another_run_is_refused_by_a_run_of_version_2(
    copies: Path,
    snapshot: SnapshotAssertion,
) -> None:
    shutil.copy(file(VERSION_1, 8), file(copies / "one", 8))
    with pytest.raises(CheckpointError) as caught:
        resume(copies / "one", from_step=8)
    assert str(caught.value) == snapshot
    assert caught.value.code == "run"


def test_a_version_that_differs_from_the_first_bytes_is_refused(version_1: Path) -> None:
    data = file(version_1, 8).read_bytes()
    file(version_1, 8).write_bytes(
        data.replace(b"stepctl-checkpoint 1\n", b"stepctl-checkpoint 2\n", 1)
    )
    assert refused(file(version_1, 8)).code == "attribute"
