"""Files that grow, as lists of immutable chunks.

    chunks = ChunkedFile((stored.sha256, stored.size) for stored in manifest.contents.files["ledger.jsonl"])
    for piece in chunks.cover(file, size):
        ...  # piece.sha256 is the chunk's digest, piece.offset its place in the file

The chunks of a file are its bytes in order. A new chunk replaces the last ones as long as they are
not larger than it, so a file that grows n times has O(log n) chunks, and each byte is uploaded
O(log n) times.
"""

import hashlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple, final

from stepctl.errors import StepctlError

MAX_MERGED = 1 << 26  # bytes; chunks of this size or more are never replaced
# Read at a time: after each read the thread waits for the interpreter lock, which training holds.
_BLOCK = 1 << 24


class Digest(NamedTuple):
    """The sha256 and the size of some bytes."""

    sha256: str
    size: int


class Piece(NamedTuple):
    """A chunk, and the offset of its bytes in the local file."""

    offset: int
    digest: Digest

    @property
    def end(self) -> int:
        """The offset of the first byte after the chunk."""
        return self.offset + self.digest.size


@final
class ChunkedFile:
    """The chunks of one local file, which a segment appends to and never changes."""

    def __init__(self, previous: Iterable[Digest] = ()) -> None:
        """Continue from the chunks of a manifest: those that equal the file's bytes are kept."""
        self._unchecked = list(previous)
        self._pieces: list[Piece] = []

    def cover(self, file: BinaryIO, size: int) -> list[Piece]:
        """Return the chunks of the first `size` bytes of the file; StepctlError if it is shorter.

        The chunks of the manifest are compared with the file at the first call only.
        """
        self._check(file, size)
        while self._pieces and self._pieces[-1].end > size:
            self._pieces.pop()
        start = self._pieces[-1].end if self._pieces else 0
        if start == size:
            return list(self._pieces)
        while self._pieces and self._is_replaced(self._pieces[-1].digest.size, size - start):
            start = self._pieces.pop().offset
        self._pieces.append(Piece(start, digest(file, start, size)))
        return list(self._pieces)

    def _check(self, file: BinaryIO, size: int) -> None:
        """Keep the manifest's chunks up to the first one that differs: a resume cuts files."""
        self._pieces += matching_pieces(file, size, self._unchecked)
        self._unchecked = []

    @staticmethod
    def _is_replaced(n_old: int, n_new: int) -> bool:
        return n_old <= n_new and n_old < MAX_MERGED


def matching_pieces(file: BinaryIO, size: int, chunks: Iterable[Digest]) -> list[Piece]:
    """Return the first of the chunks: as many as equal the file's first `size` bytes, in order."""
    pieces: list[Piece] = []
    offset = 0
    for chunk in chunks:
        end = offset + chunk.size
        if end > size or digest(file, offset, end) != chunk:
            break
        pieces.append(Piece(offset, chunk))
        offset = end
    return pieces


def digest(file: BinaryIO, start: int, end: int) -> Digest:
    """Return the digest of a range of bytes; StepctlError if the file is shorter."""
    sha256 = hashlib.sha256()
    buffer = memoryview(bytearray(min(end - start, _BLOCK)))
    file.seek(start)
    remaining = end - start
    while remaining:
        n_read = file.readinto(buffer[: min(remaining, len(buffer))])  # type: ignore[attr-defined]
        if not n_read:
            raise StepctlError(f"{file.name}: is shorter than it was when its checkpoint was saved")
        sha256.update(buffer[:n_read])
        remaining -= n_read
    return Digest(sha256.hexdigest(), end - start)
