"""Files of JSON lines, ledger.jsonl and metrics.jsonl: reading, appending, removing rows.

A kill or a full disk may cut the last line short. Reading skips it, `Tail.cut` removes it.
"""

import codecs
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, final

from stepctl.errors import StepctlError
from stepctl.system import files
from stepctl.system.files import fsync, remedy_of, write_all, write_errors
from stepctl.system.folder import Folder
from stepctl.system.text import counted

JSONRow = dict[str, Any]

_MAX_ROW = 1 << 24  # bytes
_TAIL_BYTES = 1 << 18  # at the end of a file that are always read
_BLOCK_BYTES = 1 << 18  # parsed at a time
_COPY_BYTES = 1 << 20  # copied at a time
_LINE_END = "\n"


def parse_row(line: bytes) -> JSONRow | None:
    """Return the JSON object on a line; None if it holds anything else."""
    try:
        row: object = json.loads(line.decode("utf-8-sig"))  # json would guess the encoding of bytes
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_rows(
    folder: Folder,
    name: str,
    *,
    containing: bytes = b"",
    report: Callable[[int], None] = lambda number: None,
) -> Iterator[JSONRow]:
    """Yield the JSON objects of a file, if it exists, in order, without reading it whole.

    Lines without the bytes `containing` may be skipped. `report` gets the number (1, 2, ...) of each
    whole line that is not an object. StepctlError if a line is too long, UnreadableError if the
    file cannot be read now.
    """
    with _opened(folder, name) as file:
        if file is None:
            return
        number = 0
        for block in _blocks(file, folder.display_path / name):
            if containing in block:
                yield from _rows(block, containing, number, report)
            number += block.count(b"\n")


def _rows(
    block: bytes, containing: bytes, number: int, report: Callable[[int], None]
) -> Iterator[JSONRow]:
    """Yield the objects of a block, whose first line has the number `number` + 1."""
    if containing:
        lines = [line for line in block.splitlines(keepends=True) if containing in line]
        block = b"".join(lines)
    rows = _parse_block(block)
    if rows is not None:
        yield from rows
        return
    for line in block.splitlines(keepends=True):
        number += 1
        row = parse_row(line)
        if row is not None:
            yield row
        elif _is_unreadable(line):
            report(number)


def _parse_block(block: bytes) -> list[JSONRow] | None:
    """Return the objects of lines that hold one each; None if some line may not."""
    if not block.endswith(b"\n"):
        return None
    try:
        rows: list[JSONRow] = json.loads(f"[{block[:-1].decode().replace(_LINE_END, ',')}]")
    except (ValueError, RecursionError):
        return None
    if len(rows) != block.count(b"\n") or not all(isinstance(row, dict) for row in rows):
        return None
    return rows


def _is_unreadable(line: bytes) -> bool:
    """Tell whether a line that is no object is neither blank nor cut short."""
    return bool(line.strip()) and line.endswith((b"\r", b"\n"))


def _blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield blocks of whole lines from the file's position on, and a last line without an end.

    StepctlError if a line is too long.
    """
    rest = b""
    while content := file.read(_BLOCK_BYTES):
        end = content.rfind(b"\n") + 1
        if end:
            yield rest + content[:end]
            rest = content[end:]
        else:
            rest += content
        if len(rest) > _MAX_ROW:
            raise StepctlError(
                f"{path}: a line has more than the maximum of {_MAX_ROW:,} bytes; remove it, or move "
                "the file away"
            )
    if rest:
        yield rest


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


@final
class Tail:
    """The rows at the end of a file, and the lines among them that are to be removed.

    `rows` are those that stay, from the byte `offset` on. The lines before it are not read.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        *,
        is_row: Callable[[JSONRow], bool] = lambda row: True,
        keep: Callable[[JSONRow], bool] = lambda row: True,
        is_settled: Callable[[JSONRow], bool] = lambda row: False,
    ) -> None:
        """Read the last rows: from one that `is_settled` accepts, or else from the first line.

        Rows that `keep` refuses are to be removed, and so are lines that are not rows (`is_row`).
        These count as unreadable, except a last one without a line end, which was cut short.
        UnreadableError if the file cannot be read now, StepctlError if a line is too long.
        """
        self.rows: list[JSONRow] = []
        self.offset = 0
        self._folder = folder
        self._name = name
        self._is_row = is_row
        self._keep = keep
        self._size = 0
        self._unchanged = 0  # bytes from the start that stay as they are
        self._kept_after: list[bytes] = []  # the lines that follow them
        self._n_unreadable = 0
        with _opened(folder, name) as file:
            if file is not None:
                self._read(file, is_settled)

    def _read(self, file: BinaryIO, is_settled: Callable[[JSONRow], bool]) -> None:
        self._size = os.fstat(file.fileno()).st_size
        self.offset = self._settled_offset(file, is_settled)
        self._unchanged = self.offset
        file.seek(self.offset)
        position = self.offset
        for block in _blocks(file, self._folder.display_path / self._name):
            rows = _parse_block(block)
            if rows is not None and b"\r" not in block and self._all_stay(rows):
                self.rows += rows
                self._add(block, position, block)
                position += len(block)
                continue
            for line in block.splitlines(keepends=True):
                kept = self._kept_form(line)
                if kept is not None:
                    self._add(line, position, kept)
                position += len(line)

    def _all_stay(self, rows: list[JSONRow]) -> bool:
        return all(map(self._is_row, rows)) and all(map(self._keep, rows))

    def _add(self, lines: bytes, position: int, kept: bytes) -> None:
        """Add lines at this position of the file, and the form in which they are kept."""
        if self._unchanged == position and kept == lines:
            self._unchanged += len(lines)
        else:
            self._kept_after.append(kept)

    def _settled_offset(self, file: BinaryIO, is_settled: Callable[[JSONRow], bool]) -> int:
        """Return the offset of a settled row about _TAIL_BYTES or more from the end; 0 without one."""
        length = _TAIL_BYTES
        while length < self._size:
            file.seek(self._size - length - 1)
            file.readline(_MAX_ROW)  # the end of a line
            offset = file.tell()
            row = parse_row(file.readline(_MAX_ROW))
            if row is not None and self._is_row(row) and is_settled(row):
                return offset
            length *= 2
        return 0

    def _kept_form(self, line: bytes) -> bytes | None:
        """Return a line as it is kept, in UTF-8 with one line end; None if it is removed."""
        text = line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)
        row = parse_row(text)
        if row is None or not self._is_row(row):
            self._n_unreadable += _is_unreadable(line)
            return None
        if not self._keep(row):
            return None
        self.rows.append(row)
        return text + b"\n"

    def cut(self, say: Callable[[str], None]) -> None:
        """Remove the lines atomically.

        If unreadable ones are among them, the file is first copied aside, which `say` reports.
        """
        if self._n_unreadable:
            aside = self._folder.aside_name(self._name)
            self._folder.publish(aside, self._content(self._size))
            removed = f"removed {counted(self._n_unreadable, 'unreadable line')}"
            path = self._folder.display_path / self._name
            say(f"{path}: {removed}; the original file is kept as {aside}")
        if self._kept_after:
            content = itertools.chain(self._content(self._unchanged), self._kept_after)
            self._folder.publish(self._name, content)
        elif self._unchanged < self._size:
            self._folder.truncate(self._name, self._unchanged)

    def _content(self, size: int) -> Iterator[bytes]:
        """Yield the first `size` bytes of the file."""
        with self._folder.open_regular(self._name) as file:
            while size and (content := file.read(min(size, _COPY_BYTES))):
                yield content
                size -= len(content)


@contextlib.contextmanager
def _opened(folder: Folder, name: str) -> Iterator[BinaryIO | None]:
    """Open a file for reading, None if it is missing; convert the errors of reading it."""
    file: BinaryIO | None = None
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            file = folder.open_regular(name)
        if file is None:
            files.refuse_broken_link(folder.path / name)
            yield None
            return
        with file:
            yield file
    except OSError as error:
        path = folder.display_path / name
        if files.is_unavailable(error):
            raise files.unreadable(path, error) from error
        raise StepctlError(
            f"{path}: cannot be read: {error.strerror}; {remedy_of(error)}"
        ) from error


def read_start(folder: Folder, name: str, n_bytes: int) -> bytes:
    """Return the first bytes of a file, b"" if it is missing; errors as in `read_rows`."""
    with _opened(folder, name) as file:
        return b"" if file is None else file.read(n_bytes)
