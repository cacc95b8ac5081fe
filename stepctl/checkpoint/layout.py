"""Where in a checkpoint's file each array lies: HDF5 makes the objects and the room, and never touches an array."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import h5py
import numpy as np

from stepctl import __version__
from stepctl.arena import Array
from stepctl.checkpoint import userblock
from stepctl.checkpoint.metadata import Metadata

FORMAT = "stepctl-checkpoint"
_GROUPS = ("counters", "params", "optimizers", "buffers", "hooks")
Key = tuple[tuple[str, tuple[int, ...], str], ...]  # (path, shape, dtype) of each array


class Layout(NamedTuple):
    """All bytes of a file but the arrays', and the offset of each array that has any."""

    metadata: Metadata
    offsets: dict[str, int]


def lay_out(arrays: Mapping[str, Array], *, run: str, run_id: str, step: int) -> Layout:
    """Return the layout of a file of these arrays. What does not change from step to step is made once."""
    key = tuple((path, array.shape, array.dtype.str) for path, array in arrays.items())
    template = _template(key, run, run_id)
    metadata = template.metadata.copy()
    file = h5py.h5f.open(b"checkpoint", h5py.h5f.ACC_RDWR, _access(metadata))
    try:
        h5py.h5a.open(file, b"global_step").write(np.array(step, "<i8"))
    finally:
        file.close()
    return Layout(metadata, template.offsets)


@functools.lru_cache(maxsize=4)
def _template(key: Key, run: str, run_id: str) -> Layout:
    layout = Layout(Metadata(), {})
    with _create(layout.metadata) as file:
        root = file.attrs
        root.create("format", text(FORMAT))
        root.create("format_version", np.int64(userblock.VERSION))
        root.create("global_step", np.int64(0))
        root.create("created_by", text(f"stepctl {__version__}"))
        root.create("run", text(run.encode("utf-8", "replace").decode()))
        root.create("run_id", text(run_id))
        groups = {"": file.id}
        for group in _GROUPS:
            _group(groups, group)
        for path, shape, dtype in key:
            offset = _dataset(groups, path, shape, dtype)
            if 0 not in shape:
                layout.offsets[path] = offset
    return layout


@contextlib.contextmanager
def _create(metadata: Metadata) -> Iterator[h5py.File]:
    # with no times in any header, so that the same state makes the same bytes
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_userblock(userblock.SIZE)
    creation.set_link_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    creation.set_obj_track_times(False)
    access = _access(metadata)
    with h5py.File(h5py.h5f.create(b"checkpoint", h5py.h5f.ACC_TRUNC, creation, access)) as file:
        yield file


def _access(metadata: Metadata) -> Any:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, metadata)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    return access


def _group(groups: dict[str, Any], path: str) -> Any:
    if path not in groups:
        parent, _, name = path.rpartition("/")
        creation = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
        creation.set_link_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
        creation.set_obj_track_times(False)
        groups[path] = h5py.h5g.create(_group(groups, parent), name.encode(), gcpl=creation)
    return groups[path]


def _dataset(groups: dict[str, Any], path: str, shape: tuple[int, ...], dtype: str) -> int:
    parent, _, name = path.rpartition("/")
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_obj_track_times(False)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = np.dtype(dtype)
    if kind.kind == "S":
        kind = h5py.string_dtype("utf-8", kind.itemsize)
    made = h5py.h5t.py_create(kind, logical=True)
    dataset = h5py.h5d.create(_group(groups, parent), name.encode(), made, space, dcpl=creation)
    return dataset.get_offset() or 0


def text(content: str) -> Array:
    """Return a text as the format holds it: a fixed-length string of UTF-8."""
    data = content.encode()
    return np.array(data, h5py.string_dtype("utf-8", max(len(data), 1)))
