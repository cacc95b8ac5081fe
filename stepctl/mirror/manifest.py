"""The contents of a mirror's control objects: `Owner` and `Manifest`.

    manifest = Manifest.parse(content, key)    # CheckpointError unless every field is as it must be
    manifest.to_bytes() == content

An object is a line with its kind and version, a line with the sha256 of the rest, and the rest in
JSON. The same value has the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Self

from stepctl.mirror.names import Key

MAX_OWNER_BYTES = 4096
MAX_MANIFEST_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """An object in `data/`: uploaded for the commit `key`, immutable, named by its content."""

    key: Key
    sha256: str
    size: int  # bytes

    @property
    def name(self) -> str:
        """The object's name in the store."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a commit publishes: one checkpoint and the run's files up to it.

    `files` maps ledger.jsonl, metrics.jsonl, series/NAME.bin and series/NAME.json (no other name)
    to the objects whose concatenation is the file. The checkpoint's file name follows from `step`.
    """

    step: int
    checkpoint: StoredObject
    config: StoredObject  # config.yaml
    files: Mapping[str, tuple[StoredObject, ...]]

    def objects(self) -> set[StoredObject]:
        """Return all objects."""
        raise NotImplementedError


class Kept(NamedTuple):
    """An earlier commit that a manifest keeps."""

    key: Key
    step: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A commit. It alone names every object of the run at one step."""

    key: Key
    run_id: str
    nonce: str  # of the owner who made it
    contents: Contents
    previous: tuple[Kept, ...]  # earlier commits that are kept, newest first, by falling step

    @property
    def step(self) -> int:
        """The checkpoint's global step."""
        return self.contents.step

    def to_bytes(self) -> bytes:
        """Return the content of the manifest's object."""
        raise NotImplementedError

    @classmethod
    def parse(cls, content: bytes, key: Key) -> Self:
        """Return the manifest of `key`; CheckpointError if the content is not exactly one."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that owns an epoch. Only its nonce, drawn at random, identifies it."""

    run_id: str
    nonce: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    beat_seconds: float  # the interval between two beats

    @classmethod
    def this_process(cls, run_id: str, beat_seconds: float = 10.0) -> Self:
        """Return this process as an owner, with a new nonce."""
        raise NotImplementedError

    def is_known_dead(self) -> bool:
        """Tell whether the process has ended for certain: same host, same boot, same namespace."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def to_bytes(self) -> bytes:
        """Return the content of the owner's object."""
        raise NotImplementedError

    @classmethod
    def parse(cls, content: bytes, epoch: int) -> Self:
        """Return the owner of an epoch; CheckpointError if the content is not exactly one."""
        raise NotImplementedError
