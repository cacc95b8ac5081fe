"""The walk over all objects of a checkpoint, which refuses any that the format does not list."""

import math
from typing import Any, NoReturn

import h5py
import numpy as np

from stepctl.checkpoint import user_block
from stepctl.config import yaml
from stepctl.errors import CheckpointError
from stepctl.state import values
from stepctl.state.arena import NAME_PART

NUMBER_TYPES: dict[str, Any] = {
    "<f4": h5py.h5t.IEEE_F32LE,
    "<f8": h5py.h5t.IEEE_F64LE,
    "<i8": h5py.h5t.STD_I64LE,
    "|u1": h5py.h5t.STD_U8LE,
}
STATE_TYPES: tuple[Any, ...] = tuple(
    h5py.h5t.py_create(np.dtype(name).newbyteorder("<"), logical=True) for name in values.DTYPES
)  # bool is an enumeration of int8, complex a compound of "r" and "i"
MAX_OBJECTS = 6_000
_HEADER_VERSION = 2
_MAX_SHOWN = 200  # characters of a path in a message
_MAX_DEPTH = values.MAX_DEPTH
_STATE = "state"  # the folder of a program's arrays
_GROUPS = {"counters", "params", "optimizers", "buffers", "ema", "hooks", _STATE}
VALUES = "values"  # only a program's checkpoint has it
_REQUIRED_TEXTS = {"config", "numerics"}
TEXTS = {"config": yaml.MAX_BYTES, "numerics": yaml.MAX_BYTES, VALUES: values.MAX_TEXT}


class Walk:
    """Visits every object once; CheckpointError at the first that the format does not list.

    datasets = Walk("step-00000100.h5").visit(file)
    """

    def __init__(self, name: str) -> None:
        self._name = name  # of the file, for messages
        self._addresses: set[int] = set()
        self._datasets: dict[str, h5py.Dataset] = {}

    def visit(self, group: h5py.Group, prefix: str = "") -> dict[str, h5py.Dataset]:
        """Visit a group and all below it; return path -> dataset of all that were visited."""
        if prefix.count("/") > _MAX_DEPTH:
            self._refuse("depth", prefix, f"nested deeper than {_MAX_DEPTH} groups")
        if len(self._addresses) + group.id.get_num_objs() > MAX_OBJECTS:
            self._refuse("objects", prefix, f"more than {MAX_OBJECTS} objects")
        for raw_name in list(group.id):
            in_state = prefix.startswith(f"{_STATE}/")
            path = prefix + raw_name.decode("utf-8" if in_state else "ascii", "backslashreplace")
            name = path.removeprefix(prefix)
            is_name = values.is_key(name) if in_state else NAME_PART.fullmatch(name)
            if not is_name or name.encode() != raw_name:
                self._refuse("name", path, "not a valid name")
            if group.id.links.get_info(raw_name).type != h5py.h5l.TYPE_HARD:
                self._refuse("link", path, "not a hard link")
            if not prefix and path not in _GROUPS | TEXTS.keys():
                self._refuse("unknown", path, "not part of the format")
            self._visit_object(h5py.h5o.open(group.id, raw_name), path)
        if not prefix:
            for text in self._required_texts():
                if text not in self._datasets:
                    self._refuse("missing", text, "missing")
        return self._datasets

    def _required_texts(self) -> set[str]:
        if any(path.startswith(f"{_STATE}/") for path in self._datasets):
            return _REQUIRED_TEXTS | {VALUES}
        return _REQUIRED_TEXTS

    def _visit_object(self, found: Any, path: str) -> None:
        info = h5py.h5o.get_info(found)
        if info.addr in self._addresses:
            self._refuse("doubled", path, "a second name of an object")
        self._addresses.add(info.addr)
        if info.hdr.version != _HEADER_VERSION:  # older headers have no checksum
            self._refuse("kind", path, "an object of an older HDF5 format")
        if h5py.h5a.get_num_attrs(found):
            self._refuse("attribute", path, "attributes are allowed at the root only")
        if isinstance(found, h5py.h5g.GroupID) and path not in TEXTS:
            self.visit(h5py.Group(found), f"{path}/")
        elif isinstance(found, h5py.h5d.DatasetID) and path not in _GROUPS:
            self._visit_dataset(found, path)
        else:
            self._refuse("kind", path, "not the kind of object that the format has at this path")

    def _visit_dataset(self, found: Any, path: str) -> None:
        creation = found.get_create_plist()
        kind = found.get_type()
        space = found.get_space()
        if creation.get_layout() != h5py.h5d.CONTIGUOUS:
            self._refuse("layout", path, "not contiguous")
        if creation.get_external_count():
            self._refuse("external", path, "its data are in another file")
        if creation.get_nfilters():
            self._refuse("filter", path, "filtered")
        if space.get_simple_extent_type() not in (h5py.h5s.SCALAR, h5py.h5s.SIMPLE):
            self._refuse("shape", path, "an empty dataspace")
        if not _is_admitted(path, kind, found.shape):
            self._refuse(
                "dtype", path, "a type or shape that the format does not have at this path"
            )
        nonzero_extents = [max(extent, 1) for extent in found.shape]
        if math.prod(nonzero_extents) * kind.get_size() > user_block.MAX_BYTES:
            self._refuse("shape", path, "larger than any file")
        if path in TEXTS and kind.get_size() > TEXTS[path]:
            self._refuse("text", path, f"longer than {TEXTS[path]} bytes")
        n_bytes = math.prod(found.shape) * kind.get_size()
        if found.get_storage_size() != n_bytes:
            self._refuse("storage", path, "its data are not stored in the file")
        self._datasets[path] = h5py.Dataset(found)

    def _refuse(self, code: str, path: str, message: str) -> NoReturn:
        shown = path.encode("unicode_escape").decode()
        raise CheckpointError(code, f"{self._name}: /{shown[:_MAX_SHOWN]}: {message}")


def _is_admitted(path: str, kind: Any, shape: tuple[int, ...]) -> bool:
    """Tell whether the format has a dataset of this type and shape at the path."""
    if kind.committed():  # its definition would be an object of its own
        return False
    if path in TEXTS:
        return shape == () and is_fixed_string(kind)
    if path.startswith("counters/"):
        return shape == () and kind.equal(NUMBER_TYPES["<i8"]) and path.count("/") == 1
    types = STATE_TYPES if path.startswith(f"{_STATE}/") else NUMBER_TYPES.values()
    return any(kind.equal(admitted) for admitted in types)


def is_fixed_string(kind: Any) -> bool:
    """Tell whether an HDF5 type is a string of fixed length."""
    return isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
