"""Writing the files of a run, as they are at one checkpoint, into a mirror that this process owns.

writer = RunWriter(store, claim, folder)
claim = writer.write(Checkpoint(100, "4f9c..."), keep_last=3)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, final

from stepctl.checkpoint import names as checkpoint_names
from stepctl.mirror.chunks import ChunkedFile, Digest, digest
from stepctl.mirror.manifest import Contents, StoredObject, is_file_name
from stepctl.mirror.protocol import Claim, collect_garbage, commit, upload
from stepctl.mirror.store import ObjectStore, StoreUnavailable
from stepctl.mirror.transition import run
from stepctl.system.files import unreadable
from stepctl.system.folder import Descriptor, Folder

_CONFIG = "config.yaml"
_ROOT_FILES = ("ledger.jsonl", "metrics.jsonl")
_SERIES = "series"


class Checkpoint(NamedTuple):
    """An acknowledged checkpoint, with its sha256 in the ledger."""

    step: int
    sha256: str


class Pruned(Exception):
    """The checkpoint was removed, because newer ones were published since."""


@final
class RunWriter:
    """Uploads what the mirror lacks, and commits.

    `check` is called between the requests and may raise to give up. After an exception, `write` can
    be called again, with the same checkpoint or with another: what was uploaded is not uploaded
    again.
    """

    def __init__(
        self,
        store: ObjectStore,
        claim: Claim,
        folder: Folder,
        check: Callable[[], None] = lambda: None,
        *,
        upload_all: bool = False,
    ) -> None:
        """Continue from the claim's newest commit; with `upload_all`, nothing of it is reused.

        `folder` is that of a locked run.
        """
        self.claim = claim
        self._store = store
        self._check = check
        self._folder = _own_copy(folder)
        self._stored: dict[Digest, StoredObject] = {}
        self._chunks: dict[str, ChunkedFile] = {}
        self._checkpoint: tuple[Checkpoint, Digest] | None = None  # the newest that was read
        if claim.newest is not None and not upload_all:
            self._remember(claim.newest.contents)
            self._chunks = {
                name: ChunkedFile(_digest_of(stored) for stored in objects)
                for name, objects in claim.newest.contents.files.items()
            }

    def close(self) -> None:
        """Close the folder."""
        self._folder.close()

    def write(self, checkpoint: Checkpoint, keep_last: int) -> None:
        """Make this checkpoint, with the run's files as they are now, the newest commit.

        Nothing is done if it is already. Raises Pruned; StoreUnavailable, Deposed; StepctlError if
        a file cannot be read.
        """
        contents = self._upload(checkpoint)
        if self.claim.newest is not None and self.claim.newest.contents == contents:
            return
        self._check()
        self.claim = run(commit(self.claim, contents, keep_last), self._store)
        self._stored.clear()
        self._remember(contents)
        # what is not deleted now is deleted after the next commit
        with contextlib.suppress(StoreUnavailable):
            run(collect_garbage(self.claim), self._store)

    def _remember(self, contents: Contents) -> None:
        for stored in contents.objects():
            self._stored[_digest_of(stored)] = stored

    def _upload(self, checkpoint: Checkpoint) -> Contents:
        """Upload the objects that the mirror lacks; the rows may be those of later steps too."""
        with self._opened_checkpoint(checkpoint) as file:
            # after the checkpoint was opened: the ledger acknowledges it
            stored_files = {name: self._upload_file(name) for name in self._file_names()}
            stored_config = self._upload_config()
            if self._checkpoint is None or self._checkpoint[0] != checkpoint:
                size = os.fstat(file.fileno()).st_size
                self._checkpoint = (checkpoint, digest(file, 0, size))
            stored_checkpoint = self._upload_piece(file, 0, self._checkpoint[1])
        return Contents(
            step=checkpoint.step,
            checkpoint=stored_checkpoint,
            config=stored_config,
            files={name: objects for name, objects in stored_files.items() if objects},
        )

    @contextlib.contextmanager
    def _opened_checkpoint(self, checkpoint: Checkpoint) -> Iterator[BinaryIO]:
        """Open the file; it can be read to its end even if it is pruned meanwhile."""
        name = checkpoint_names.file_name(checkpoint.step)
        folder = self._folder.subfolder("checkpoints")
        if folder.stat(name) is None:
            raise Pruned
        with self._opened(folder, name) as file:
            yield file

    def _file_names(self) -> list[str]:
        """Return the names of the files that grow, as a manifest has them."""
        names = [name for name in _ROOT_FILES if self._folder.stat(name) is not None]
        names += [f"{_SERIES}/{name}" for name in sorted(self._folder.subfolder(_SERIES).names())]
        return [name for name in names if is_file_name(name)]

    def _upload_file(self, name: str) -> tuple[StoredObject, ...]:
        chunks = self._chunks.setdefault(name, ChunkedFile())
        parent, _, base = name.rpartition("/")
        folder = self._folder.subfolder(parent) if parent else self._folder
        with self._opened(folder, base) as file:
            pieces = chunks.cover(file, os.fstat(file.fileno()).st_size)
            return tuple(self._upload_piece(file, piece.offset, piece.digest) for piece in pieces)

    def _upload_config(self) -> StoredObject:
        with self._opened(self._folder, _CONFIG) as file:
            size = os.fstat(file.fileno()).st_size
            return self._upload_piece(file, 0, digest(file, 0, size))

    def _upload_piece(self, file: BinaryIO, offset: int, found: Digest) -> StoredObject:
        stored = self._stored.get(found)
        if stored is None:
            self._check()
            file.seek(offset)
            stored = run(upload(self.claim, file, found.size, found.sha256), self._store)
            self._stored[found] = stored
        return stored

    @contextlib.contextmanager
    def _opened(self, folder: Folder, name: str) -> Iterator[BinaryIO]:
        try:
            file = folder.open_regular(name)
        except OSError as error:
            raise unreadable(folder.display_path / name, error) from error
        with file:
            yield file


def _digest_of(stored: StoredObject) -> Digest:
    return Digest(stored.sha256, stored.size)


def _own_copy(folder: Folder) -> Folder:
    """Return a held folder with a descriptor of its own, for another thread."""
    dir_fd = folder.dir_fd()
    assert dir_fd is not None, "the run must be locked"
    return Folder(folder.path, folder.display_path, descriptor=Descriptor(os.dup(dir_fd)))
