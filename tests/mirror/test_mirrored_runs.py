"""Runs with a mirror: a blank machine continues them with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stepctl
from stepctl.cli.main import cli
from stepctl.config.model import Config
from stepctl.errors import (
    CheckpointError,
    ConfigError,
    RunExistsError,
    RunInUseError,
    StepctlError,
)
from stepctl.hooks.base import Hook
from stepctl.mirror import fetch
from stepctl.mirror.claimed import pulled_run
from stepctl.mirror.manifest import Manifest, Owner
from stepctl.mirror.protocol import Claim, Deposed, OwnedByAnother, claim_mirror
from stepctl.mirror.store import open_store
from stepctl.mirror.transition import run
from stepctl.programs.base import Metrics
from stepctl.reports.inspect import inspect_path
from stepctl.reports.mirror import newest_commit, verify_mirror
from stepctl.reports.verify import verify
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.mirror_status import read_status
from stepctl.runs.open import create_run
from stepctl.runs.push import push
from stepctl.state.train_state import TrainState
from tests.support.runs import content, make_config, resume, rows, silent, train

pytestmark = pytest.mark.training


def url(folder: Path) -> str:
    """Return the URL of the mirror in a folder."""
    return f"file://{folder}/store"


def mirrored(folder: Path, **sections: Any) -> Config:
    """Return the config of a run with a mirror in the folder."""
    section = {"url": url(folder), "wait_at_stop": 20, **sections.pop("mirror", {})}
    return make_config(**{"checkpoint": {"every": 5}, **sections}, mirror=section)


def newest(folder: Path) -> Manifest:
    """Return the newest commit of the mirror in a folder."""
    found = fetch.read_mirror(open_store(url(folder)))
    assert found is not None
    return found


def resume_fetched(folder: Path, path: Path, say: Any = silent, **options: Any) -> TrainState:
    """Fetch the run of the mirror into a new directory, and resume it."""
    step = options.get("from_step")
    with pulled_run(url(folder), RunDirectory(path), say, take_over=False, step=step) as claimed:
        assert claimed is not None
        return resume(path, say=say, claimed=claimed, **options)


def own(folder: Path, run_id: str) -> Claim:
    """Own the mirror in a folder, as another process does."""
    owner = Owner.this_process(run_id)
    return run(claim_mirror(owner, take_over=True), open_store(url(folder)))


def run_id_of(path: Path) -> str:
    run_id = RunDirectory(path).read_ledger().run_id
    assert run_id is not None
    return run_id


def assert_same(path: Path, other: Path, step: int) -> None:
    """Compare the checkpoints of a step, and the rows; their configs name different mirrors."""
    found = content(path / "checkpoints" / f"step-{step:08d}.h5")
    expected = content(other / "checkpoints" / f"step-{step:08d}.h5")
    for contents in (found, expected):
        del contents["config"], contents["@run"]
    assert found == expected
    assert rows(path) == rows(other)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 40 steps without a mirror."""
    path = tmp_path_factory.mktemp("once") / "run"
    train(make_config(checkpoint={"every": 5}), path)
    return path


def test_a_blank_machine_continues_with_the_same_bits(tmp_path: Path, once: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 23}), tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    resume_fetched(tmp_path, tmp_path / "there", last_step=40)
    assert_same(tmp_path / "there", once, 40)
    _, problems = verify(str(tmp_path / "there"))
    assert problems == []
    commits, damaged = verify_mirror(open_store(url(tmp_path)))
    assert damaged == []
    assert commits[0]["step"] == newest(tmp_path).step == 40
    assert len(commits) == 3


def test_a_finished_run_is_mirrored_to_its_last_line(tmp_path: Path) -> None:
    train(mirrored(tmp_path), tmp_path / "run")
    fetched = RunDirectory(tmp_path / "fetched")
    fetch.pull_newest(open_store(url(tmp_path)), fetched)
    for name in ("ledger.jsonl", "metrics.jsonl", "config.yaml"):
        original = (tmp_path / "run" / name).read_bytes()
        assert (tmp_path / "fetched" / name).read_bytes().startswith(original), name
    (added,) = (
        (tmp_path / "fetched" / "ledger.jsonl")
        .read_text()
        .splitlines()[len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) :]
    )
    event = json.loads(added)
    assert (event["event"], event["missing"]) == ("prune", True)
    assert 40 not in event["steps"]


def test_the_first_and_the_last_step_are_mirrored_whatever_every_is(tmp_path: Path) -> None:
    config = mirrored(tmp_path, mirror={"every": 1000, "keep_last": 10})
    train(config, tmp_path / "run")
    assert [newest(tmp_path).step, *(kept.step for kept in newest(tmp_path).previous)] == [40, 0]


def test_inspect_shows_how_far_the_mirror_is(tmp_path: Path) -> None:
    train(mirrored(tmp_path), tmp_path / "run")
    state = inspect_path(str(tmp_path / "run"), "-")["contents"]["mirror"]
    assert state == {
        "url": url(tmp_path),
        "step": 40,
        "behind_steps": 0,
        "behind_seconds": 0.0,
        "error": None,
    }


def test_a_table_of_the_rows_is_made_again(tmp_path: Path) -> None:
    config = mirrored(tmp_path, log={"every": 7, "csv": True}, stop={"last_step": 23})
    train(config, tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    resume_fetched(tmp_path, tmp_path / "there", last_step=40)
    lines = (tmp_path / "there" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows(tmp_path / "there"))


def test_the_step_of_a_mirror_takes_few_bytes(tmp_path: Path) -> None:
    train(mirrored(tmp_path, checkpoint={"every": 1}), tmp_path / "run")
    store = open_store(url(tmp_path))
    n_bytes = 0
    get = store.get

    class Counting:
        """Counts the bytes that are read."""

        url = store.url
        list = store.list

        def get(self, name: str, max_bytes: int) -> bytes | None:
            nonlocal n_bytes
            content = get(name, max_bytes)
            n_bytes += len(content or b"")
            return content

    assert newest_commit(Counting()).step == 40  # type: ignore[arg-type]
    assert 0 < n_bytes < 100_000


# --- a store that does not work


def block(folder: Path) -> None:
    """Make a file of the folder in which the mirror is, so that nothing can be written there."""
    (folder / "store").write_text("")


def test_training_goes_on_without_the_store_and_push_fills_it_later(
    tmp_path: Path, once: Path
) -> None:
    block(tmp_path)
    heard: list[str] = []
    config = mirrored(tmp_path, mirror={"wait_at_stop": 0})
    with create_run(config, RunDirectory(tmp_path / "run"), heard.append) as segment:
        outcome = segment.train()
    assert outcome.step == 40
    assert [line.startswith("warning: ") for line in heard] == [True, False], heard
    assert "cannot be written" in heard[0]
    assert "step 40 is not mirrored" in heard[1]
    assert "stepctl push" in heard[1]
    assert_same(tmp_path / "run", once, 40)
    state = inspect_path(str(tmp_path / "run"), "-")["contents"]["mirror"]
    assert state is not None
    assert (state["step"], state["behind_steps"]) == (None, 40)
    assert state["behind_seconds"] > 0
    assert state["error"]
    events = RunDirectory(tmp_path / "run").read_ledger()
    assert [event["state"] for event in events if event["event"] == "mirror"] == ["failing"]

    (tmp_path / "store").unlink()
    push(RunDirectory(tmp_path / "run"), url(tmp_path), silent)
    assert newest(tmp_path).step == 40
    resume_fetched(tmp_path, tmp_path / "there", last_step=41)


def test_the_resume_of_a_finished_run_mirrors_what_is_missing(tmp_path: Path) -> None:
    train(mirrored(tmp_path), tmp_path / "run")
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "run" / "mirror.json").unlink()
    done = CliRunner().invoke(cli, ["resume", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert newest(tmp_path).step == 40


class Unblock(Hook):
    """Makes the store work at a step, and waits until something is mirrored."""

    name = "unblock"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == 20:
            (self._folder / "store").unlink()
            until(self._has_step)

    def _has_step(self) -> bool:
        status = read_status(RunDirectory(self._folder / "run").folder)
        return status is not None and status.step is not None


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_line_says_that_the_store_fails_and_one_that_it_works_again(tmp_path: Path) -> None:
    block(tmp_path)
    heard: list[str] = []
    hook = Unblock(tmp_path)
    directory = RunDirectory(tmp_path / "run")
    with create_run(mirrored(tmp_path), directory, heard.append, (hook,)) as segment:
        segment.train()
    assert [line.startswith("warning: ") for line in heard] == [True, False], heard
    assert heard[1].endswith("the mirror works again")
    states = [event["state"] for event in directory.read_ledger() if event["event"] == "mirror"]
    assert states == ["failing", "working"]
    assert newest(tmp_path).step == 40
    status = read_status(directory.folder)
    assert status is not None
    assert (status.step, status.error) == (40, None)


# --- owners


def test_a_new_run_does_not_use_the_mirror_of_another(tmp_path: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 3}), tmp_path / "run")
    with pytest.raises(RunExistsError, match="stepctl resume file://"):
        train(mirrored(tmp_path), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_does_not_continue_in_the_mirror_of_another(tmp_path: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 3}), tmp_path / "run")
    train(make_config(stop={"last_step": 3}), tmp_path / "other")
    before = (tmp_path / "other" / "ledger.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="mirror of another run"):
        resume(tmp_path / "other", last_step=5, assignments=(f"mirror={{url: '{url(tmp_path)}'}}",))
    assert (tmp_path / "other" / "ledger.jsonl").read_bytes() == before


def test_a_mirror_that_another_process_uses_is_refused_before_anything_changes(
    tmp_path: Path,
) -> None:
    train(mirrored(tmp_path, stop={"last_step": 3}), tmp_path / "run")
    owner = Owner.this_process(run_id_of(tmp_path / "run"), beat_seconds=0.2)
    store = open_store(url(tmp_path))
    claim = run(claim_mirror(owner), store)
    stopped = threading.Event()

    def live() -> None:
        from stepctl.mirror.protocol import beat

        count = 0
        while not stopped.wait(0.02):
            count += 1
            run(beat(claim, count), store)

    thread = threading.Thread(target=live)
    thread.start()
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    heard: list[str] = []
    try:
        with pytest.raises(OwnedByAnother, match=f"process {os.getpid()} on "):
            resume(tmp_path / "run", last_step=5, say=heard.append)
    finally:
        stopped.set()
        thread.join()
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before
    assert any("waiting 0.4 s" in line for line in heard)
    resume(tmp_path / "run", last_step=5, take_over=True)
    assert newest(tmp_path).step == 5


class TakeOver(Hook):
    """Another process takes the mirror over at a step."""

    name = "take over"

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._step = step

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self._step:
            own(self._folder, run_id_of(self._folder / "run"))
        if state.counters.global_step > self._step:
            time.sleep(0.01)  # the uploader finds out at its next commit


def test_a_segment_whose_mirror_was_taken_over_saves_and_stops(tmp_path: Path) -> None:
    config = mirrored(tmp_path, stop={"last_step": 2000})
    heard: list[str] = []
    directory = RunDirectory(tmp_path / "run")
    hooks = (TakeOver(tmp_path, 10),)
    with (
        pytest.raises(Deposed, match="taken over by process"),
        create_run(config, directory, heard.append, hooks) as segment,
    ):
        segment.train()
    ledger = directory.read_ledger()
    end = ledger.events[-1]
    assert end["event"] == "end"
    assert end["step"] in ledger.acknowledged.values()
    assert 10 <= end["step"] < 2000
    assert any("is saved" in line for line in heard)
    assert [event["state"] for event in ledger if event["event"] == "mirror"] == ["lost"]
    assert issubclass(Deposed, RunInUseError)
    assert newest(tmp_path).step <= 15


def test_an_older_copy_of_a_run_is_not_resumed(tmp_path: Path, once: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 10}), tmp_path / "here")
    resume_fetched(tmp_path, tmp_path / "there", last_step=20)
    before = (tmp_path / "here" / "ledger.jsonl").read_bytes()
    with pytest.raises(ConfigError) as refused:
        resume(tmp_path / "here", last_step=40)
    assert "at step 10" in str(refused.value)
    assert "at step 20" in str(refused.value)
    assert (tmp_path / "here" / "ledger.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="trained elsewhere"):
        push(RunDirectory(tmp_path / "here"), url(tmp_path), silent)
    assert newest(tmp_path).step == 20

    resume(tmp_path / "here", last_step=40, from_step=10)
    assert_same(tmp_path / "here", once, 40)
    assert newest(tmp_path).step == 40
    assert verify_mirror(open_store(url(tmp_path)))[1] == []


def test_a_run_that_is_ahead_of_its_mirror_catches_up(tmp_path: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 10}), tmp_path / "run")
    resume(tmp_path / "run", last_step=20, assignments=("mirror=null",))
    assert newest(tmp_path).step == 10
    resume(
        tmp_path / "run",
        last_step=21,
        assignments=(f"mirror={{url: '{url(tmp_path)}', wait_at_stop: 20}}",),
    )
    assert newest(tmp_path).step == 21


def test_going_back_takes_the_mirror_back(tmp_path: Path, once: Path) -> None:
    config = mirrored(
        tmp_path, checkpoint={"every": 5, "keep_last": None}, mirror={"keep_last": 100}
    )
    train(config, tmp_path / "run")
    resume(tmp_path / "run", from_step=10, last_step=12)
    assert newest(tmp_path).step == 12
    shutil.rmtree(tmp_path / "run")
    resume_fetched(tmp_path, tmp_path / "there", last_step=40)
    assert_same(tmp_path / "there", once, 40)


def test_an_earlier_commit_is_fetched_by_its_step(tmp_path: Path) -> None:
    train(mirrored(tmp_path, mirror={"every": 1000}, stop={"last_step": 9}), tmp_path / "run")
    with pytest.raises(CheckpointError, match="available steps: 9, 0"):
        resume_fetched(tmp_path, tmp_path / "there", from_step=3)
    resume_fetched(tmp_path, tmp_path / "there", from_step=0, last_step=5)
    assert newest(tmp_path).step == 5


# --- fetching


def damage(folder: Path, name: str) -> None:
    path = folder / "store" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_leads_to_the_commit_before(tmp_path: Path, once: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 20}), tmp_path / "here")
    damage(tmp_path, newest(tmp_path).contents.checkpoint.name)
    heard: list[str] = []
    resume_fetched(tmp_path, tmp_path / "there", heard.append, last_step=40)
    assert any("is damaged" in line for line in heard)
    assert_same(tmp_path / "there", once, 40)
    assert verify_mirror(open_store(url(tmp_path)))[1] == []


def test_verify_finds_every_damaged_object_and_push_repairs_them(tmp_path: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 20}, mirror={"keep_last": 1}), tmp_path / "run")
    names = {stored.name for stored in newest(tmp_path).contents.objects()}
    for name in names:
        damage(tmp_path, name)
    commits, problems = verify_mirror(open_store(url(tmp_path)))
    assert commits == []
    assert {problem.file for problem in problems} == names
    with pytest.raises(CheckpointError, match="no commit of the mirror is whole"):
        fetch.pull_newest(open_store(url(tmp_path)), RunDirectory(tmp_path / "there"))
    push(RunDirectory(tmp_path / "run"), url(tmp_path), silent, upload_all=True)
    assert verify_mirror(open_store(url(tmp_path)))[1] == []


def test_a_missing_object_is_found_and_pushed_again(tmp_path: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 20}, mirror={"keep_last": 1}), tmp_path / "run")
    (tmp_path / "store" / newest(tmp_path).contents.checkpoint.name).unlink()
    assert len(verify_mirror(open_store(url(tmp_path)))[1]) == 1
    push(RunDirectory(tmp_path / "run"), url(tmp_path), silent)
    assert verify_mirror(open_store(url(tmp_path)))[1] == []


@pytest.mark.parametrize("failing", ["config.yaml", "step-00000023.h5", "ledger.jsonl"])
def test_an_unfinished_pull_is_no_run_and_is_completed(
    failing: str, tmp_path: Path, once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(mirrored(tmp_path, stop={"last_step": 23}), tmp_path / "here")
    path = tmp_path / "there"
    fetch_file = fetch._fetch

    def fail(store: Any, objects: Any, folder: Any, name: str) -> None:
        if name == failing:
            raise StepctlError("the disk is gone")
        fetch_file(store, objects, folder, name)

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "_fetch", fail)
        with pytest.raises(StepctlError, match="the disk is gone"):
            fetch.pull_newest(open_store(url(tmp_path)), RunDirectory(path))
    assert not RunDirectory(path).holds_run()
    with pytest.raises(ConfigError, match="was not fetched to the end; complete it with"):
        resume(path)
    resume_fetched(tmp_path, path, last_step=40)
    assert_same(path, once, 40)
    assert not (path / "pull-unfinished").exists()


def test_a_new_run_may_take_the_place_of_an_unfinished_pull(
    tmp_path: Path, once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(mirrored(tmp_path, stop={"last_step": 23}), tmp_path / "here")
    path = tmp_path / "there"

    def fail(self: RunDirectory, event: str, **facts: Any) -> None:
        raise StepctlError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "append_ledger", fail)
        with pytest.raises(StepctlError, match="killed"):
            fetch.pull_newest(open_store(url(tmp_path)), RunDirectory(path))
    assert (path / "checkpoints" / "step-00000023.h5").exists()
    train(make_config(checkpoint={"every": 5}), path)
    assert_same(path, once, 40)


def test_a_pull_needs_a_directory_of_its_own(tmp_path: Path) -> None:
    train(mirrored(tmp_path, stop={"last_step": 3}), tmp_path / "run")
    with pytest.raises(RunExistsError):
        fetch.pull_newest(open_store(url(tmp_path)), RunDirectory(tmp_path / "run"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="not part of a run"):
        fetch.pull_newest(open_store(url(tmp_path)), RunDirectory(tmp_path / "mine"))
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


# --- scripts, forks


def walk(folder: Path, path: Path, last_step: int, mirror: object) -> Any:
    """Make the steps of a random walk with a series, as a script does; return its state."""
    state: dict[str, Any] = {"x": np.zeros(3)}
    with stepctl.loop(
        path,
        state,
        last_step=last_step,
        checkpoint_every=5,
        mirror=mirror,  # type: ignore[arg-type]
    ) as walking:
        for _ in walking:
            state["x"] = state["x"] + walking.rng("noise").standard_normal(3)
            walking.append("x", state["x"])
            walking.log(norm=float(np.linalg.norm(state["x"])))
    return state["x"]


def test_a_script_continues_on_a_blank_machine(tmp_path: Path) -> None:
    expected = walk(tmp_path, tmp_path / "once", 40, None)
    walk(tmp_path, tmp_path / "here", 23, url(tmp_path))
    shutil.rmtree(tmp_path / "here")
    found = walk(tmp_path, tmp_path / "there", 40, {"url": url(tmp_path), "keep_last": 1})
    assert found.tobytes() == expected.tobytes()
    series = [stepctl.load_series(tmp_path / name, "x") for name in ("once", "there")]
    assert np.asarray(series[0]).tobytes() == np.asarray(series[1]).tobytes()
    norms = [[row["norm"] for row in rows(tmp_path / name)] for name in ("once", "there")]
    assert norms[0] == norms[1]
    assert verify(str(tmp_path / "there"))[1] == []
    assert newest(tmp_path).previous == ()


def test_the_mirror_of_a_script_is_a_url(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mirror is an int; give a URL"):
        walk(tmp_path, tmp_path / "run", 1, 7)
    with pytest.raises(ConfigError, match="not a URL of a store"):
        walk(tmp_path, tmp_path / "run", 1, "http://host/x")
    assert not (tmp_path / "run").exists()
