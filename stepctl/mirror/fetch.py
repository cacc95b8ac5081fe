"""Fetching a run from its mirror into a run directory.

    manifest = run(read_newest(), store)
    pull(store, manifest, RunDirectory("runs/digits"))

While files are fetched, the directory is marked as incomplete. A pull that was killed leaves no run;
repeated, it fetches what is missing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from stepctl.checkpoint import names as checkpoint_names
from stepctl.checkpoint.expected import expected_checkpoints
from stepctl.checkpoint.user_block import open_verified
from stepctl.errors import CheckpointError, ConfigError, StepctlError
from stepctl.mirror import names
from stepctl.mirror.chunks import Digest, matching_pieces
from stepctl.mirror.manifest import Manifest, StoredObject
from stepctl.mirror.reading import read_kept, read_newest
from stepctl.mirror.store import ObjectStore, StoreUnavailable
from stepctl.mirror.transition import run
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.mirror_status import MirrorStatus
from stepctl.system.files import write_all
from stepctl.system.folder import Folder
from stepctl.system.shell import command

T = TypeVar("T")
Say = Callable[[str], None]

_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between the attempts


def with_attempts(action: Callable[[], T]) -> T:
    """Return the result of an action that is repeated while the store is not available."""
    for delay in _DELAYS:
        try:
            return action()
        except StoreUnavailable:
            time.sleep(delay)
    try:
        return action()
    except StoreUnavailable as error:
        remedy = "check the network and the credentials, then run the command again"
        raise StoreUnavailable(f"{error}; {remedy}") from error


def read_mirror(store: ObjectStore) -> Manifest | None:
    """Return the newest commit; None if the mirror holds no run."""
    return with_attempts(lambda: run(read_newest(), store))


def no_run(url: str) -> ConfigError:
    """Return the error of a mirror that holds no run."""
    return ConfigError(f"{url}: no run in it; mirror one with: {command('push', 'RUN', url)}")


def pull_newest(
    store: ObjectStore, directory: RunDirectory, say: Say = lambda message: None
) -> Manifest | None:
    """Fetch the newest commit of a mirror that another process may own; None if it holds no run.

    The owner deletes commits that newer ones replace: then the pull starts again. Errors as in
    `pull`.
    """
    newest = read_mirror(store)
    while newest is not None:
        try:
            return pull(store, newest, directory, say)
        except CheckpointError:
            found = read_mirror(store)
            if found is None or found.key == newest.key:
                raise
            newest = found
    return None


def pull(
    store: ObjectStore, manifest: Manifest, directory: RunDirectory, say: Say = lambda message: None
) -> Manifest:
    """Fetch the run of a commit into a new directory, and return the commit that was fetched.

    That is an earlier one if an object of the newest is damaged. RunExistsError if the directory
    holds a run, ConfigError if it holds other files; CheckpointError if no commit is whole,
    StoreUnavailable if the store does not answer.
    """
    directory.refuse_run()
    directory.create()
    with directory.lock(say):
        directory.refuse_run()
        directory.remove_temporary_files()
        with directory.pulling(store.url):
            return _pull_newest_good(store, manifest, directory, say)


def _pull_newest_good(
    store: ObjectStore, newest: Manifest, directory: RunDirectory, say: Say
) -> Manifest:
    manifests = _newest_first(store, newest)
    manifest = next(manifests)
    while True:
        try:
            _fetch_run(store, manifest, directory)
            return manifest
        except CheckpointError as error:
            earlier = next(manifests, None)
            if earlier is None:
                raise CheckpointError(
                    "mirror", f"{store.url}: no commit of the mirror is whole ({error})"
                ) from error
            say(f"{store.url}: {error}; using the mirror of step {earlier.step}")
            manifest = earlier


def _newest_first(store: ObjectStore, newest: Manifest) -> Iterator[Manifest]:
    """Yield a commit, then the earlier ones that it keeps."""
    yield newest
    yield from with_attempts(lambda: run(read_kept(newest), store))


def _fetch_run(store: ObjectStore, manifest: Manifest, directory: RunDirectory) -> None:
    """Fetch all files, the ledger last, and record that there are no other checkpoints."""
    contents = manifest.contents
    checkpoint = checkpoint_names.file_name(manifest.step)
    _remove_others(directory, manifest)
    if any(name.startswith("series/") for name in contents.files):
        directory.folder.subfolder(directory.series.name).create()
    for name, objects in contents.files.items():
        if name != directory.ledger.name:
            _fetch(store, objects, *_place(directory, name))
    _fetch(store, [contents.config], directory.folder, directory.config.name)
    _fetch(store, [contents.checkpoint], directory.checkpoint_folder, checkpoint)
    ledger = contents.files.get(directory.ledger.name, ())
    _fetch(store, ledger, directory.folder, directory.ledger.name)
    sha256 = _acknowledge_only(manifest, directory)
    status = MirrorStatus(
        store.url,
        epoch=manifest.key.epoch,
        seq=manifest.key.seq,
        step=manifest.step,
        sha256=sha256,
    )
    status.write(directory.folder)


def _acknowledge_only(manifest: Manifest, directory: RunDirectory) -> str:
    """Record that the run has this checkpoint and no other, and return the sha256 in the ledger.

    The ledger may be of a later moment than the checkpoint, and tell that it was pruned.
    CheckpointError if the ledger is not that of the run, or does not know the checkpoint.
    """
    ledger = directory.repair_ledger()
    event = ledger.newest_checkpoint(manifest.step)
    name = names.log(manifest.key)
    if ledger.run_id != manifest.run_id:
        raise CheckpointError("mirror", f"{name} has the ledger of another run")
    folder = directory.checkpoint_folder
    checkpoint = open_verified(checkpoint_names.file_name(manifest.step), folder.dir_fd())
    checkpoint.file.close()
    sha256 = checkpoint.digest
    if event is None or event["sha256"] != sha256:
        raise CheckpointError("mirror", f"{name} has a checkpoint that its ledger does not know")
    expected = expected_checkpoints(ledger)
    if manifest.step not in expected:
        facts = {key: value for key, value in event.items() if key not in ("event", "time")}
        directory.append_ledger("checkpoint", **facts | {"pruned": []})
    others = expected.keys() - {manifest.step}
    if others:
        directory.append_ledger("prune", steps=sorted(others), missing=True)
    return sha256


def _place(directory: RunDirectory, name: str) -> tuple[Folder, str]:
    """Return the folder and the file name of a file as a manifest names it, which was checked."""
    folder, _, base = name.rpartition("/")
    return directory.folder.subfolder(folder) if folder else directory.folder, base


def _remove_others(directory: RunDirectory, manifest: Manifest) -> None:
    """Remove the files of an earlier pull that this commit does not have."""
    kept = {checkpoint_names.file_name(manifest.step)}
    kept |= {name.rpartition("/")[2] for name in manifest.contents.files}
    for path in (directory.checkpoints, directory.series):
        folder = directory.folder.subfolder(path.name)
        for name in folder.names():
            if name not in kept and ".aside-" not in name:
                folder.remove(name)
    if directory.metrics.name not in kept:
        directory.folder.remove(directory.metrics.name)


def _fetch(store: ObjectStore, objects: Sequence[StoredObject], folder: Folder, name: str) -> None:
    """Fetch a file, which appears whole or not at all, unless it is there already."""
    if _is_there(folder, name, objects):
        return

    def fetch() -> None:
        with folder.publishing(name) as descriptor:
            for chunk in fetched(store, objects):
                write_all(descriptor, chunk)

    try:
        with_attempts(fetch)
    except CheckpointError:  # damaged in the store, or only on the way
        with_attempts(fetch)


def fetched(store: ObjectStore, objects: Iterable[StoredObject]) -> Iterator[bytes]:
    """Yield the bytes of objects; CheckpointError at the end of one that is damaged or missing."""
    for stored in objects:
        sha256 = hashlib.sha256()
        content = store.download(stored.name, stored.size)
        if content is None:
            raise CheckpointError("mirror", f"{stored.name} is missing")
        n_bytes = 0
        for block in content:
            n_bytes += len(block)
            if n_bytes > stored.size:
                break
            sha256.update(block)
            yield bytes(block)
        if n_bytes != stored.size or sha256.hexdigest() != stored.sha256:
            raise CheckpointError("mirror", f"{stored.name} is damaged (sha256 mismatch)")


def _is_there(folder: Folder, name: str, objects: Sequence[StoredObject]) -> bool:
    chunks = [Digest(stored.sha256, stored.size) for stored in objects]
    if folder.stat(name) is None:
        return False
    try:
        with folder.open_regular(name) as file:
            size = os.fstat(file.fileno()).st_size
            is_whole = size == sum(chunk.size for chunk in chunks)
            return is_whole and len(matching_pieces(file, size, chunks)) == len(chunks)
    except (OSError, StepctlError):
        return False
