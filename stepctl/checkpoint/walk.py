"""Walks over all objects of a checkpoint and refuses any that the format does not list."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import h5py

from stepctl import yamlio
from stepctl.arena import NAME_PART
from stepctl.checkpoint import userblock
from stepctl.errors import CheckpointError

NUMBERS: dict[str, Any] = {
    "<f4": h5py.h5t.IEEE_F32LE,
    "<f8": h5py.h5t.IEEE_F64LE,
    "<i8": h5py.h5t.STD_I64LE,
    "|u1": h5py.h5t.STD_U8LE,
}
MAX_OBJECTS = 6_000
MAX_TEXT = yamlio.MAX_BYTES
_HEADER_VERSION = 2
_SHOWN = 200  # letters of a path in a message
_MAX_DEPTH = 32
_GROUPS = {"counters", "params", "optimizers", "buffers", "ema", "hooks"}
TEXTS = {"config", "numerics"}


class Walk:
    """Visits every object once and admits only what the format lists."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: set[int] = set()
        self.datasets: dict[str, h5py.Dataset] = {}

    def group(self, group: h5py.Group, prefix: str = "") -> dict[str, h5py.Dataset]:
        if prefix.count("/") > _MAX_DEPTH:
            self._refuse("depth", prefix, f"nested deeper than {_MAX_DEPTH} groups")
        if len(self.seen) + group.id.get_num_objs() > MAX_OBJECTS:
            self._refuse("objects", prefix, f"more than {MAX_OBJECTS} objects")
        for raw_name in list(group.id):
            path = prefix + raw_name.decode("ascii", "backslashreplace")
            if not NAME_PART.fullmatch(path.removeprefix(prefix)):
                self._refuse("name", path, "not a name that the format has")
            if group.id.links.get_info(raw_name).type != h5py.h5l.TYPE_HARD:
                self._refuse("link", path, "not a hard link")
            if not prefix and path not in _GROUPS | TEXTS:
                self._refuse("unknown", path, "not part of the format")
            self._object(h5py.h5o.open(group.id, raw_name), path)
        for text in TEXTS if not prefix else ():
            if text not in self.datasets:
                self._refuse("missing", text, "missing")
        return self.datasets

    def _object(self, found: Any, path: str) -> None:
        info = h5py.h5o.get_info(found)
        if info.addr in self.seen:
            self._refuse("doubled", path, "the same object under a second name")
        self.seen.add(info.addr)
        if info.hdr.version != _HEADER_VERSION:  # older ones have no checksum
            self._refuse("kind", path, "an object of an older HDF5 format")
        if h5py.h5a.get_num_attrs(found):
            self._refuse("attribute", path, "attributes are allowed at the root only")
        if isinstance(found, h5py.h5g.GroupID) and path not in TEXTS:
            self.group(h5py.Group(found), f"{path}/")
        elif isinstance(found, h5py.h5d.DatasetID) and path not in _GROUPS:
            self._dataset(found, path)
        else:
            self._refuse("kind", path, "not the kind of object that the format has there")

    def _dataset(self, found: Any, path: str) -> None:
        creation, kind, space = found.get_create_plist(), found.get_type(), found.get_space()
        if creation.get_layout() != h5py.h5d.CONTIGUOUS:
            self._refuse("layout", path, "not contiguous")
        if creation.get_external_count():
            self._refuse("external", path, "its data lie in another file")
        if creation.get_nfilters():
            self._refuse("filter", path, "filtered")
        if space.get_simple_extent_type() not in (h5py.h5s.SCALAR, h5py.h5s.SIMPLE):
            self._refuse("shape", path, "an empty dataspace")
        if not self._admitted(path, kind, found.shape):
            self._refuse("dtype", path, "a type or shape that the format does not have there")
        if math.prod(max(extent, 1) for extent in found.shape) * kind.get_size() > userblock.MAX_BYTES:
            self._refuse("shape", path, "larger than any file")
        if kind.get_size() > MAX_TEXT:
            self._refuse("text", path, f"longer than {MAX_TEXT} bytes")
        n_bytes = math.prod(found.shape) * kind.get_size()
        if found.get_storage_size() != n_bytes:
            self._refuse("storage", path, "its data are not stored in the file")
        self.datasets[path] = h5py.Dataset(found)

    def _admitted(self, path: str, kind: Any, shape: tuple[int, ...]) -> bool:
        if kind.committed():  # its definition would lie in an object of its own
            return False
        if path in TEXTS:
            return shape == () and is_fixed_string(kind)
        if path.startswith("counters/"):
            return shape == () and kind.equal(NUMBERS["<i8"]) and path.count("/") == 1
        return any(kind.equal(admitted) for admitted in NUMBERS.values())

    def _refuse(self, code: str, path: str, message: str) -> NoReturn:
        shown = path.encode("unicode_escape").decode()
        raise CheckpointError(code, f"{self.name}: /{shown[:_SHOWN]}: {message}")


def is_fixed_string(kind: Any) -> bool:
    return isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
