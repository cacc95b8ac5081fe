"""The contents of a mirror, and the check of its objects. Nothing is changed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any, TypedDict

from stepctl.checkpoint import names
from stepctl.errors import CheckpointError
from stepctl.mirror import fetch
from stepctl.mirror.manifest import Manifest
from stepctl.mirror.reading import Ownership, read_manifest, read_owner
from stepctl.mirror.store import ObjectStore
from stepctl.mirror.transition import run
from stepctl.reports.sandboxed import inspect_path
from stepctl.reports.verify import FileProblem
from stepctl.system.sandbox import Sandbox


class MirrorContents(TypedDict):
    """The newest commit of a mirror, and its owner."""

    url: str
    run_id: str
    epoch: int
    seq: int
    step: int
    kept_steps: list[int]  # of the earlier commits, newest first
    objects: int
    bytes: int
    owner: str
    released: bool  # whether the owner has ended


class VerifiedCommit(TypedDict):
    """A commit all of whose objects are intact."""

    epoch: int
    seq: int
    step: int
    objects: int
    bytes: int


def newest_commit(store: ObjectStore) -> Manifest:
    """Return the newest commit; ConfigError if the mirror holds no run."""
    newest = fetch.read_mirror(store)
    if newest is None:
        raise fetch.no_run(store.url)
    return newest


def describe(store: ObjectStore, manifest: Manifest) -> MirrorContents:
    """Return what a commit holds."""
    objects = list(manifest.contents.objects())
    ownership: Ownership | None = fetch.with_attempts(lambda: run(read_owner(), store))
    assert ownership is not None  # a commit has an owner
    return {
        "url": store.url,
        "run_id": manifest.run_id,
        "epoch": manifest.key.epoch,
        "seq": manifest.key.seq,
        "step": manifest.step,
        "kept_steps": [kept.step for kept in manifest.previous],
        "objects": len(objects),
        "bytes": sum(stored.size for stored in objects),
        "owner": str(ownership.owner),
        "released": ownership.is_released,
    }


def inspect_mirrored(store: ObjectStore, manifest: Manifest, pattern: str) -> Any:
    """Return the contents of a commit's checkpoint, as `inspect_path` does; it is downloaded."""
    name = names.file_name(manifest.step)
    with tempfile.TemporaryDirectory(prefix="stepctl-") as folder:
        path = os.path.join(folder, name)

        def download() -> None:
            with open(path, "wb") as file:
                for block in fetch.fetched(store, [manifest.contents.checkpoint]):
                    file.write(block)

        fetch.with_attempts(download)
        with Sandbox() as sandbox:
            return sandbox.call(inspect_path, path, pattern)


def verify_mirror(
    store: ObjectStore, report: Callable[[float], None] = lambda share: None
) -> tuple[list[VerifiedCommit], list[FileProblem]]:
    """Download every object of the newest commit and of those it keeps, and check its sha256.

    `report` gets the share of the objects that are checked. ConfigError if the mirror holds no run.
    """
    newest = newest_commit(store)
    commits = [newest]
    problems = []
    for kept in newest.previous:
        try:
            earlier = fetch.with_attempts(lambda key=kept.key: run(read_manifest(key), store))  # type: ignore[misc]
        except CheckpointError as error:
            problems.append(FileProblem(error.code, str(kept.key), str(error)))
            continue
        if earlier is None:
            message = f"the manifest {kept.key} of step {kept.step} is missing"
            problems.append(FileProblem("missing", str(kept.key), message))
        else:
            commits.append(earlier)
    n_objects = len({stored.name for commit in commits for stored in commit.contents.objects()})
    checked: dict[str, str | None] = {}  # name -> what is wrong
    good: list[VerifiedCommit] = []
    for commit in commits:
        objects = list(dict.fromkeys(commit.contents.objects()))
        for stored in objects:
            if stored.name in checked:
                continue
            report(len(checked) / n_objects)
            checked[stored.name] = _problem_of(store, stored)
            if checked[stored.name] is not None:
                problems.append(FileProblem("mirror", stored.name, str(checked[stored.name])))
        if all(checked[stored.name] is None for stored in objects):
            good.append(
                {
                    "epoch": commit.key.epoch,
                    "seq": commit.key.seq,
                    "step": commit.step,
                    "objects": len(objects),
                    "bytes": sum(stored.size for stored in objects),
                }
            )
    return good, problems


def _problem_of(store: ObjectStore, stored: Any) -> str | None:
    def read() -> None:
        for _ in fetch.fetched(store, [stored]):
            pass

    try:
        fetch.with_attempts(read)
    except CheckpointError as error:
        return str(error)
    return None
