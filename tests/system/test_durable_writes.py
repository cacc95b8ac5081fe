"""Durable writes reach the disk, on macOS by F_FULLFSYNC."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

import stepctl
from stepctl.system.files import fsync
from tests.support.runs import make_config, train

PACKAGE = Path(stepctl.__file__).parent
FULL = 51  # F_FULLFSYNC in the headers of macOS


class Mac:
    """The calls of a system with F_FULLFSYNC, and which descriptors were synced by which of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refusal: int | None = None) -> None:
        self.full: list[str] = []
        self.plain: list[str] = []
        self._refusal, self._fcntl = refusal, fcntl.fcntl
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", self.fcntl)
        monkeypatch.setattr(os, "fsync", lambda descriptor: self.plain.append(kind(descriptor)))

    def fcntl(self, descriptor: int, command: int, argument: int = 0) -> int:
        if command != FULL:
            return self._fcntl(descriptor, command, argument)
        if self._refusal is not None:
            raise OSError(self._refusal, os.strerror(self._refusal))
        self.full.append(kind(descriptor))
        return 0


def kind(descriptor: int) -> str:
    """Return the name of what is open, without the writer's number."""
    name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    return (
        "a directory"
        if stat.S_ISDIR(os.fstat(descriptor).st_mode)
        else name.partition(".tmp-")[0].strip(".")
    )


@pytest.mark.training
def test_a_run_syncs_everything_through_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac = Mac(monkeypatch)
    train(
        make_config(stop={"last_step": 3}, log={"every": 1, "csv": True, "tensorboard": True}),
        tmp_path / "run",
    )
    assert mac.plain == []
    names = set(mac.full)
    assert {
        "config.yaml",
        "ledger.jsonl",
        "metrics.jsonl",
        "metrics.csv",
        "step-00000003.h5",
        "a directory",
    } <= names
    assert any("tfevents" in name for name in names)


@pytest.mark.training
@pytest.mark.parametrize(
    "refusal", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY], ids=errno.errorcode.get
)
def test_a_file_system_without_it_gets_a_plain_fsync(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac = Mac(monkeypatch, refusal)
    train(make_config(stop={"last_step": 3}), tmp_path / "run")
    assert {"config.yaml", "ledger.jsonl", "step-00000003.h5", "a directory"} <= set(mac.plain)


@pytest.mark.parametrize("refusal", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_failing_disk_is_not_read_again(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second fsync may succeed although the first lost the data."""
    mac = Mac(monkeypatch, refusal)
    with open(tmp_path / "file", "w") as file, pytest.raises(OSError, match=os.strerror(refusal)):
        fsync(file.fileno())
    assert mac.plain == []


def test_elsewhere_it_is_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with open(tmp_path / "file", "w") as file:
        fsync(file.fileno())
        assert synced == [file.fileno()]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_one_function_alone_syncs(path: Path) -> None:
    used = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    ]
    calls = {
        node.attr for node in used if isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    assert not calls & {"fsync", "fdatasync"} or path == PACKAGE / "system" / "files.py"
