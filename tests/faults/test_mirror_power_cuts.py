"""Power cuts on ext4 and xfs with a mirror in a directory: acknowledged commits survive, whole."""

from __future__ import annotations

import os
import random
import secrets
import select
import shutil
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from stepctl.mirror.file_store import FileStore
from stepctl.mirror.protocol import claim_mirror, collect_garbage
from stepctl.mirror.reading import read_kept, read_newest
from stepctl.mirror.transition import run
from tests.support.file_systems import LOG_LOST, LOG_WRITTEN, Disk, mount_memory, own_mounts
from tests.support.isolated import apart, ended
from tests.support.mirrors import commit_step, is_whole, make_owner

KINDS = ("ext4", "xfs")
CUTS = 200  # of the power, on each file system
CUTS_OF_A_MIRROR = 10  # then a new one begins
_STEP = struct.Struct("<I")
Prepare = Callable[[], None]


def nothing() -> None:
    """Change nothing."""


def without_fsync() -> None:
    """Remove every fsync of this process."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]


def write_commits(mirror: Path, pipe: int, prepare: Prepare) -> NoReturn:
    """Claim a mirror and commit without end; write the step of each acknowledged commit."""
    try:
        prepare()
        store = FileStore(mirror)
        owner = replace(make_owner(1), nonce=secrets.token_hex(16))
        claim = run(claim_mirror(owner, take_over=True), store)
        step = 0 if claim.newest is None else claim.newest.step + 1
        while True:
            claim = commit_step(claim, store, step, keep_last=2)
            os.write(pipe, _STEP.pack(step))
            run(collect_garbage(claim), store)
            step += 1
    finally:
        os._exit(1)


def cut_once(disk: Disk, mirror: Path, random_: random.Random, prepare: Prepare, flag: int) -> int:
    """Cut the power at a random moment of a writer; return the last step it acknowledged, or -1."""
    heard, inside = os.pipe()
    pid = os.fork()
    if pid == 0:
        write_commits(mirror, inside, prepare)
    os.close(inside)
    steps = b""
    n_commits = random_.randrange(1, 8)
    while len(steps) < n_commits * _STEP.size:
        steps += os.read(heard, _STEP.size)
    end = time.monotonic() + random_.uniform(0, 0.005)
    while (remaining := end - time.monotonic()) > 0:
        if select.select([heard], [], [], remaining)[0]:
            steps += os.read(heard, _STEP.size)
    # what is acknowledged after the power is gone does not count
    disk.cut_power(flag)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    os.close(heard)
    disk.unmount()
    disk.mount()
    (last,) = _STEP.unpack(steps[-_STEP.size :])
    return int(last)


def problem(mirror: Path, acknowledged: int) -> str | None:
    """Return what was lost of a mirror, None if nothing was."""
    store = FileStore(mirror)
    newest = run(read_newest(), store)
    if newest is None or newest.step < acknowledged:
        return f"the commit of step {acknowledged} is lost: {newest}"
    kept = run(read_kept(newest), store)
    if not all(is_whole(manifest, store) for manifest in [newest, *kept]):
        return f"a commit is not whole: {newest}"
    return None


def attack(kind: str, folder: Path, prepare: Prepare, n_cuts: int, seed: int) -> list[str]:
    """Cut the power many times; return the losses."""
    own_mounts()
    memory = folder / "memory"
    mount_memory(memory, 1 << 30)
    disk = Disk(kind, memory)
    random_ = random.Random(seed)
    losses = []
    mirror = disk.point / "0"
    for cut in range(n_cuts):
        if cut % CUTS_OF_A_MIRROR == 0 or losses:
            shutil.rmtree(mirror, ignore_errors=True)
            mirror = disk.point / str(cut)
        flag = LOG_LOST if prepare is without_fsync else random_.choice((LOG_WRITTEN, LOG_LOST))
        acknowledged = cut_once(disk, mirror, random_, prepare, flag)
        try:
            found = problem(mirror, acknowledged)
        except Exception as error:
            found = f"it cannot be read: {error!r}"
        if found is not None:
            losses.append(f"cut {cut}: {found}")
    return losses


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_no_acknowledged_commit_is_lost(
    kind: str, tmp_path: Path, figure: Callable[[str, int], None]
) -> None:
    assert apart(attack, kind, tmp_path, nothing, CUTS, 1) == []
    figure(f"power cuts on {kind} with a mirror", CUTS)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_without_fsync_commits_are_lost(kind: str, tmp_path: Path) -> None:
    assert apart(attack, kind, tmp_path, without_fsync, 5, 2) != []
