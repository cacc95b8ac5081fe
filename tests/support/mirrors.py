"""Owners, contents and commits of a mirror, without a run."""

from __future__ import annotations

import hashlib
import io

from stepctl.mirror.manifest import Contents, Manifest, Owner, StoredObject
from stepctl.mirror.protocol import Claim, commit, upload
from stepctl.mirror.store import ObjectStore
from stepctl.mirror.transition import run

RUN_ID = "0" * 31 + "1"


def make_owner(number: int, run_id: str = RUN_ID, beat_seconds: float = 10.0) -> Owner:
    """Return the owner number 1, 2, ..., a process of another host."""
    return Owner(
        run_id=run_id,
        nonce=f"{number:032x}",
        host=f"host{number}",
        boot_id="boot",
        pid_namespace="pid:[1]",
        pid=number,
        beat_seconds=beat_seconds,
    )


def upload_bytes(claim: Claim, store: ObjectStore, content: bytes) -> StoredObject:
    """Upload an object for the next commit."""
    sha256 = hashlib.sha256(content).hexdigest()
    return run(upload(claim, io.BytesIO(content), len(content), sha256), store)


def make_contents(claim: Claim, store: ObjectStore, step: int) -> Contents:
    """Upload a checkpoint and a config; a ledger grows by one chunk per commit."""
    files: dict[str, tuple[StoredObject, ...]] = {}
    if claim.newest is not None:
        files.update(claim.newest.contents.files)
    chunk = upload_bytes(claim, store, f"ledger of {step}\n".encode())
    files["ledger.jsonl"] = (*files.get("ledger.jsonl", ()), chunk)
    return Contents(
        step=step,
        checkpoint=upload_bytes(claim, store, f"checkpoint of {step}".encode()),
        config=upload_bytes(claim, store, b"seed: 0\n"),
        files=files,
    )


def commit_step(claim: Claim, store: ObjectStore, step: int, keep_last: int = 3) -> Claim:
    """Upload and commit the contents of a step."""
    return run(commit(claim, make_contents(claim, store, step), keep_last), store)


def is_whole(manifest: Manifest, store: ObjectStore) -> bool:
    """Tell whether all objects of a commit are in the store, with the right bytes."""
    for stored in manifest.contents.objects():
        content = store.get(stored.name, stored.size)
        if content is None or hashlib.sha256(content).hexdigest() != stored.sha256:
            return False
    return True
