"""The contents of a mirror's control objects: `Owner` and `Manifest`.

    manifest = Manifest.parse(content, key)    # CheckpointError unless every field is valid
    manifest.to_bytes() == content

An object is a line with its kind and version, a line with the sha256 of the rest, and the rest in
JSON. The same value has the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from stepctl.errors import CheckpointError, printable
from stepctl.mirror import names
from stepctl.mirror.names import Key
from stepctl.rundir import series_names
from stepctl.rundir.ledger import MAX_STEP
from stepctl.rundir.lock import boot_id, is_pid_in_use

MAX_OWNER_BYTES = 4096
MAX_MANIFEST_BYTES = 1 << 22
MAX_OBJECT_BYTES = 1 << 40
MAX_BEAT_SECONDS = 3600.0
_MAX_TEXT = 255  # characters of a host name
_OWNER = "stepctl-owner 1"
_MANIFEST = "stepctl-manifest 1"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{32}")
_SERIES = re.compile(r"series/(.+)\.(?:bin|json)", re.DOTALL)
_UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """An object in `data/`: uploaded for the commit `key`, immutable, named by its content."""

    key: Key
    sha256: str
    size: int  # bytes

    @property
    def name(self) -> str:
        """The object's name in the store."""
        return names.data(self.key, self.sha256)


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

    def objects(self) -> Iterator[StoredObject]:
        """Yield all objects; one that is used twice comes twice."""
        yield self.checkpoint
        yield self.config
        for chunks in self.files.values():
            yield from chunks


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
        contents = self.contents
        return _to_bytes(
            _MANIFEST,
            {
                "key": list(self.key),
                "run_id": self.run_id,
                "nonce": self.nonce,
                "step": contents.step,
                "checkpoint": _object_fields(contents.checkpoint),
                "config": _object_fields(contents.config),
                "files": {
                    name: [_object_fields(chunk) for chunk in chunks]
                    for name, chunks in contents.files.items()
                },
                "previous": [[*kept.key, kept.step] for kept in self.previous],
            },
        )

    @classmethod
    def parse(cls, content: bytes, key: Key) -> Self:
        """Return the manifest of `key`; CheckpointError if the content is not exactly one."""
        with _Checking(names.log(key)):
            fields = _from_bytes(_MANIFEST, content)
            contents = Contents(
                step=_integer(fields["step"], 0, MAX_STEP),
                checkpoint=_parse_object(fields["checkpoint"], key),
                config=_parse_object(fields["config"], key),
                files=_parse_files(fields["files"], key),
            )
            manifest = cls(
                key=_parse_key(fields["key"]),
                run_id=_matching(_ID, fields["run_id"]),
                nonce=_matching(_ID, fields["nonce"]),
                contents=contents,
                previous=_parse_previous(fields["previous"], key, contents.step),
            )
            _check(manifest.key == key, "it was made for another name")
            # refuses unknown and repeated fields
            _check(manifest.to_bytes() == content, "it is not in the normal form")
            return manifest


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
        return cls(
            run_id=run_id,
            nonce=secrets.token_hex(16),
            host=os.uname().nodename,
            boot_id=boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            beat_seconds=float(beat_seconds),
        )

    def is_known_dead(self) -> bool:
        """Tell whether the process has ended for certain: same host, same boot, same namespace.

        A pid in use may be another process's by now, so that the answer is no.
        """
        place = (self.host, self.boot_id, self.pid_namespace)
        if _UNKNOWN in place or place != (os.uname().nodename, boot_id(), _pid_namespace()):
            return False
        return not is_pid_in_use(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}"

    def to_bytes(self) -> bytes:
        """Return the content of the owner's object."""
        return _to_bytes(_OWNER, dataclasses.asdict(self))

    @classmethod
    def parse(cls, content: bytes, epoch: int) -> Self:
        """Return the owner of an epoch; CheckpointError if the content is not exactly one."""
        with _Checking(names.owner(epoch)):
            fields = _from_bytes(_OWNER, content)
            owner = cls(
                run_id=_matching(_ID, fields["run_id"]),
                nonce=_matching(_ID, fields["nonce"]),
                host=_text(fields["host"]),
                boot_id=_text(fields["boot_id"]),
                pid_namespace=_text(fields["pid_namespace"]),
                pid=_integer(fields["pid"], 1, 1 << 31),
                beat_seconds=_seconds(fields["beat_seconds"]),
            )
            _check(owner.to_bytes() == content, "it is not in the normal form")
            return owner


# --- the form of an object


def _to_bytes(kind: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    return f"{kind}\nsha256: {hashlib.sha256(body).hexdigest()}\n".encode() + body


def _from_bytes(kind: str, content: bytes) -> dict[str, Any]:
    first, _, rest = content.partition(b"\n")
    _check(first == kind.encode(), f"it does not begin with {kind!r}")
    second, _, body = rest.partition(b"\n")
    digest = hashlib.sha256(body).hexdigest()
    _check(second == f"sha256: {digest}".encode(), "sha256 mismatch")
    fields = json.loads(body)
    _check(isinstance(fields, dict), "it is not a JSON object")
    return dict(fields)


class _Checking:
    """A context manager that raises CheckpointError with the object's name for a bad value."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError):
            problem = f"{error.args[0]} is missing"
        elif isinstance(error, ValueError | RecursionError):
            problem = str(error)[:200]
        else:
            return
        raise CheckpointError("mirror", f"{self._name} is damaged ({problem})") from error


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


# --- values


def _integer(value: object, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"an integer from {lowest} to {highest} is needed")
    return value


def _matching(pattern: re.Pattern[str], value: object) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError("hexadecimal digits are needed")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
        raise ValueError(f"a text of 1 to {_MAX_TEXT} characters is needed")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, float) or not 0 < value <= MAX_BEAT_SECONDS or math.isnan(value):
        raise ValueError(f"beat_seconds must be above 0 and at most {MAX_BEAT_SECONDS}")
    return value


def _list(value: object, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError("a list is needed" if length is None else f"{length} values are needed")
    return value


def _parse_key(value: object) -> Key:
    epoch, seq = _list(value, 2)
    return Key(_integer(epoch, 1, names.MAX_NUMBER), _integer(seq, 1, names.MAX_NUMBER))


def _object_fields(stored: StoredObject) -> list[Any]:
    return [*stored.key, stored.sha256, stored.size]


def _parse_object(value: object, manifest: Key) -> StoredObject:
    epoch, seq, sha256, size = _list(value, 4)
    key = _parse_key([epoch, seq])
    _check(key <= manifest, "it names an object of a later commit")
    return StoredObject(key, _matching(_SHA256, sha256), _integer(size, 0, MAX_OBJECT_BYTES))


def _parse_files(value: object, manifest: Key) -> dict[str, tuple[StoredObject, ...]]:
    if not isinstance(value, dict):
        raise ValueError("files must be an object")
    files = {}
    for name, chunks in value.items():
        _check(is_file_name(name), f"{name!r} is not the name of a run's file")
        files[name] = tuple(_parse_object(chunk, manifest) for chunk in _list(chunks))
        n_bytes = sum(chunk.size for chunk in files[name])
        _check(n_bytes <= MAX_OBJECT_BYTES, f"{name} is too large")
    return files


def is_file_name(name: str) -> bool:
    """Tell whether a manifest may contain a file of this name in the run directory."""
    match = _SERIES.fullmatch(name)
    if match is not None:
        return series_names.NAME.fullmatch(match[1]) is not None
    return name in ("ledger.jsonl", "metrics.jsonl")


def _parse_previous(value: object, manifest: Key, step: int) -> tuple[Kept, ...]:
    kept = []
    for epoch, seq, earlier in (_list(fields, 3) for fields in _list(value)):
        kept.append(Kept(_parse_key([epoch, seq]), _integer(earlier, 0, MAX_STEP)))
    _check(_is_falling([manifest, *(one.key for one in kept)]), "previous commits are out of order")
    _check(_is_falling([step, *(one.step for one in kept)]), "previous steps are out of order")
    return tuple(kept)


def _is_falling(values: Iterable[Any]) -> bool:
    ordered = list(values)
    return all(later < earlier for earlier, later in itertools.pairwise(ordered))


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return _UNKNOWN
