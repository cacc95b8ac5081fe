"""Hostile files that the HDF5 library cannot write, and files that are no checkpoints."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5f, h5p

from tests.support.checkpoints import NAME, encoded, small_state, written
from tests.support.hdf5_metadata import (
    FILTER_MESSAGE,
    LAYOUT_MESSAGE,
    LINK_MESSAGE,
    NIL_MESSAGE,
    messages,
    patched,
)
from tests.support.hostile_parts import (
    OTHER,
    Build,
    array,
    changed_body,
    copied,
    good_body,
    linked,
    sealed,
    stepped,
    stored,
    tampered,
)  # fmt: skip

# --- what only bytes can say: name -> (code, what the message names, body made in a folder)


def renamed(new: bytes) -> Build:
    """A link whose name the HDF5 library would not write."""
    old = b"Q" * len(new)

    def build(folder: Path) -> Path:
        body = changed_body(folder, stored(old))
        names = [
            end - 8 - len(new) for _, end in messages(body, LINK_MESSAGE)
        ]  # an address follows
        at = next(at for at in names if body.startswith(old, at))
        return sealed(folder / NAME, patched(body, at, new))

    return build


def link_patched(offset: int, new: bytes, to: object = None) -> Build:
    """A link to a new array (or `to`), its message changed at an offset from its start or end."""

    def build(folder: Path) -> Path:
        change = (
            array("params/marked", data=np.ones(2, "<f4"))
            if to is None
            else linked("params/marked", to)
        )
        body = changed_body(folder, change)
        start, end = next(
            span for span in messages(body, LINK_MESSAGE) if b"marked" in body[slice(*span)]
        )
        return sealed(folder / NAME, patched(body, (start if offset >= 0 else end) + offset, new))

    return build


def layout_patched(offset: int, new: bytes) -> Build:
    """A new array whose layout message (version, class, address, size) is changed at an offset."""

    def build(folder: Path) -> Path:
        old = good_body()
        body = changed_body(folder, array("params/marked", data=np.ones(2, "<f4")))
        start, _ = max(messages(body, LAYOUT_MESSAGE))
        assert start > len(old)
        return sealed(folder / NAME, patched(body, start + offset, new))

    return build


def filtered_contiguous(folder: Path) -> Path:
    """A contiguous array whose header lists a filter: an unused message is made one."""
    body = changed_body(folder, array("params/marked", data=np.ones(2, "<f4")))
    start, _ = max(messages(body, NIL_MESSAGE))
    pipeline = bytes([2, 1]) + struct.pack(
        "<HHHI", 1, 0, 1, 6
    )  # version 2; one filter: gzip, mandatory, level 6
    body = patched(body, start, pipeline)
    return sealed(folder / NAME, patched(body, start - 4, bytes([FILTER_MESSAGE])))


def superblock(position: int, new: bytes) -> Build:
    return lambda folder: sealed(folder / NAME, patched(good_body(), position, new))


def body_of(make: Callable[[Path], bytes]) -> Build:
    return lambda folder: sealed(folder / NAME, make(folder))


def old_file(
    folder: Path, versions: tuple[str, str] = ("earliest", "v110"), **options: Any
) -> bytes:
    with h5py.File(folder / "scratch", "w", libver=versions, **options) as file:
        file["x"] = 1
    data = (folder / "scratch").read_bytes()
    (folder / "scratch").unlink()
    return data


def family_member(folder: Path) -> bytes:
    with h5py.File(
        folder / "family%d", "w", driver="family", memb_size=1 << 20, libver=("v110", "v110")
    ) as file:
        file["x"] = 1
    data = (folder / "family0").read_bytes()
    (folder / "family0").unlink()
    return data


def made_with(create: Callable[[h5p.PropFCID], object]) -> Build:
    return body_of(lambda folder: copied(folder, create))


def spaced(strategy: int, persist: bool) -> Callable[[h5p.PropFCID], object]:
    return lambda creation: creation.set_file_space_strategy(strategy, persist, 1)


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


BYTES: dict[str, tuple[str, str, Build]] = {
    "a link named dot": ("name", "/params", renamed(b".")),
    "a link named as a path": ("name", "/params", renamed(b"a/b")),
    "a link named as a path from the root": ("name", "/params", renamed(b"/params/weight")),
    "a link named by dot and path": ("name", "/params", renamed(b"./weight")),
    "two links of one name": ("doubled", "/params/weight", renamed(b"weight")),
    "a link without a name": ("name", "/params", renamed(b"\0ab")),
    "a link of an unknown kind": ("link", "/params/marked", link_patched(2, b"\xbb", h5py.ExternalLink(OTHER, "/x"))),
    "a link beyond the end": ("hdf5", "", link_patched(-8, number(1 << 40))),
    "a link into the user block": ("hdf5", "", link_patched(-8, number(2**64 - 512))),
    "a layout of an unknown version": ("hdf5", "", layout_patched(0, b"\x09")),
    "a layout of an unknown class": ("hdf5", "", layout_patched(1, b"\x09")),
    "data beyond the end": ("hdf5", "", layout_patched(2, number(1 << 40))),
    "data at no address": ("storage", "/params/marked", layout_patched(2, b"\xff" * 8)),
    "data of another size": ("storage", "/params/marked", layout_patched(10, number(4))),
    "a filter without chunks": ("filter", "/params/marked", filtered_contiguous),
    "open for writing": ("hdf5", "", superblock(11, b"\1")),
    "open for writing and reading": ("hdf5", "", superblock(11, b"\5")),
    "offsets of four bytes": ("hdf5", "", superblock(9, b"\4")),
    "lengths of two bytes": ("hdf5", "", superblock(10, b"\2")),
    "another base address": ("hdf5", "", superblock(12, number(1024))),
    "no base address": ("hdf5", "", superblock(12, number(0))),
    "extension in the root group": ("hdf5", "", superblock(20, number(48))),
    "extension beyond the end": ("hdf5", "", superblock(20, number(1 << 40))),
    "an end behind the end": ("hdf5", "", superblock(28, number(1 << 40))),
    "an end before the end": ("hdf5", "", superblock(28, number(1000))),
    "a root in the superblock": ("hdf5", "", superblock(36, number(0))),
    "a root beyond the end": ("hdf5", "", superblock(36, number(1 << 40))),
    "bytes behind the end": ("hdf5", "", body_of(lambda folder: good_body() + bytes(1000))),
    "bytes missing at the end": ("hdf5", "", body_of(lambda folder: good_body()[:-300])),
    "nothing behind the user block": ("hdf5", "", body_of(lambda folder: b"")),
    "a superblock and nothing else": ("hdf5", "", body_of(lambda folder: good_body()[:48])),
    "a signature and zeros": ("hdf5", "", body_of(lambda folder: good_body()[:9] + bytes(4000))),
    "text behind the user block": ("hdf5", "", body_of(lambda folder: b"weight: 1\n" * 100)),
    "HDF5 behind a user block of 1024": ("hdf5", "", body_of(lambda folder: bytes(512) + good_body())),
    "HDF5 behind a user block of 2048": ("hdf5", "", body_of(lambda folder: bytes(1536) + good_body())),
    "a checkpoint in a checkpoint": ("hdf5", "", body_of(lambda folder: encoded(small_state()))),
    "superblock 0": ("hdf5", "", body_of(old_file)),
    "superblock 2": ("hdf5", "", body_of(lambda folder: old_file(folder, ("v108", "v108")))),
    "a member of a family": ("hdf5", "", body_of(family_member)),
    "made with a user block of 1024": ("hdf5", "", made_with(lambda creation: creation.set_userblock(1024))),
    "made with offsets of four bytes": ("hdf5", "", made_with(lambda creation: creation.set_sizes(4, 4))),
    "made without space management": ("hdf5", "", made_with(spaced(h5f.FSPACE_STRATEGY_NONE, False))),
    "made with kept free space": ("hdf5", "", made_with(spaced(h5f.FSPACE_STRATEGY_FSM_AGGR, True))),
    "a group in the old manner": (
        "kind", "/params/old", tampered(lambda file: file.create_group("params/old"), libver=("earliest", "v110")),
    ),
    "an array in the old manner": (
        "kind", "/params/old", tampered(array("params/old", data=1.0), libver=("earliest", "v110")),
    ),
}  # fmt: skip

# --- what is no checkpoint at all


def put(make: Callable[[Path], object]) -> Build:
    def build(folder: Path) -> Path:
        make(folder / NAME)
        return folder / NAME

    return build


def sparse(size: int, head: bytes = b"") -> Build:
    def build(folder: Path) -> Path:
        (folder / NAME).write_bytes(head)
        os.truncate(folder / NAME, size)
        return folder / NAME

    return build


def a_socket(path: Path) -> None:
    with socket.socket(
        socket.AF_UNIX
    ) as made:  # the path of a socket is short: bound through the folder
        folder = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def linked_to_a_good_one(path: Path) -> None:
    os.symlink(written(path.parent, small_state(), "real"), path)


def holding(change: Callable[[bytes], bytes]) -> Build:
    """A good checkpoint, its bytes changed with the digest left as it was."""

    def build(folder: Path) -> Path:
        path = written(folder, small_state())
        path.write_bytes(change(path.read_bytes()))
        return path

    return build


def head(length: int) -> bytes:
    """Return a user block with a digest of nothing in particular."""
    return f"stepctl-checkpoint 2\nsha256: {'0' * 64}\nlength: {length}\n".encode().ljust(
        512, b"\0"
    )


FILES: dict[str, tuple[str, str, Build]] = {
    "a symbolic link": ("open", "symbolic link", put(linked_to_a_good_one)),
    "a symbolic link to nowhere": ("open", "symbolic link", put(lambda path: path.symlink_to("x"))),
    "nothing": ("open", "No such file", lambda folder: folder / NAME),
    "a fifo": ("kind", "regular", put(os.mkfifo)),
    "a directory": ("kind", "regular", put(os.mkdir)),
    "a socket": ("open", "", put(a_socket)),
    "a device": ("kind", "regular", lambda folder: Path("/dev/zero")),
    "a file whose reading fails": ("unreadable", "", lambda folder: Path("/proc/self/mem")),
    "an empty file": ("foreign", "", holding(lambda data: b"")),
    "a text file": ("foreign", "", holding(lambda data: b"loss 0.5\n" * 1000)),
    "zeros": ("foreign", "", holding(lambda data: bytes(4096))),
    "a plain HDF5 file": ("foreign", "", holding(lambda data: data[512:])),
    "a user block without its end": ("foreign", "", holding(lambda data: data[:130].rstrip(b"\0"))),
    "a user block with more in it": ("foreign", "", holding(lambda data: data[:511] + b"x" + data[512:])),
    "a tebibyte of nothing": ("foreign", "", sparse(1 << 40)),
    "more than is ever read": ("size", "", sparse((1 << 40) + 1, head((1 << 40) + 1 - 512))),
    "a length of 15 digits": ("length", "", holding(lambda data: head(10**15 - 1) + data[512:])),
    "a length of 20 digits": ("foreign", "", holding(lambda data: head(10**20 - 1) + data[512:])),
    "another format version": ("newer", "3", holding(lambda data: data.replace(b"checkpoint 2", b"checkpoint 3", 1))),
    "a format version that never was, and no digest": (
        "version", "0", holding(lambda data: data[:-1].replace(b"checkpoint 2", b"checkpoint 0", 1) + b"x")
    ),
    "a file cut short": ("length", "", holding(lambda data: data[:-1])),
    "a file that is longer": ("length", "", holding(lambda data: data + b"\0")),
    "one flipped bit": ("digest", "", holding(lambda data: data[:-1] + bytes([data[-1] ^ 1]))),
    "a name of another step": ("step", "name 8", lambda folder: written(folder, small_state(), "step-00000008.h5")),
    "negative steps under a free name": ("counter", "global_step", tampered(stepped(-1, -1), "copy.h5")),
}  # fmt: skip
