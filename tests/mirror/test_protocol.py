"""Claiming, committing, reading and collecting garbage on a store in memory, without faults.

`test_protocol_model.py` has the faults.
"""

import contextlib
import dataclasses
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepctl.errors import CheckpointError, ConfigError, Exit
from stepctl.mirror import names
from stepctl.mirror.names import Key
from stepctl.mirror.protocol import (
    Claim,
    Deposed,
    OwnedByAnother,
    beat,
    claim_mirror,
    collect_garbage,
    commit,
    release,
)
from stepctl.mirror.reading import read_kept, read_newest, read_owner
from stepctl.mirror.store import StoreUnavailable, open_store
from stepctl.mirror.transition import run
from tests.support.mirrors import commit_step, is_whole, make_contents, make_owner, upload_bytes
from tests.support.object_store import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def take_over(store: MemoryStore, number: int) -> Claim:
    return run(claim_mirror(make_owner(number), take_over=True), store)


def steps_of(store: MemoryStore) -> list[int]:
    newest = run(read_newest(), store)
    if newest is None:
        return []
    return [manifest.step for manifest in (newest, *run(read_kept(newest), store))]


def test_an_empty_mirror(store: MemoryStore) -> None:
    assert run(read_newest(), store) is None
    assert run(read_owner(), store) is None
    claim = run(claim_mirror(make_owner(1)), store)
    assert claim == Claim(1, make_owner(1), None)
    assert list(store.objects) == [names.owner(1)]  # no probe is left


def test_commits_are_read_newest_first(store: MemoryStore) -> None:
    claim = take_over(store, 1)
    for step in (0, 10, 20, 30):
        claim = commit_step(claim, store, step)
    assert steps_of(store) == [30, 20, 10]
    newest = run(read_newest(), store)
    assert newest == claim.newest
    assert newest is not None
    assert newest.key == Key(1, 4)
    assert newest.nonce == make_owner(1).nonce
    assert is_whole(newest, store)


def test_garbage_is_what_the_newest_commit_does_not_keep(store: MemoryStore) -> None:
    claim = take_over(store, 1)
    for step in (0, 10, 20, 30):
        claim = commit_step(claim, store, step)
    upload_bytes(claim, store, b"for the next commit")
    n_before = len(store.objects)
    # the manifest of step 0, its checkpoint and its config; its chunk of the ledger is in use
    assert run(collect_garbage(claim), store) == 3
    assert len(store.objects) == n_before - 3
    assert run(collect_garbage(claim), store) == 0
    newest = claim.newest
    assert newest is not None
    assert all(is_whole(manifest, store) for manifest in (newest, *run(read_kept(newest), store)))
    assert names.data(claim.next_key, "") in "".join(store.objects)


def test_a_successor_continues_and_the_owner_before_is_deposed(store: MemoryStore) -> None:
    first = commit_step(take_over(store, 1), store, 10)
    contents = make_contents(first, store, 20)
    second = take_over(store, 2)
    assert second.epoch == 2
    assert second.newest == first.newest
    with pytest.raises(Deposed, match="taken over by process 2 on host2") as caught:
        run(commit(first, contents, keep_last=3), store)
    assert caught.value.exit_code == Exit.IN_USE
    with pytest.raises(Deposed):
        run(beat(first, 1), store)
    n_objects = len(store.objects)
    with pytest.raises(Deposed):
        run(collect_garbage(first), store)
    assert len(store.objects) == n_objects

    second = commit_step(second, store, 15)
    assert steps_of(store) == [15, 10]  # without the commit that the deposed owner made
    run(collect_garbage(second), store)
    assert names.log(Key(1, 2)) not in store.objects


def test_a_living_owner_is_left_alone(store: MemoryStore) -> None:
    claim = take_over(store, 1)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        run(beat(claim, len(waits)), store)

    lines: list[str] = []
    with pytest.raises(OwnedByAnother, match="process 1 on host1") as caught:
        run(claim_mirror(make_owner(2), announce=lines.append), store, wait)
    assert caught.value.exit_code == Exit.IN_USE
    assert waits == [5.0]
    assert lines == [
        "memory://test: in use by process 1 on host1; waiting 20 s to see whether it is alive"
    ]
    assert names.owner(2) not in store.objects


def test_a_silent_owner_is_replaced_after_two_intervals(store: MemoryStore) -> None:
    run(beat(take_over(store, 1), 7), store)
    waits: list[float] = []
    claim = run(claim_mirror(make_owner(2)), store, waits.append)
    assert claim.epoch == 2
    assert sum(waits) == 20.0


@pytest.mark.parametrize("moment", ["before", "while waiting"])
def test_a_released_mirror_is_free(store: MemoryStore, moment: str) -> None:
    first = take_over(store, 1)
    if moment == "before":
        run(release(first), store)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        run(release(first), store)

    assert run(claim_mirror(make_owner(2)), store, wait).epoch == 2
    assert len(waits) == (moment != "before")
    ownership = run(read_owner(), store)
    assert ownership == (2, make_owner(2), False)


def test_a_repeated_claim_recognizes_itself(store: MemoryStore) -> None:
    assert run(claim_mirror(make_owner(1)), store) == run(claim_mirror(make_owner(1)), store)
    assert names.owner(2) not in store.objects


def test_one_of_two_newcomers_is_refused(store: MemoryStore) -> None:
    run(release(take_over(store, 1)), store)

    class Raced(MemoryStore):
        def create(self, name: str, content: bytes) -> bool:
            if name == names.owner(2):
                super().create(name, make_owner(3).to_bytes())
            return super().create(name, content)

    raced = Raced()
    raced.objects.update(store.objects)
    with pytest.raises(OwnedByAnother, match="process 3"):
        run(claim_mirror(make_owner(2)), raced)


def test_a_claim_that_was_taken_over_before_it_was_complete(store: MemoryStore) -> None:
    class TakenOver(MemoryStore):
        def create(self, name: str, content: bytes) -> bool:
            created = super().create(name, content)
            if name == names.owner(1):
                other = run(claim_mirror(make_owner(2), take_over=True), self)
                commit_step(other, self, 10)
            return created

    with pytest.raises(Deposed, match="taken over by process 2"):
        run(claim_mirror(make_owner(1)), TakenOver())


def test_a_run_that_goes_back_drops_the_later_commits(store: MemoryStore) -> None:
    claim = take_over(store, 1)
    for step in (0, 10, 20):
        claim = commit_step(claim, store, step)
    claim = take_over(store, 2)
    assert steps_of(store) == [20, 10, 0]
    claim = commit_step(claim, store, 10)
    assert steps_of(store) == [10, 0]
    run(collect_garbage(claim), store)
    assert steps_of(store) == [10, 0]
    assert names.log(Key(1, 3)) not in store.objects


def test_another_run_is_refused_before_anything_changes(store: MemoryStore) -> None:
    run(release(commit_step(take_over(store, 1), store, 10)), store)
    before = dict(store.objects)
    other = dataclasses.replace(make_owner(2), run_id="f" * 32)
    with pytest.raises(ConfigError, match="mirror of another run") as caught:
        run(claim_mirror(other), store)
    assert caught.value.exit_code == Exit.USAGE
    assert store.objects == before


def test_an_owner_without_a_commit_does_not_reserve_the_mirror(store: MemoryStore) -> None:
    run(release(take_over(store, 1)), store)
    other = dataclasses.replace(make_owner(2), run_id="f" * 32)
    assert run(claim_mirror(other), store).newest is None


def test_a_store_that_ignores_the_condition_is_refused() -> None:
    class Unconditional(MemoryStore):
        def create(self, name: str, content: bytes) -> bool:
            self.put(name, content)
            return True

    store = Unconditional()
    with pytest.raises(ConfigError, match="conditional writes"):
        run(claim_mirror(make_owner(1)), store)
    assert store.objects == {}


def test_a_damaged_manifest_is_skipped_and_announced(store: MemoryStore) -> None:
    claim = commit_step(commit_step(take_over(store, 1), store, 0), store, 10)
    name = names.log(Key(1, 2))
    store.objects[name] = store.objects[name].replace(b"10", b"11", 1)
    lines: list[str] = []
    newest = run(read_newest(lines.append), store)
    assert newest is not None
    assert newest.step == 0
    assert lines == [
        f"memory://test/{name} is damaged (sha256 mismatch); reading the commit before it"
    ]
    store.objects[names.log(Key(1, 1))] = b""
    with pytest.raises(CheckpointError, match="every manifest is damaged"):
        run(read_newest(), store)
    assert claim.newest is not None


def test_garbage_collection_keeps_all_data_beside_a_damaged_manifest(store: MemoryStore) -> None:
    claim = take_over(store, 1)
    for step in (0, 10, 20):
        claim = commit_step(claim, store, step, keep_last=2)
    store.objects[names.log(Key(1, 2))] = b""
    assert run(collect_garbage(claim), store) == 1  # the manifest of step 0
    assert sum(name.startswith(names.DATA) for name in store.objects) == 9


def test_a_damaged_owner_is_replaced_only_on_request(store: MemoryStore) -> None:
    store.objects[names.owner(1)] = b"?"
    with pytest.raises(CheckpointError, match="log/0000000001-0000000000 is damaged"):
        run(claim_mirror(make_owner(2)), store)
    assert take_over(store, 2).epoch == 2


def test_a_commit_of_foreign_objects_is_a_programming_error(store: MemoryStore) -> None:
    claim = take_over(store, 1)
    old = make_contents(claim, store, 0)
    for step in (0, 10):
        claim = commit_step(claim, store, step)
    with pytest.raises(ValueError, match="neither uploaded nor of the commit before"):
        run(commit(claim, old, keep_last=3), store)


def test_a_manifest_that_cannot_be_found_is_not_an_empty_mirror(store: MemoryStore) -> None:
    commit_step(take_over(store, 1), store, 10)

    class Forgetful(MemoryStore):
        def get(self, name: str, max_bytes: int) -> bytes | None:
            return None

    forgetful = Forgetful()
    forgetful.objects.update(store.objects)
    with pytest.raises(StoreUnavailable, match="cannot be found"):
        run(read_newest(), forgetful)


def test_unknown_names_are_ignored(store: MemoryStore) -> None:
    claim = commit_step(take_over(store, 1), store, 10)
    strangers = ["log/.DS_Store", "log/9999999999-1", "log/x", "data/../x", "notes"]
    for name in strangers:
        store.objects[name] = b"?"
    assert run(read_newest(), store) == claim.newest
    run(collect_garbage(claim), store)
    assert set(strangers) <= set(store.objects)
    assert take_over(store, 2).epoch == 2


def test_an_empty_listing_is_not_an_empty_mirror(store: MemoryStore) -> None:
    claim = commit_step(take_over(store, 1), store, 10)

    class Portal(MemoryStore):
        """A store behind a proxy that answers each listing with a web page."""

        def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
            return iter(())

    portal = Portal()
    portal.objects.update(store.objects)
    for transition in (
        read_newest(),
        read_owner(),
        claim_mirror(make_owner(2)),
        collect_garbage(claim),
        commit(claim, make_contents(claim, portal, 20), keep_last=3),
    ):
        with pytest.raises(StoreUnavailable, match="a listing lacks objects that exist"):
            run(transition, portal)  # type: ignore[misc]
    assert set(store.objects) < set(portal.objects)


@pytest.mark.process
def test_threads_that_race_for_a_directory_own_different_epochs(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/mirror")
    claims: list[Claim] = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        for _ in range(5):
            with contextlib.suppress(OwnedByAnother):
                owner = dataclasses.replace(make_owner(number), nonce=secrets.token_hex(16))
                claims.append(run(claim_mirror(owner, take_over=True), store))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.epoch for claim in claims) == list(range(1, len(claims) + 1))
    for claim in claims:
        assert store.get(names.owner(claim.epoch), 4096) == claim.owner.to_bytes()
    assert list(store.list(names.PROBES)) == []
