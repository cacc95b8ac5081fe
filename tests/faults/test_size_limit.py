"""File size limits at every byte, and full disks: the save fails cleanly, the next one works."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from stepctl.checkpoint import codec
from stepctl.checkpoint.store import Store
from stepctl.config import yaml
from stepctl.config.model import parse_config
from stepctl.errors import StepctlError
from stepctl.training.build import prepare
from tests.support.file_systems import in_memory, mount_memory, own_mounts
from tests.support.isolated import apart
from tests.support.saving_commands import SCENES, Stage
from tests.support.small_runs import Unbroken

SCENE = "saves on the grid and at the end, with pruning"
PAGE = 4096
Figure = Callable[[str, int], None]


def limit(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes (Python ignores the signal, so that the call fails)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def saver(unbroken: Unbroken, run: Path, step: int) -> Callable[[], None]:
    """Return a function that publishes the state that the unbroken run had after a step, as a run does."""
    assembly = prepare(parse_config(yaml.load(str(unbroken.config))))
    with Store(unbroken.path / "checkpoints").open(
        step, lambda reader: codec.restore(reader, assembly.state)
    ) as reader:
        header = reader.header
    assert header.run_id is not None
    texts = {
        "run": header.run,
        "run_id": header.run_id,
        "config": header.config,
        "numerics": header.numerics,
    }
    image = codec.encode(assembly.state, **texts)
    return lambda: Store(run / "checkpoints").publish(step, image)


def limit_every_byte(folder: Path, part: slice) -> int:
    """Publish under each limit from 0 to the file's length; return how many there were."""
    folder = in_memory(folder)
    unbroken, run = Unbroken(folder, 2), folder / "limited"
    files = {
        path.name: path.read_bytes() for path in sorted((unbroken.path / "checkpoints").iterdir())
    }
    name, whole = files.popitem()
    (run / "checkpoints").mkdir(parents=True)
    for old, data in files.items():
        (run / "checkpoints" / old).write_bytes(data)
    save, limits = saver(unbroken, run, 2), range(len(whole))[part]
    for size in limits:
        limit(size)
        with pytest.raises(StepctlError, match="cannot be written: File too large"):
            save()
        assert {
            path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()
        } == files, size
    limit(resource.RLIM_INFINITY)
    save()
    assert (run / "checkpoints" / name).read_bytes() == whole
    return len(limits)


def limit_commands(folder: Path, part: slice) -> tuple[int, list[str]]:
    """Run a command under limits below a checkpoint's size; return how many, and what was wrong then and after it."""
    stage, wrong = Stage(SCENES[SCENE], folder), list[str]()
    sizes = range(min(path.stat().st_size for path in (stage.run / "checkpoints").iterdir()))[part]
    for size in sizes:
        stage.set()
        code = stage.go(lambda size=size: limit(size))
        found = stage.faults_of_an_error(code, must_fail=True)
        wrong += [f"{size} bytes: {fault}" for fault in found]
    return len(sizes), wrong


def fill_disks(folder: Path, pages: range) -> tuple[int, list[str]]:
    """Run a command on a disk with so many free pages; return how often it was full, and what was wrong."""
    own_mounts()
    stage, full, wrong = Stage(SCENES[SCENE], folder), 0, list[str]()
    mount_memory(stage.run.parent, 64 * PAGE)
    filler = stage.run.parent / "filler"
    for free in pages:
        stage.set()
        filler.write_bytes(bytes(PAGE * (os.statvfs(filler.parent).f_bavail - free)))
        code = stage.go()
        full += code != 0
        filler.unlink()
        wrong += [
            f"{free} pages: {fault}" for fault in stage.faults_of_an_error(code, must_fail=False)
        ]
    return full, wrong


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_a_size_limit_at_every_byte_of_a_checkpoint_leaves_the_old_ones(
    part: int, tmp_path: Path, figure: Figure
) -> None:
    figure("saves under a size limit", apart(limit_every_byte, tmp_path, slice(part, None, 4)))


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_a_command_under_a_size_limit_fails_cleanly(
    part: int, tmp_path: Path, figure: Figure
) -> None:
    count, wrong = apart(limit_commands, tmp_path, slice(100 * part, None, 400))
    assert wrong == []
    figure("commands under a size limit", count)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(2))
def test_a_full_disk_stops_a_run_that_resumes_once_there_is_room(
    part: int, tmp_path: Path, figure: Figure
) -> None:
    full, wrong = apart(fill_disks, tmp_path, range(part, 12, 2))
    assert wrong == []
    figure("full disks", full)


def test_some_size_limits_leave_the_old_checkpoints(tmp_path: Path, figure: Figure) -> None:
    figure("saves under a size limit", apart(limit_every_byte, tmp_path, slice(0, None, 29)))


def test_a_nearly_full_disk_stops_a_run_that_can_be_resumed(tmp_path: Path, figure: Figure) -> None:
    full, wrong = apart(fill_disks, tmp_path, range(1, 12, 3))
    assert wrong == []
    assert full
    figure("full disks", full)
