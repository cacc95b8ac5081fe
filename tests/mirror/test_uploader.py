"""The uploader against stores that fail, hang, or have another owner."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from stepctl.errors import ConfigError, StepctlError
from stepctl.mirror import names
from stepctl.mirror import uploader as uploaders
from stepctl.mirror.manifest import Owner
from stepctl.mirror.protocol import Claim, Deposed, OwnedByAnother, beat, claim_mirror
from stepctl.mirror.reading import read_newest
from stepctl.mirror.store import StoreUnavailable
from stepctl.mirror.transition import run
from stepctl.mirror.uploader import Delays, Uploader
from stepctl.mirror.writer import Checkpoint
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.mirror_status import read_status
from tests.support.mirrors import RUN_ID
from tests.support.object_store import MemoryStore

pytestmark = pytest.mark.training

FAST = Delays(first=0.01, longest=0.02)


class Store(MemoryStore):
    """A store that fails, or lets nothing pass, while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.n_failures = 0
        self.open = threading.Event()  # for uploads
        self.open.set()
        self.in_upload = threading.Event()
        self.uploaded: list[str] = []

    def _check(self) -> None:
        if self.fails:
            self.n_failures += 1
            raise StoreUnavailable("the cable is cut")

    def create(self, name: str, content: bytes) -> bool:
        self._check()
        return super().create(name, content)

    def put(self, name: str, content: bytes) -> None:
        self._check()
        super().put(name, content)

    def upload(self, name: str, file: BinaryIO, size: int, sha256: str) -> None:
        self.in_upload.set()
        self.open.wait()
        self._check()
        super().upload(name, file, size, sha256)
        self.uploaded.append(name)


class Trained:
    """A locked run directory in which checkpoints appear, without a run."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        (path / "lock").touch()
        self.directory = RunDirectory(path)
        self.directory.checkpoints.mkdir()
        (path / "config.yaml").write_text("seed: 0\n")

    def save(self, step: int) -> Checkpoint:
        """Save a checkpoint, and acknowledge it."""
        path = self.directory.checkpoints / f"step-{step:08d}.h5"
        path.write_text(f"checkpoint of {step}")
        checkpoint = Checkpoint(step, f"{step:064x}")
        self.directory.append_ledger("checkpoint", step=step, sha256=checkpoint.sha256)
        return checkpoint

    def prune(self, step: int) -> None:
        (self.directory.checkpoints / f"step-{step:08d}.h5").unlink()


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.open.set()  # ends the threads


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[Trained]:
    trained = Trained(tmp_path / "run")
    with trained.directory.lock():
        yield trained


def start(store: Store, trained: Trained, **options: Any) -> Uploader:
    settings: dict[str, Any] = {
        "owner": Owner.this_process(RUN_ID, beat_seconds=0.1),
        "keep_last": 100,
        "every": None,
        "restored": None,
        "check": lambda claim: None,
        "delays": FAST,
    }
    return Uploader(store, trained.directory, **settings | options)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ignore(message: str) -> None:
    """Take a message and say nothing."""


def mirrored_steps(store: Store) -> list[int]:
    """Return the steps of the commits that the mirror keeps, in ascending order."""
    newest = run(read_newest(), store)
    if newest is None:
        return []
    return sorted([newest.step, *(kept.step for kept in newest.previous)])


def states(trained: Trained) -> list[str]:
    ledger = trained.directory.read_ledger()
    return [event["state"] for event in ledger if event["event"] == "mirror"]


def test_each_checkpoint_is_mirrored(store: Store, trained: Trained) -> None:
    uploader = start(store, trained)
    uploader.wait_for_claim(20, ignore)
    uploader.begin()
    for step in (0, 5, 7):
        uploader.offer(trained.save(step))
        until(lambda step=step: mirrored_steps(store)[-1:] == [step])
    assert uploader.close(20) is None
    assert mirrored_steps(store) == [0, 5, 7]
    assert names.released(1) in store.objects
    status = read_status(trained.directory.folder)
    assert status is not None
    assert (status.epoch, status.step, status.sha256) == (1, 7, f"{7:064x}")


def test_nothing_is_read_before_the_segment_has_begun(store: Store, trained: Trained) -> None:
    uploader = start(store, trained, restored=trained.save(3))
    uploader.wait_for_claim(20, ignore)
    uploader.close(20)
    assert store.uploaded == []
    assert names.released(1) in store.objects


def test_a_newer_checkpoint_replaces_one_that_waits(store: Store, trained: Trained) -> None:
    store.open.clear()
    uploader = start(store, trained)
    uploader.begin()
    uploader.offer(trained.save(1))
    assert store.in_upload.wait(20)
    for step in (2, 3, 4):
        uploader.offer(trained.save(step))
    store.open.set()
    assert uploader.close(20) is None
    assert mirrored_steps(store) == [1, 4]


def test_every_counts_the_multiples_that_were_passed(store: Store, trained: Trained) -> None:
    uploader = start(store, trained, every=10)
    uploader.begin()
    found = []
    for step in (4, 8, 12, 16, 20, 23, 31):
        uploader.offer(trained.save(step))
        if step in (4, 12, 20, 31):
            found.append(step)
        until(lambda: mirrored_steps(store) == found)
    uploader.offer(trained.save(33))
    assert uploader.close(20) is None
    assert mirrored_steps(store) == [*found, 33]


def test_only_what_is_new_is_uploaded(store: Store, trained: Trained) -> None:
    uploader = start(store, trained)
    uploader.begin()
    uploader.offer(trained.save(1))
    until(lambda: mirrored_steps(store) == [1])
    assert len(store.uploaded) == 3  # checkpoint, config, ledger
    uploader.offer(trained.save(2))
    assert uploader.close(20) is None
    assert len(store.uploaded) == 5


def test_a_failing_store_is_reported_once(store: Store, trained: Trained) -> None:
    store.fails = True
    uploader = start(store, trained)
    heard: list[str] = []
    uploader.wait_for_claim(20, heard.append)
    (warning,) = heard
    assert "cannot be written (the cable is cut); training goes on" in warning
    uploader.begin()
    uploader.offer(trained.save(1))
    until(lambda: store.n_failures > 5)
    assert not uploader.has_news
    store.fails = False
    until(lambda: uploader.has_news)
    assert [text.endswith("works again") for text in uploader.take_messages()] == [True]
    assert uploader.close(20) is None
    assert states(trained) == ["failing", "working"]
    assert mirrored_steps(store) == [1]


def test_a_single_failure_is_not_reported(store: Store, trained: Trained) -> None:
    store.fails = True
    uploader = start(store, trained, delays=Delays(0.2, 0.2))
    until(lambda: store.n_failures == 1)
    store.fails = False
    uploader.wait_for_claim(20, pytest.fail)
    uploader.close(20)
    assert states(trained) == []


def test_the_end_waits_for_a_failing_store_no_longer_than_it_is_told(
    store: Store, trained: Trained
) -> None:
    uploader = start(store, trained)
    uploader.wait_for_claim(20, ignore)
    uploader.begin()
    uploader.offer(trained.save(1))
    until(lambda: mirrored_steps(store) == [1])
    store.fails = True
    uploader.offer(trained.save(2))
    started = time.monotonic()
    behind = uploader.close(0.3)
    assert 0.3 <= time.monotonic() - started < 5
    assert behind is not None
    assert (behind.mirrored, behind.step, behind.error) == (1, 2, "the cable is cut")


def test_the_end_does_not_wait_for_a_store_that_hangs(store: Store, trained: Trained) -> None:
    store.open.clear()
    uploader = start(store, trained)
    uploader.begin()
    uploader.offer(trained.save(1))
    assert store.in_upload.wait(20)
    behind = uploader.close(0.1)
    assert behind is not None
    assert (behind.mirrored, behind.step) == (None, 1)
    before = (trained.directory.ledger.read_bytes(), trained.directory.mirror.read_bytes())
    store.open.set()
    until(lambda: "mirror-upload" not in [thread.name for thread in threading.enumerate()])
    after = (trained.directory.ledger.read_bytes(), trained.directory.mirror.read_bytes())
    assert after == before


def test_a_long_wait_is_announced(
    store: Store, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploaders, "_ANNOUNCE_SECONDS", 0.05)
    store.open.clear()
    uploader = start(store, trained)
    uploader.begin()
    uploader.offer(trained.save(1))
    announced: list[float] = []

    def announce(seconds: float) -> None:
        announced.append(seconds)
        store.open.set()

    assert uploader.close(20, announce) is None
    assert announced == [19.95]


def test_ctrl_c_ends_the_wait(store: Store, trained: Trained) -> None:
    store.open.clear()
    uploader = start(store, trained)
    uploader.begin()
    uploader.offer(trained.save(1))
    assert store.in_upload.wait(20)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    assert uploader.close(60) is not None
    timer.join()


def test_a_store_that_hangs_does_not_stop_the_start(
    store: Store, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    create = store.create

    def hang(name: str, content: bytes) -> bool:
        hangs.wait()
        return create(name, content)

    monkeypatch.setattr(store, "create", hang)
    uploader = start(store, trained)
    heard: list[str] = []
    uploader.wait_for_claim(0.1, heard.append)
    assert ["no answer within 0.1 s" in text for text in heard] == [True]
    hangs.set()
    uploader.begin()
    uploader.offer(trained.save(1))
    assert uploader.close(20) is None
    assert states(trained) == ["failing", "working"]


def test_a_claim_that_is_refused_is_raised(store: Store, trained: Trained) -> None:
    def refuse(claim: Claim) -> None:
        raise ConfigError("an older copy")

    uploader = start(store, trained, check=refuse)
    with pytest.raises(ConfigError, match="an older copy"):
        uploader.wait_for_claim(20, ignore)
    uploader.close(20)
    assert names.released(1) in store.objects
    assert states(trained) == []


def test_a_claim_that_is_refused_later_ends_the_uploads(store: Store, trained: Trained) -> None:
    def refuse(claim: Claim) -> None:
        raise ConfigError("an older copy")

    store.fails = True
    uploader = start(store, trained, check=refuse)
    uploader.wait_for_claim(20, ignore)
    uploader.begin()
    store.fails = False
    until(lambda: states(trained) == ["failing", "refused"])
    uploader.offer(trained.save(1))
    assert uploader.deposed is None
    behind = uploader.close(20)
    assert behind is not None
    assert behind.error == "an older copy"
    assert "training goes on without a mirror" in uploader.take_messages()[-1]


def test_the_status_of_an_earlier_segment_is_kept(store: Store, trained: Trained) -> None:
    uploader = start(store, trained)
    uploader.begin()
    uploader.offer(trained.save(1))
    assert uploader.close(20) is None
    before = read_status(trained.directory.folder)
    uploader = start(store, trained, restored=trained.save(2))
    uploader.wait_for_claim(20, ignore)
    uploader.close(20)
    assert read_status(trained.directory.folder) == before
    uploader = start(store, trained, restored=trained.save(2))
    uploader.begin()
    assert uploader.close(20) is None
    after = read_status(trained.directory.folder)
    assert after is not None
    assert (after.epoch, after.seq, after.step, after.sha256) == (3, 1, 2, f"{2:064x}")


def live(store: Store, claim: Claim, stopped: threading.Event) -> threading.Thread:
    """Beat as another process does."""

    def act() -> None:
        count = 0
        while not stopped.wait(0.005):
            count += 1
            run(beat(claim, count), store)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_another_owner_is_found_when_the_store_works_again(store: Store, trained: Trained) -> None:
    store.fails = True
    uploader = start(store, trained)
    uploader.wait_for_claim(20, ignore)
    uploader.begin()
    store.fails = False
    other = run(claim_mirror(Owner.this_process(RUN_ID, beat_seconds=0.05), take_over=True), store)
    stopped = threading.Event()
    thread = live(store, other, stopped)
    try:
        until(lambda: uploader.has_news and uploader.deposed is not None)
    finally:
        stopped.set()
        thread.join()
    assert isinstance(uploader.deposed, OwnedByAnother | Deposed)
    uploader.offer(trained.save(1))
    assert uploader.close(20) is not None
    assert states(trained)[-1] == "lost"
    assert mirrored_steps(store) == []


def test_an_idle_owner_finds_out_that_it_was_replaced(store: Store, trained: Trained) -> None:
    uploader = start(store, trained)
    uploader.wait_for_claim(20, ignore)
    uploader.begin()
    run(claim_mirror(Owner.this_process(RUN_ID), take_over=True), store)
    until(lambda: uploader.deposed is not None)
    assert uploader.has_news
    uploader.close(20)
    assert states(trained) == ["lost"]


def test_a_checkpoint_that_was_pruned_is_replaced_by_a_newer_one(
    store: Store, trained: Trained
) -> None:
    store.fails = True
    uploader = start(store, trained)
    uploader.wait_for_claim(20, ignore)
    uploader.begin()
    uploader.offer(trained.save(1))
    uploader.offer(trained.save(2))
    trained.prune(1)
    store.fails = False
    assert uploader.close(20) is None
    assert mirrored_steps(store) == [2]


def test_a_checkpoint_that_is_gone_is_an_error(store: Store, trained: Trained) -> None:
    uploader = start(store, trained)
    uploader.wait_for_claim(20, ignore)
    uploader.begin()
    checkpoint = trained.save(1)
    trained.prune(1)
    uploader.offer(checkpoint)
    behind = uploader.close(0.2)
    assert behind is not None
    assert behind.error == "the checkpoint of step 1 is gone"


def test_an_unexpected_error_does_not_end_the_uploads(
    store: Store, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = store.upload
    errors = [ZeroDivisionError("1/0"), StepctlError("a disk"), OSError("another")]

    def fail(*arguments: Any) -> None:
        if errors:
            raise errors.pop()
        upload(*arguments)

    monkeypatch.setattr(store, "upload", fail)
    uploader = start(store, trained)
    uploader.begin()
    uploader.offer(trained.save(1))
    until(lambda: mirrored_steps(store) == [1])
    assert uploader.close(20) is None
    assert states(trained) == ["failing", "working"]
