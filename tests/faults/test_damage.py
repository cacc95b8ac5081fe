"""Damage to the newest checkpoint is always detected, and an older checkpoint is used."""

from __future__ import annotations

import functools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stepctl.checkpoint import codec
from stepctl.checkpoint.store import Store
from stepctl.errors import CheckpointError
from stepctl.hooks.base import Hook
from stepctl.programs.base import Metrics
from stepctl.state.train_state import TrainState
from tests.support.processes import start
from tests.support.runs import content, make_config, rows, train

Figure = Callable[[str, int], None]
Damage = Callable[[bytes, bytes, random.Random], bytes]  # of the newest, given the one before it

SECTOR = 512
OLDER, NEWEST, LAST = "step-00000004.h5", "step-00000008.h5", "step-00000012.h5"
CODES = {"foreign", "version", "length", "digest"}


class Killed(BaseException):
    pass


class Kill(Hook):
    """Ends the process, as far as training can tell, two steps after the second save."""

    name = "kill"
    essential = True  # a kill leaves nothing to save

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == 10:
            raise Killed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run that nothing happened to, and the same one killed; with checkpoints of some kilobytes."""
    folder = tmp_path_factory.mktemp("runs")
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    np.savez(folder / "points.npz", x=x, y=(x[:, 0] > x[:, 1]).astype(np.int64))
    config = make_config(
        data={
            "name": "arrays",
            "path": str(folder / "points.npz"),
            "batch_size": 8,
            "validation_fraction": 0.2,
        },
        model={"name": "linear"},
        checkpoint={"every": 4, "keep_last": None},
        stop={"last_step": 12},
        log={"every": 1},
    )
    train(config, folder / "whole" / "run")
    with pytest.raises(Killed):
        train(config, folder / "killed" / "run", hooks=(Kill(),))
    assert {OLDER, NEWEST} < set(os.listdir(folder / "killed" / "run" / "checkpoints"))
    return {name: folder / name / "run" for name in ("whole", "killed")}


@pytest.fixture
def store(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of the killed run's checkpoints to do harm to; the older one stays whole, and is read once."""
    real = codec.Reader
    once = functools.cache(real)
    monkeypatch.setattr(
        codec,
        "Reader",
        lambda path, *vet, **at: once(path) if path.name == OLDER else real(path, *vet, **at),
    )
    return Store(Path(shutil.copytree(runs["killed"] / "checkpoints", tmp_path / "checkpoints")))


def span(data: bytes, generator: random.Random) -> tuple[int, int]:
    """Choose a range: any length, small ones as likely as large ones."""
    length = min(len(data), int(2 ** generator.uniform(0, 13)))
    start = generator.randrange(len(data) - length + 1)
    return start, start + length


def smeared(fill: Callable[[int, random.Random], bytes]) -> Damage:
    def damage(data: bytes, older: bytes, generator: random.Random) -> bytes:
        start, end = span(data, generator)
        return data[:start] + fill(end - start, generator) + data[end:]

    return damage


def flipped(data: bytes, older: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(int(2 ** generator.uniform(0, 8))):
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def cut(data: bytes, older: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data))]


def extended(data: bytes, older: bytes, generator: random.Random) -> bytes:
    return data + generator.choice((bytes, generator.randbytes))(int(2 ** generator.uniform(0, 16)))


def sectors(data: bytes) -> list[bytes]:
    return [data[start : start + SECTOR] for start in range(0, len(data), SECTOR)]


def swapped(data: bytes, older: bytes, generator: random.Random) -> bytes:
    parts = sectors(data)
    first, second = generator.sample(range(len(parts) - 1), 2)
    parts[first], parts[second] = parts[second], parts[first]
    return b"".join(parts)


def doubled(data: bytes, older: bytes, generator: random.Random) -> bytes:
    """One sector written over another."""
    parts = sectors(data)
    first, second = generator.sample(range(len(parts) - 1), 2)
    parts[first] = parts[second]
    return b"".join(parts)


def inserted(data: bytes, older: bytes, generator: random.Random) -> bytes:
    parts = sectors(data)
    parts.insert(generator.randrange(len(parts)), generator.choice(parts))
    return b"".join(parts)


def removed(data: bytes, older: bytes, generator: random.Random) -> bytes:
    parts = sectors(data)
    del parts[generator.randrange(len(parts))]
    return b"".join(parts)


def mixed(data: bytes, older: bytes, generator: random.Random) -> bytes:
    """Some sectors of the checkpoint before: a write that came to the disk in part."""
    share = generator.random()
    pairs = zip(sectors(data), sectors(older), strict=True)
    return b"".join(generator.choices(pair, (1 - share, share))[0] for pair in pairs)


def torn(data: bytes, older: bytes, generator: random.Random) -> bytes:
    """The newest up to a byte, and the one before from there on."""
    at = generator.randrange(1, len(data))
    return data[:at] + older[at:]


def another_head(data: bytes, older: bytes, generator: random.Random) -> bytes:
    return older[:SECTOR] + data[SECTOR:]


KINDS: dict[str, Damage] = {
    "flipped bits": flipped,
    "zeros": smeared(lambda length, generator: bytes(length)),
    "ones": smeared(lambda length, generator: b"\xff" * length),
    "noise": smeared(lambda length, generator: generator.randbytes(length)),
    "cut": cut,
    "extended": extended,
    "sectors swapped": swapped,
    "a sector doubled": doubled,
    "a sector inserted": inserted,
    "a sector removed": removed,
    "sectors of an older one": mixed,
    "torn between two": torn,
    "the head of an older one": another_head,
}


def assert_passed_over(store: Store, damaged: bytes) -> None:
    """Put the damaged bytes in the newest one's place; the one before is used, and it is said why."""
    (store.path / NEWEST).write_bytes(damaged)
    with pytest.raises(CheckpointError) as caught, codec.Reader(store.path / NEWEST):
        pass
    assert caught.value.code in CODES
    said: list[str] = []
    with store.newest(said.append) as reader:
        assert reader.name == OLDER
    assert said == [f"{caught.value}; using {OLDER}"]
    assert said[0].startswith(f"{NEWEST}: ")


def assert_whole_again(store: Store, data: bytes) -> None:
    (store.path / NEWEST).write_bytes(data)
    with store.newest(pytest.fail) as reader:
        assert reader.name == NEWEST


N_PARTS = 4


@pytest.mark.faults
@pytest.mark.parametrize("part", range(N_PARTS))
def test_every_flipped_byte_of_a_runs_checkpoint_is_noticed(
    part: int, store: Store, figure: Figure
) -> None:
    data = (store.path / NEWEST).read_bytes()
    positions = range(part, len(data), N_PARTS)
    for position in positions:
        assert_passed_over(
            store, data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]
        )
    assert_whole_again(store, data)
    figure("damaged checkpoints passed over", len(positions))


def damage_by(kind: str, n_trials: int, seed: int, store: Store) -> int:
    """Do harm `n_trials` times; return how often the bytes did change by it."""
    data, older = ((store.path / name).read_bytes() for name in (NEWEST, OLDER))
    generator, n_changed = random.Random(f"{kind} {seed}"), 0
    for _ in range(n_trials):
        damaged = KINDS[kind](data, older, generator)
        if damaged not in (data, older):
            assert_passed_over(store, damaged)
            n_changed += 1
    assert_whole_again(store, data)
    return n_changed


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_the_newest_checkpoint_is_noticed(
    kind: str, store: Store, figure: Figure
) -> None:
    n_changed = damage_by(kind, 20, 0, store)
    assert n_changed > 0
    figure("damaged checkpoints passed over", n_changed)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_to_the_newest_checkpoint_is_noticed(
    kind: str, store: Store, figure: Figure
) -> None:
    figure("damaged checkpoints passed over", damage_by(kind, 240, 1, store))


def test_an_older_checkpoint_renamed_to_the_newest_is_detected(store: Store) -> None:
    shutil.copy(store.path / OLDER, store.path / NEWEST)
    said: list[str] = []
    with store.newest(said.append) as reader:
        assert reader.name == OLDER
    assert said[0].startswith(f"{NEWEST}: its three step numbers disagree")


QUICK = {"noise": 1, "torn between two": 1}


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, seed, marks=[pytest.mark.faults] * (seed >= QUICK.get(kind, 0)))
        for kind in KINDS
        for seed in range(3)
    ],
)
def test_a_resume_past_a_damaged_checkpoint_ends_exactly(
    kind: str, seed: int, runs: dict[str, Path], tmp_path: Path, figure: Figure
) -> None:
    run = Path(shutil.copytree(runs["killed"], tmp_path / "run"))
    data, older = ((run / "checkpoints" / name).read_bytes() for name in (NEWEST, OLDER))
    damaged, generator = data, random.Random(f"{kind} {seed}")
    while damaged in (data, older):
        damaged = KINDS[kind](data, older, generator)
    (run / "checkpoints" / NEWEST).write_bytes(damaged)

    with start(["resume", run], cwd=tmp_path) as child:
        assert child.wait() == 0, child.said()
    notice = next(line for line in child.said().splitlines() if line.startswith(f"{NEWEST}: "))
    assert notice.endswith(f"; using {OLDER}")
    assert f"global step 4 to 12, from {OLDER}" in child.said()
    for name in (OLDER, NEWEST, LAST):
        assert content(run / "checkpoints" / name) == content(runs["whole"] / "checkpoints" / name)
    assert (run / "checkpoints" / f"{NEWEST}.aside-1").read_bytes() == damaged
    assert rows(run) == rows(runs["whole"])
    figure("resumes past a damaged checkpoint", 1)
