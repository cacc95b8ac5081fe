"""The place of each array in a checkpoint file.

HDF5 creates the objects and reserves the space. It never reads an array.
"""

import functools
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from stepctl import __version__
from stepctl.checkpoint import user_block
from stepctl.checkpoint.metadata import Metadata
from stepctl.checkpoint.root_header import RootHeader
from stepctl.checkpoint.walk import VALUES
from stepctl.state.arena import Array

FORMAT = "stepctl-checkpoint"
_TEXT_MULTIPLE = 256
_MARKED_STEP = 0x57EB_0C1C_57EB_0C1C  # found in the root group's header by its bytes
_TASK_GROUPS = ("counters", "params", "optimizers", "buffers", "hooks")
_PROGRAM_GROUPS = ("counters", "state", "hooks")
# (path, shape, dtype, encoding) of each array; numbers have the encoding ""
_ArrayTypes = tuple[tuple[str, tuple[int, ...], str, str], ...]
# the bytes of a file except its arrays, and the offset of each array that is not empty
Layout = tuple[Metadata, dict[str, int]]


def lay_out(arrays: Mapping[str, Array], *, run: str, run_id: str, step: int) -> Layout:
    """Return the layout of a file of these arrays; fast if only the step changes between calls."""
    types = tuple(
        (path, array.shape, array.dtype.str, _encoding(array)) for path, array in arrays.items()
    )
    template, offsets, root_header = _template(types, run, run_id)
    metadata = template.copy()
    root_header.write_step(metadata, step)
    return metadata, offsets


@functools.lru_cache(maxsize=4)
def _template(
    types: _ArrayTypes, run: str, run_id: str
) -> tuple[Metadata, dict[str, int], RootHeader]:
    """Return the layout, and the header that holds the step, which is not the right one yet."""
    metadata = Metadata()
    offsets = {}
    with _create_file(metadata) as file:
        root_address = h5py.h5o.get_info(file.id).addr
        root = file.attrs
        root.create("format", text(FORMAT))
        root.create("format_version", np.int64(user_block.VERSION))
        root.create("global_step", np.int64(_MARKED_STEP))
        root.create("created_by", text(f"stepctl {__version__}"))
        root.create("run", text(run.encode("utf-8", "replace").decode()))
        root.create("run_id", text(run_id))
        groups = {"": file.id}
        has_program = any(path == VALUES for path, *_ in types)
        for group in _PROGRAM_GROUPS if has_program else _TASK_GROUPS:
            _create_group(groups, group)
        for path, shape, dtype, encoding in types:
            offset = _create_dataset(groups, path, shape, dtype, encoding)
            if 0 not in shape:
                offsets[path] = offset
    start = user_block.SIZE + root_address
    return metadata, offsets, RootHeader.find(metadata, start, _MARKED_STEP)


def _create_file(metadata: Metadata) -> h5py.File:
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_userblock(user_block.SIZE)
    _set_reproducible(creation)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, metadata)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    return h5py.File(h5py.h5f.create(b"checkpoint", h5py.h5f.ACC_TRUNC, creation, access))


def _create_group(groups: dict[str, Any], path: str) -> Any:
    """Return a group, created with its parents if needed; `groups` caches them by path."""
    if path not in groups:
        parent, _, name = path.rpartition("/")
        creation = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
        _set_reproducible(creation)
        groups[path] = h5py.h5g.create(
            _create_group(groups, parent), name.encode(), lcpl=_link(name), gcpl=creation
        )
    return groups[path]


def _link(name: str) -> Any:
    """Return the properties of a link: keys of a program's state may have names beyond ASCII."""
    if name.isascii():
        return None
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_char_encoding(h5py.h5t.CSET_UTF8)
    return link


def _set_reproducible(creation: Any) -> None:
    """Keep times out of a group, and its links in order: the same state makes the same bytes."""
    creation.set_link_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    creation.set_obj_track_times(False)


def _create_dataset(
    groups: dict[str, Any], path: str, shape: tuple[int, ...], dtype: str, encoding: str
) -> int:
    """Create a dataset whose space is reserved but not written; return its offset in the file."""
    parent, _, name = path.rpartition("/")
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_obj_track_times(False)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    numpy_type = np.dtype(dtype)
    if encoding:
        numpy_type = h5py.string_dtype(encoding, numpy_type.itemsize)
    file_type = h5py.h5t.py_create(numpy_type, logical=True)
    group = _create_group(groups, parent)
    dataset = h5py.h5d.create(group, name.encode(), file_type, space, creation, _link(name))
    return dataset.get_offset() or 0


def _encoding(array: Array) -> str:
    """Return "ascii" or "utf-8" for a text, "" for numbers: Octave's `load` cannot read UTF-8."""
    if array.dtype.kind != "S":
        return ""
    return "ascii" if array.tobytes().isascii() else "utf-8"


def text(content: str) -> Array:
    """Return a text as the format stores it: a fixed-length UTF-8 string, of at least one byte."""
    data = content.encode()
    return np.array(data, h5py.string_dtype("utf-8", max(len(data), 1)))


def padded_text(content: str) -> Array:
    """Return a text with spaces at its end, so that its length, and the layout, rarely change."""
    return text(content.ljust(-(-len(content) // _TEXT_MULTIPLE) * _TEXT_MULTIPLE))
