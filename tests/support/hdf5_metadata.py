"""HDF5 metadata edited byte by byte, with valid checksums: files the HDF5 library cannot write."""

from __future__ import annotations

import re
from collections.abc import Iterator

NIL_MESSAGE = 0x00
LINK_MESSAGE = 0x06
LAYOUT_MESSAGE = 0x08
FILTER_MESSAGE = 0x0B
CONTINUATION_MESSAGE = 0x10
SUPERBLOCK_BYTES = 48
_WORD = 0xFFFFFFFF
_HEADER = re.compile(rb"OHDR\x02")


def patched(body: bytes, position: int, new: bytes) -> bytes:
    """Put `new` at `position`, and mend the checksum of the metadata around it."""
    data = body[:position] + new + body[position + len(new) :]
    start, end = next(span for span in sealed_spans(body) if span[0] <= position < span[1])
    return data[:end] + checksum(data[start:end]).to_bytes(4, "little") + data[end + 4 :]


def messages(body: bytes, kind: int) -> Iterator[tuple[int, int]]:
    """Yield where the content of each header message of this kind begins and ends."""
    for start, first, end in _headers(body):
        head = 4 + (2 if body[start + 5] & 4 else 0)
        at = first
        while at + head <= end:
            size = int.from_bytes(body[at + 1 : at + 3], "little")
            if body[at] == kind:
                yield at + head, at + head + size
            at += head + size


def sealed_spans(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield the start of each block with a checksum, and the position of the checksum."""
    yield 0, SUPERBLOCK_BYTES - 4
    for start, _, end in _headers(body):
        yield start, end
    for at, _ in messages(body, CONTINUATION_MESSAGE):
        start, size = (int.from_bytes(body[at + n : at + n + 8], "little") for n in (0, 8))
        yield start, start + size - 4


def _headers(body: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield start, first message and checksum of each object header (HDF5 format 3.0, IV.A.1.b)."""
    for match in _HEADER.finditer(body):
        flags = body[match.start() + 5]
        at = match.end() + 1
        at += (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        first = at + width
        yield match.start(), first, first + int.from_bytes(body[at:first], "little")


def checksum(data: bytes) -> int:
    """Return the lookup3 hash of HDF5's metadata (Jenkins, 2006)."""
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    while len(data) > 12:
        a, b, c = _added(a, b, c, data)
        for shift in (4, 6, 8, 16, 19, 4):
            a = (a - c) & _WORD ^ _rotated(c, shift)
            a, b, c = b, (c + b) & _WORD, a
        data = data[12:]
    a, b, c = _added(a, b, c, data.ljust(12, b"\0"))
    for shift in (14, 11, 25, 16, 4, 14, 24) if data else ():
        c = ((c ^ b) - _rotated(b, shift)) & _WORD
        a, b, c = b, c, a
    return b if data else c


def _added(a: int, b: int, c: int, data: bytes) -> tuple[int, int, int]:
    words = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4, 8))
    a, b, c = ((value + word) & _WORD for value, word in zip((a, b, c), words, strict=True))
    return a, b, c


def _rotated(value: int, shift: int) -> int:
    return (value << shift | value >> (32 - shift)) & _WORD
