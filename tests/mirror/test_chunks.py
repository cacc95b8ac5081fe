"""Chunks of files that grow, and are cut."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepctl.errors import StepctlError
from stepctl.mirror import chunks
from stepctl.mirror.chunks import ChunkedFile, Digest, Piece


def cover(chunked: ChunkedFile, path: Path) -> list[Piece]:
    """Return the chunks of a whole file, which must be its bytes in order."""
    content = path.read_bytes()
    with path.open("rb") as file:
        pieces = chunked.cover(file, len(content))
    end = 0
    for piece in pieces:
        assert piece.offset == end
        end = piece.end
        assert hashlib.sha256(content[piece.offset : end]).hexdigest() == piece.digest.sha256
    assert end == len(content)
    return pieces


def test_an_empty_file_has_no_chunks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert cover(ChunkedFile(), path) == []


def test_a_file_that_grows_has_few_chunks_and_is_uploaded_few_times(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    chunked = ChunkedFile()
    known: set[Digest] = set()
    n_uploaded = 0
    for number in range(500):
        with path.open("ab") as file:
            file.write(number.to_bytes(10, "little"))
        pieces = cover(chunked, path)
        assert len(pieces) <= math.log2(number + 1) + 1
        new = {piece.digest for piece in pieces} - known
        n_uploaded += sum(digest.size for digest in new)
        known |= new
    assert n_uploaded <= 5000 * (math.log2(500) + 1)


@given(
    st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=8),
    st.data(),
)
def test_chunks_of_a_manifest_are_kept_up_to_the_first_change(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "file"
    content = b"".join(parts)
    previous = [Digest(hashlib.sha256(part).hexdigest(), len(part)) for part in parts]
    cut = data.draw(st.integers(0, len(content)))
    added = data.draw(st.binary(max_size=20))
    path.write_bytes(content[:cut] + added)
    pieces = cover(ChunkedFile(previous), path)
    if not added and cut == len(content):
        assert [piece.digest for piece in pieces] == previous


def test_a_large_chunk_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_MERGED", 8)
    path = tmp_path / "file"
    path.write_bytes(bytes(8))
    chunked = ChunkedFile()
    (first,) = cover(chunked, path)
    path.write_bytes(bytes(28))
    assert [piece.digest.size for piece in cover(chunked, path)] == [first.digest.size, 20]


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5))
    with path.open("rb") as file, pytest.raises(StepctlError, match="is shorter"):
        ChunkedFile().cover(file, 6)
