"""Pushing: mirroring the newest checkpoint of a run that no process trains."""

from __future__ import annotations

import contextlib

from stepctl.checkpoint.store import Store
from stepctl.config.model import MirrorConfig
from stepctl.errors import ConfigError
from stepctl.mirror import fetch
from stepctl.mirror.claimed import claimed_mirror
from stepctl.mirror.manifest import Manifest
from stepctl.mirror.store import ObjectStore, open_store
from stepctl.mirror.writer import Checkpoint, RunWriter
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.messages import Say
from stepctl.runs.mirroring import refuse_unknown_checkpoint
from stepctl.runs.records import RunRecords, lock_records


def push(
    directory: RunDirectory,
    url: str,
    say: Say,
    *,
    take_over: bool = False,
    upload_all: bool = False,
) -> Manifest:
    """Make the newest good checkpoint of a run the newest commit of a mirror, and return that.

    With `upload_all` nothing that the mirror has is used again or kept. Raises OwnedByAnother if another
    process owns the mirror, ConfigError if it holds another run or a checkpoint that this copy of
    the run does not know, RunInUseError if a process trains the run, StoreUnavailable if the store
    does not answer.
    """
    with lock_records(directory, say) as records:
        ledger = records.ledger
        if ledger.run_id is None:
            raise ConfigError(f"{directory.path}: has no run id yet; resume it once, then push it")
        with Store(directory.checkpoint_folder, lambda: ledger).newest(say) as reader:
            newest = Checkpoint(reader.header.global_step, reader.header.sha256)
        store = open_store(url)
        with claimed_mirror(store, ledger.run_id, say, take_over=take_over) as claimed:
            mirrored = claimed.claim.newest
            if mirrored is not None:
                refuse_unknown_checkpoint(store, mirrored, directory, ledger, newest)
                upload_all = upload_all or _lacks_objects(store, mirrored)
            writer = RunWriter(store, claimed.claim, directory.folder, upload_all=upload_all)
            with contextlib.closing(writer):
                keep_last = 1 if upload_all else _keep_last(records)
                fetch.with_attempts(lambda: writer.write(newest, keep_last))
            assert writer.claim.newest is not None
            return writer.claim.newest


def _lacks_objects(store: ObjectStore, manifest: Manifest) -> bool:
    """Tell whether an object of a commit is missing, or has another size."""
    return any(
        fetch.with_attempts(lambda name=stored.name: store.size(name)) != stored.size  # type: ignore[misc]
        for stored in manifest.contents.objects()
    )


def _keep_last(records: RunRecords) -> int:
    section = records.document.value.get("mirror")
    keep_last = section.get("keep_last") if isinstance(section, dict) else None
    if isinstance(keep_last, int) and keep_last > 0:
        return keep_last
    default: int = MirrorConfig.model_fields["keep_last"].default
    return default
