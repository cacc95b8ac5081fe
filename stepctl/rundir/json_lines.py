"""Files of JSON lines, ledger.jsonl and metrics.jsonl: reading, appending, removing rows.

A kill or a full disk may cut the last line short. Reading skips it, `keep_rows` removes it.
"""

import codecs
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stepctl.errors import StepctlError
from stepctl.system import files
from stepctl.system.files import fsync, remedy_of, write_all, write_errors
from stepctl.system.folder import Folder
from stepctl.system.text import counted

JSONRow = dict[str, Any]

_MAX_FILE = 1 << 30  # bytes: some ten million rows
_MAX_ROW = 1 << 24  # bytes


def parse_row(line: bytes) -> JSONRow | None:
    """Return the JSON object on a line; None if it holds anything else."""
    try:
        row: object = json.loads(line.decode("utf-8-sig"))  # json would guess the encoding of bytes
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_rows(folder: Folder, name: str) -> Iterator[JSONRow]:
    """Yield the JSON objects of a file, if it exists; StepctlError if a line is too long."""
    for line in _lines(folder, name, read_bytes(folder, name)):
        row = parse_row(line)
        if row is not None:
            yield row


def _lines(folder: Folder, name: str, content: bytes) -> Iterator[bytes]:
    """Yield the lines of a file with their ends; StepctlError if one is too long."""
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if len(line) > _MAX_ROW:
            what = f"line {number} has {len(line):,} bytes, more than the maximum of {_MAX_ROW:,}"
            raise StepctlError(
                f"{folder.display_path / name}: {what}; remove it, or move the file away"
            )
        yield line


def append_row(folder: Folder, name: str, row: Mapping[str, Any]) -> bool:
    """Append a row durably; return False, and write nothing, if the last line was cut short."""
    line = json.dumps(row).encode() + b"\n"
    with write_errors(folder.display_path / name):
        descriptor = folder.open_to_append(name)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                return False
            write_all(descriptor, line)
            fsync(descriptor)
            return True
        finally:
            os.close(descriptor)


def keep_rows(
    folder: Folder,
    name: str,
    is_row: Callable[[JSONRow], bool],
    keep: Callable[[JSONRow], bool],
    say: Callable[[str], None],
) -> list[JSONRow]:
    """Replace a file by the rows that `keep` accepts, atomically, if that changes it; return them.

    A last line without a line end was cut short, and is dropped. If any other line is not a row,
    the file is first copied aside, which `say` reports.
    """
    content = read_bytes(folder, name)
    kept: list[JSONRow] = []
    kept_lines: list[bytes] = []
    n_unreadable = 0
    for line in _lines(folder, name, content):
        text = line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)
        row = parse_row(text)
        if row is not None and is_row(row):
            if keep(row):
                kept.append(row)
                kept_lines.append(text + b"\n")
        elif text.strip() and line.endswith((b"\r", b"\n")):
            n_unreadable += 1
    if n_unreadable:
        aside = folder.aside_name(name)
        folder.publish(aside, [content])
        removed = f"removed {counted(n_unreadable, 'unreadable line')}"
        say(f"{folder.display_path / name}: {removed}; the original file is kept as {aside}")
    if b"".join(kept_lines) != content:
        folder.publish(name, kept_lines)
    return kept


def read_bytes(folder: Folder, name: str) -> bytes:
    """Return the content of a file, b"" if it is missing; UnreadableError if it cannot be read."""
    path = folder.display_path / name
    try:
        with folder.open_regular(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_FILE:
                what = f"{size:,} bytes, more than the maximum of {_MAX_FILE:,}"
                raise StepctlError(
                    f"{path}: {what}; move the file away, or remove lines that are not rows"
                )
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        files.refuse_broken_link(folder.path / name)
        return b""
    except OSError as error:
        if files.is_unavailable(error):
            raise files.unreadable(path, error) from error
        raise StepctlError(
            f"{path}: cannot be read: {error.strerror}; {remedy_of(error)}"
        ) from error
