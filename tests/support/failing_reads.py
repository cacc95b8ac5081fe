"""Replacements of `os` calls that make chosen files unreadable."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = ("open", "listdir", "scandir")


def refuse(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    code: int = errno.EIO,
    names: tuple[str, ...] = NAMES,
) -> Callable[[], int]:
    """Let the named calls fail on a path and all below it; return what counts the failures."""
    target = os.path.realpath(path)
    failures = []

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(where: Any = ".", *arguments: Any, **options: Any) -> Any:
            place = _absolute(where, options.get("dir_fd"))
            if f"{place}/".startswith(f"{target}/"):
                failures.append(place)
                raise OSError(code, os.strerror(code), str(where))
            return real(where, *arguments, **options)

        return call

    for name in names:
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    return lambda: len(failures)


def _absolute(where: Any, dir_fd: int | None) -> str:
    if isinstance(where, int):
        return os.readlink(f"/proc/self/fd/{where}")
    folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.normpath(os.path.join(folder, os.fsdecode(where)))
