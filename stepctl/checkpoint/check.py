"""Checks of checkpoint files, in the sandbox.

    facts = sandbox.call(check, "step-00000100.h5")

HDF5 walks over the objects of a file. What objects there are follows from the file's metadata, the
bytes outside of its arrays, and the files of one run differ there in the root attribute
`global_step` and the checksum beside it only. A file whose metadata are otherwise those of the file
before it has the same objects, and needs no walk: with small models, that takes a tenth of the time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypedDict

import h5py
import numpy as np

from stepctl.checkpoint import names, user_block
from stepctl.checkpoint.codec import Reader
from stepctl.checkpoint.metadata import Metadata
from stepctl.checkpoint.root_header import RootHeader
from stepctl.checkpoint.walk import TEXTS, VALUES, Walk
from stepctl.errors import CheckpointError, StepctlError
from stepctl.state.counters import GLOBAL_STEP, Counters
from stepctl.state.value_decoder import decode

_MAX_BYTES = 1 << 22  # of a file that is compared: the walk over a larger one hardly counts
_COUNTERS = "counters/"
_STATE = "state/"

Extents = dict[str, tuple[int, int]]  # start and end in the file, by path


class CheckedFile(TypedDict):
    """The facts about a verified checkpoint that the sandbox passes on."""

    name: str
    step: int
    sha256: str
    config: str  # YAML
    run_id: str | None


def check(path: str) -> CheckedFile:
    """Open and verify a checkpoint; CheckpointError if it is not good."""
    return _checker.check(path)


class _Checker:
    """Checks files; it keeps the layout of the last one that HDF5 walked over."""

    def __init__(self) -> None:
        self._known: KnownLayout | None = None

    def check(self, path: str) -> CheckedFile:
        if self._known is not None:
            facts = self._known.check(path)
            if facts is not None:
                return facts
        with Reader(path) as reader:
            for name, (_, dtype) in reader.array_shapes().items():
                if dtype == "bool":
                    for _ in reader.parts(name):  # refuses bytes other than 0 and 1
                        pass
            self._known = KnownLayout.of(reader)
            return _facts(reader)


_checker = _Checker()


def _facts(reader: Reader) -> CheckedFile:
    header = reader.header
    return {
        "name": reader.name,
        "step": header.global_step,
        "sha256": header.sha256,
        "config": header.config,
        "run_id": header.run_id,
    }


@dataclass(frozen=True)
class KnownLayout:
    """The metadata of a checked file, and the extents of its arrays.

    known = KnownLayout.of(reader)
    facts = known.check("step-00000200.h5")
    """

    facts: CheckedFile
    version: int
    size: int
    metadata: bytes  # without the step and the checksum
    root: RootHeader
    extents: Extents  # of the arrays that are not empty, in order
    booleans: list[str]
    texts: dict[str, bytes]  # of this file
    state_paths: list[str]

    @classmethod
    def of(cls, reader: Reader) -> Self | None:
        """Return the layout of a checked file; None if it is uncertain or the file is large."""
        content = reader.content(_MAX_BYTES)
        if content is None or not reader.datasets:
            return None
        extents = _extents(reader.datasets)
        file = next(iter(reader.datasets.values())).file
        start = user_block.SIZE + h5py.h5o.get_info(file.id).addr
        try:
            root = RootHeader.find(_in_memory(content), start, reader.header.global_step)
        except StepctlError:  # the eight bytes of the step occur twice
            return None
        if not _decides_objects(content, extents, root, file, reader.name):
            return None
        return cls(
            facts=_facts(reader),
            version=reader.version,
            size=len(content),
            metadata=_metadata(content, extents, root),
            root=root,
            extents=extents,
            booleans=[path for path in extents if reader.datasets[path].dtype == bool],
            texts={path: content[slice(*extents[path])] for path in TEXTS if path in extents},
            state_paths=[
                path.removeprefix(_STATE) for path in reader.datasets if path.startswith(_STATE)
            ],
        )

    def check(self, path: str) -> CheckedFile | None:
        """Return the facts about a good file of this layout; None if it needs the walk.

        Errors as in `user_block.open_verified`.
        """
        verified = user_block.open_verified(path)
        with verified.file as file:
            if verified.version != self.version or verified.status.st_size != self.size:
                return None
            file.seek(0)
            content = file.read()
            if len(content) != self.size or not verified.is_unchanged():
                return None
        root = self.root
        if root.stored_checksum(content) != root.checksum_of(content):
            return None
        if _metadata(content, self.extents, root) != self.metadata:
            return None
        name = os.path.basename(path)
        step = root.stored_step(content)
        if names.step_of(name) not in (None, step) or not self._has_good_arrays(content, step):
            return None
        return {**self.facts, "name": name, "step": step, "sha256": verified.digest}

    def _has_good_arrays(self, content: bytes, step: int) -> bool:
        """Tell whether counters, texts and booleans are valid."""
        data = {path: content[start:end] for path, (start, end) in self.extents.items()}
        counters = {
            path.removeprefix(_COUNTERS): int.from_bytes(value, "little", signed=True)
            for path, value in data.items()
            if path.startswith(_COUNTERS)
        }
        if counters.get(GLOBAL_STEP) != step:
            return False
        try:
            Counters(counters)
            if data.get(VALUES) != self.texts.get(VALUES):
                text = data[VALUES].rstrip(b"\0").decode()
                decode(text, dict.fromkeys(self.state_paths, np.empty(())))
        except (ValueError, CheckpointError):
            return False
        if any(data[path] != text for path, text in self.texts.items() if path != VALUES):
            return False
        return all(max(data[path]) <= 1 for path in self.booleans)


def _extents(datasets: Mapping[str, h5py.Dataset]) -> Extents:
    """Return the extents of all arrays that are not empty, by their start."""
    found = {}
    for path, dataset in datasets.items():
        n_bytes = dataset.size * dataset.dtype.itemsize
        if n_bytes:
            start = dataset.id.get_offset()
            found[path] = (start, start + n_bytes)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _metadata(content: bytes, extents: Extents, root: RootHeader) -> bytes:
    """Return all bytes after the user block that are in no array, without step and checksum."""
    content = root.blank(content)
    parts = []
    position = user_block.SIZE
    for start, end in extents.values():
        parts.append(content[position:start])
        position = max(position, end)
    parts.append(content[position:])
    return b"".join(parts)


def _decides_objects(
    content: bytes, extents: Extents, root: RootHeader, file: h5py.File, name: str
) -> bool:
    """Tell whether the metadata alone determine the objects, and `root.step` the step.

    Verified by a trial: with another step and random bytes in all arrays, HDF5 must find the same
    objects. A hostile file may have metadata inside an array, or its step elsewhere.
    """
    changed = bytearray(content)
    for start, end in extents.values():
        changed[start:end] = os.urandom(end - start)
    copy = _in_memory(changed)
    step = root.stored_step(content) ^ 1
    root.write_step(copy, step)
    try:
        with h5py.File(copy, "r") as other:
            expected = _objects(file, name)
            expected["attributes"]["global_step"] = step
            return _objects(other, name) == expected
    except Exception:  # h5py raises errors of many types
        return False


def _in_memory(content: bytes | bytearray) -> Metadata:
    file = Metadata()
    file.write(content)
    return file


def _objects(file: h5py.File, name: str) -> dict[str, dict[str, Any]]:
    """Return all facts about the objects of a file."""
    datasets = Walk(name).visit(file)
    return {
        "arrays": {path: (array.shape, array.dtype) for path, array in datasets.items()},
        "extents": dict(_extents(datasets)),
        "attributes": dict(file.attrs),
    }
