"""The root group's object header, in which `global_step` is stored beside a checksum.

HDF5 wrote the file once, for step 0. Another step changes these eight bytes and the checksum.

Source: HDF5 File Format Specification 3.0, section IV.A.1.b, "Version 2 Data Object Header Prefix".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from stepctl.checkpoint.metadata import Metadata
from stepctl.errors import StepctlError

_SIGNATURE = b"OHDR"
_FLAGS = 5  # offset of the flags in the header
_PREFIX_BYTES = 6  # up to and with the flags
_HAS_TIMES = 0x20  # flags, with the bytes of the fields that they announce
_TIMES_BYTES = 16
_HAS_PHASE_CHANGE = 0x10
_PHASE_CHANGE_BYTES = 4
_SIZE_WIDTH = 0x03  # of the size field, as a power of 2
_CHECKSUM_BYTES = 4
_STEP_BYTES = 8
_WORD = 0xFFFFFFFF
_BLOCK_BYTES = 12
_MIX = (4, 6, 8, 16, 19, 4)
_FINAL = (14, 11, 25, 16, 4, 14, 24)


class RootHeader(NamedTuple):
    """Offsets in the file: of the header, of the value of `global_step`, of the checksum."""

    start: int
    step: int
    checksum: int

    @classmethod
    def find(cls, metadata: Metadata, start: int, marked_step: int) -> RootHeader:
        """Find the fields of a header that starts at this offset and holds this step.

        StepctlError if it is not laid out as the specification says.
        """
        head = metadata.read_range(start, start + _PREFIX_BYTES)
        flags = head[_FLAGS]
        position = start + _PREFIX_BYTES
        if flags & _HAS_TIMES:
            position += _TIMES_BYTES
        if flags & _HAS_PHASE_CHANGE:
            position += _PHASE_CHANGE_BYTES
        width = 1 << (flags & _SIZE_WIDTH)
        size = int.from_bytes(metadata.read_range(position, position + width), "little")
        checksum = position + width + size
        content = metadata.read_range(start, checksum)
        value = marked_step.to_bytes(_STEP_BYTES, "little")
        first = content.find(value)
        header = cls(start, start + first, checksum)
        stored = metadata.read_range(checksum, checksum + _CHECKSUM_BYTES)
        if (
            not head.startswith(_SIGNATURE)
            or first < 0
            or content.find(value, first + 1) >= 0
            or stored != _checksum(content)
        ):
            raise StepctlError(
                "this HDF5 library writes the root group in a form that stepctl does not know; "
                "install another version of h5py"
            )
        return header

    def stored_step(self, content: bytes) -> int:
        """Return the step in a file's content."""
        return int.from_bytes(content[self.step : self.step + _STEP_BYTES], "little", signed=True)

    def stored_checksum(self, content: bytes) -> bytes:
        """Return the checksum in a file's content."""
        return content[self.checksum : self.checksum + _CHECKSUM_BYTES]

    def checksum_of(self, content: bytes) -> bytes:
        """Return the checksum that belongs to the header in a file's content."""
        return _checksum(content[self.start : self.checksum])

    def blank(self, content: bytes) -> bytes:
        """Return a file's content with zeros as the step and the checksum."""
        blanked = bytearray(content)
        for start, n_bytes in ((self.step, _STEP_BYTES), (self.checksum, _CHECKSUM_BYTES)):
            blanked[start : start + n_bytes] = bytes(n_bytes)
        return bytes(blanked)

    def write_step(self, metadata: Metadata, step: int) -> None:
        """Change the step and the checksum."""
        metadata.seek(self.step)
        metadata.write(step.to_bytes(_STEP_BYTES, "little"))
        checksum = _checksum(metadata.read_range(self.start, self.checksum))
        metadata.seek(self.checksum)
        metadata.write(checksum)


def _checksum(data: bytes) -> bytes:
    """Return the lookup3 hash of at least one byte, as HDF5 stores it.

    Source: Bob Jenkins, lookup3.c (2006), function hashlittle with the initial value 0.
    """
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    padded = data + bytes(-len(data) % _BLOCK_BYTES)
    *blocks, last = struct.iter_unpack("<3I", padded)
    for block in blocks:
        a += block[0]
        b += block[1]
        c += block[2]
        for shift in _MIX:
            mixed = ((a - c) & _WORD) ^ _rotated(c, shift)
            a, b, c = b, c + b, mixed
    a += last[0]
    b += last[1]
    c += last[2]
    for shift in _FINAL:
        mixed = ((c ^ b) - _rotated(b, shift)) & _WORD
        a, b, c = b, mixed, a
    return struct.pack("<I", b)


def _rotated(word: int, shift: int) -> int:
    word &= _WORD
    return ((word << shift) | (word >> (32 - shift))) & _WORD
