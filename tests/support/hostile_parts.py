"""Parts of hostile files: functions that return an edit of an open HDF5 file, or a whole file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5f, h5g, h5p, h5s, h5t

from stepctl.checkpoint import user_block, walk
from tests.support.checkpoints import NAME, encoded, small_state

Change = Callable[[h5py.File], object]
Build = Callable[[Path], Path]

LATEST = ("v110", "v110")
OTHER = "other.h5"  # opened by nobody


def good_body() -> bytes:
    """Return the bytes of a good checkpoint from the superblock on."""
    return encoded(small_state())[user_block.SIZE :]


def sealed(path: Path, body: bytes) -> Path:
    """Write a file whose user block has the right digest of any body."""
    path.write_bytes(user_block.make(hashlib.sha256(body).hexdigest(), len(body)) + body)
    return path


def changed_body(folder: Path, change: Change, libver: tuple[str, str] = LATEST) -> bytes:
    """Return the body of a good checkpoint after `change` had its way with it."""
    return changed(folder, encoded(small_state()), change, libver)


def changed(folder: Path, data: bytes, change: Change, libver: tuple[str, str] = LATEST) -> bytes:
    """Return the body of a file after `change` had its way with it."""
    scratch = folder / "scratch"
    scratch.write_bytes(data)
    with h5py.File(scratch, "r+", libver=libver) as file:
        change(file)
    data = scratch.read_bytes()
    scratch.unlink()
    return data[user_block.SIZE :]


def tampered(change: Change, name: str = NAME, libver: tuple[str, str] = LATEST) -> Build:
    """A good checkpoint with a changed HDF5 part behind a right digest."""
    return lambda folder: sealed(folder / name, changed_body(folder, change, libver))


def of_version_1(change: Change) -> Build:
    """A checkpoint of format version 1, its HDF5 part changed, with the right digest."""

    def build(folder: Path) -> Path:
        path = tampered(
            both(rooted("run_id", None), rooted("format_version", np.int64(1)), change)
        )(folder)
        path.write_bytes(
            path.read_bytes().replace(b"stepctl-checkpoint 2\n", b"stepctl-checkpoint 1\n", 1)
        )
        return path

    return build


def both(*changes: Change) -> Change:
    return lambda file: [change(file) for change in changes]


def replaced(name: str, value: Any) -> Change:
    def change(file: h5py.File) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return change


def linked(name: str, to: Any) -> Change:
    """Put a link at a name; `to` is a link, or the name of what a second hard link leads to."""

    def change(file: h5py.File) -> None:
        if name in file:
            del file[name]
        file[name] = file[to] if isinstance(to, str) else to

    return change


def array(name: str = "params/x", **options: Any) -> Change:
    """Put an array there that the format does not have."""
    return lambda file: file.create_dataset(name, **options)


def stored(
    name: bytes = b"x",
    kind: Any = h5t.IEEE_F32LE,
    shape: tuple[int, ...] = (2,),
    where: str = "params",
) -> Change:
    """Put a contiguous array, allocated in the file, into a group: of any name, type and shape."""

    def change(file: h5py.File) -> None:
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_layout(h5d.CONTIGUOUS)
        creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        h5d.create(file[where].id, name, kind, h5s.create_simple(shape), dcpl=creation)

    return change


def laid_out(setting: Callable[[Any], object], shape: tuple[int, ...] = (2,)) -> Change:
    """Put an array into /params whose creation properties are set by `setting`."""

    def change(file: h5py.File) -> None:
        creation = h5p.create(h5p.DATASET_CREATE)
        setting(creation)
        h5d.create(file["params"].id, b"x", h5t.IEEE_F32LE, h5s.create_simple(shape), dcpl=creation)

    return change


def filtered(filter_id: int, flags: int, *values: int) -> Change:
    def setting(creation: Any) -> None:
        creation.set_chunk((2,))
        creation.set_filter(filter_id, flags, values)

    return laid_out(setting)


def of_committed_type(file: h5py.File) -> None:
    kind = h5t.IEEE_F32LE.copy()
    kind.commit(file["params"].id, b"type")
    stored(kind=kind)(file)
    del file["params/type"]


def virtual(source: str) -> Change:
    def change(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((2,), "<f4")
        layout[:] = h5py.VirtualSource(source, "x", (2,))
        file.create_virtual_dataset("params/x", layout)

    return change


def virtual_over_many(file: h5py.File) -> None:
    """An array without end, block n of which is the array x in the file with n in its name."""
    whole = h5s.create_simple((2,), (h5s.UNLIMITED,))
    block = h5s.create_simple((2,))
    whole.select_hyperslab((0,), (h5s.UNLIMITED,), (2,), (2,))
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_virtual(whole, OTHER.replace(".", "%b.").encode(), b"x", block)
    space = h5s.create_simple((2,), (h5s.UNLIMITED,))
    h5d.create(file["params"].id, b"x", h5t.IEEE_F32LE, space, dcpl=creation)


def whole_number(
    size: int, precision: int, offset: int = 0, pad: int = h5t.PAD_ZERO
) -> h5t.TypeIntegerID:
    kind = h5t.STD_I64LE.copy()
    kind.set_size(size)
    kind.set_precision(precision)
    kind.set_offset(offset)
    kind.set_pad(pad, pad)
    return kind


def real_number(exponent: int, mantissa: int, bias: int) -> h5t.TypeFloatID:
    """A float of four or eight bytes with its bits dealt out in another way."""
    bits = 1 + exponent + mantissa
    kind = (h5t.IEEE_F32LE if bits == 32 else h5t.IEEE_F64LE).copy()
    kind.set_fields(bits - 1, mantissa, exponent, 0, mantissa)
    kind.set_ebias(bias)
    return kind


def text(data: bytes) -> Any:
    return np.array(data, h5py.string_dtype("utf-8", max(len(data), 1)))


def stepped(attribute: int, counter: int) -> Change:
    def change(file: h5py.File) -> None:
        file.attrs["global_step"] = np.int64(attribute)
        file["counters/global_step"][()] = counter

    return change


def rooted(name: str, value: Any) -> Change:
    def change(file: h5py.File) -> None:
        if name in file.attrs:
            del file.attrs[name]
        if value is not None:
            file.attrs.create(name, value)

    return change


def root_typed(kind: h5t.TypeID) -> Change:
    def change(file: h5py.File) -> None:
        del file.attrs["global_step"]
        h5py.h5a.create(file.id, b"global_step", kind, h5s.create(h5s.SCALAR))

    return change


def noted(name: str, value: Any) -> Change:
    """Give an object an attribute."""
    return lambda file: file[name].attrs.__setitem__("a", value)


def many_attributes(file: h5py.File) -> None:
    for number in range(100):  # more than 8 go to a fractal heap of their own
        file["params"].attrs[f"a{number}"] = np.ones(500)


def many_groups(file: h5py.File) -> None:
    """A folder of a hundred groups, and copies of it until the walk must have had enough."""
    first = file.create_group("params/0")
    for number in range(100):
        h5g.create(first.id, b"%d" % number)
    for number in range(1, walk.MAX_OBJECTS // 100):
        file.copy(first, f"params/{number}")


def copied(folder: Path, create: Callable[[Any], object], libver: int = h5f.LIBVER_V110) -> bytes:
    """Return a file body with the objects of a good checkpoint, but other creation properties."""
    (folder / "scratch").write_bytes(encoded(small_state()))
    creation = h5p.create(h5p.FILE_CREATE)
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(libver, h5f.LIBVER_V110)
    creation.set_userblock(user_block.SIZE)
    create(creation)
    made = h5f.create(os.fsencode(folder / "copy"), h5f.ACC_TRUNC, creation, access)
    with h5py.File(folder / "scratch") as source, h5py.File(made) as target:
        for name in source:
            source.copy(name, target)
        for name in source.attrs:
            found = source.attrs.get_id(name)
            value = np.array(source.attrs[name], found.dtype)
            h5py.h5a.create(target.id, name.encode(), found.get_type(), found.get_space()).write(
                value
            )
        size = creation.get_userblock()
    data = (folder / "copy").read_bytes()
    (folder / "copy").unlink()
    (folder / "scratch").unlink()
    return data[size:]
