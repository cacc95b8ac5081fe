"""Hostile files, each with the error code that refuses it and words of its message.

Every file except those of FILES has a valid digest: its author knew the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5t, h5z

from tests.support import hostile_programs
from tests.support.checkpoints import NAME, STEP, small_state, written
from tests.support.hostile_bytes import BYTES, FILES
from tests.support.hostile_parts import (
    OTHER,
    Build,
    Change,
    array,
    both,
    filtered,
    good_body,
    laid_out,
    linked,
    many_attributes,
    many_groups,
    noted,
    of_committed_type,
    of_version_1,
    real_number,
    replaced,
    root_typed,
    rooted,
    stepped,
    stored,
    tampered,
    text,
    virtual,
    virtual_over_many,
    whole_number,
)  # fmt: skip
from tests.support.hostile_programs import program_tampered

X = "/params/x"


@dataclass(frozen=True)
class Hostile:
    """A file that must be refused with `code`, in a message that names `about`."""

    code: str
    about: str
    build: Build


# --- changes made through the HDF5 library: name -> (code, what the message names, change)

LINKS: dict[str, tuple[str, str, Change]] = {
    "soft link": ("link", X, linked("params/x", h5py.SoftLink("/params/weight"))),
    "soft link as a group": ("link", "/buffers", linked("buffers", h5py.SoftLink("/params"))),
    "dangling link": ("link", X, linked("params/x", h5py.SoftLink("/nowhere"))),
    "soft link to itself": ("link", X, linked("params/x", h5py.SoftLink("/params/x"))),
    "external link": ("link", X, linked("params/x", h5py.ExternalLink(OTHER, "/x"))),
    "external link as a group": ("link", "/buffers", linked("buffers", h5py.ExternalLink(OTHER, "/"))),
    "external link to itself": ("link", X, linked("params/x", h5py.ExternalLink(NAME, "/params/weight"))),
    "external link to a device": ("link", X, linked("params/x", h5py.ExternalLink("/dev/zero", "/x"))),
    "external link as the config": ("link", "/config", linked("config", h5py.ExternalLink(OTHER, "/x"))),
    "doubled array": ("doubled", X, linked("params/x", "params/weight")),
    "doubled group": ("doubled", "/buffers", linked("buffers", "params")),
    "doubled config": ("doubled", "/numerics", linked("numerics", "config")),
    "cycle to itself": ("doubled", X, linked("params/x", "params")),
    "cycle over two groups": (
        "doubled", "/params/a/b/c",
        both(lambda file: file.create_group("params/a/b"), linked("params/a/b/c", "params")),
    ),
    "cycle to the root": ("attribute", "/buffers", linked("buffers", "/")),
}  # fmt: skip

STORAGE: dict[str, tuple[str, Change]] = {
    "external storage": ("external", array(shape=(2,), dtype="<f4", external=[(OTHER, 0, 8)])),
    "external storage in parts": ("external", array(shape=(2,), dtype="<f4", external=[(OTHER, 0, 4), (OTHER, 8, 4)])),
    "external storage of a device": ("external", array(shape=(2,), dtype="<f4", external=[("/dev/zero", 0, 8)])),
    "virtual": ("layout", virtual(OTHER)),
    "virtual over many files": ("layout", virtual_over_many),
    "virtual over itself": ("layout", virtual(".")),
    "one chunk": ("layout", laid_out(lambda creation: creation.set_chunk((2,)))),
    "many chunks": ("layout", array(data=np.ones(4, "<f4"), chunks=(1,))),
    "growing": ("layout", array(data=np.ones(4, "<f4"), maxshape=(None,))),
    "growing two ways": ("layout", array(data=np.ones((2, 2), "<f4"), maxshape=(None, None))),
    "compact": ("layout", laid_out(lambda creation: creation.set_layout(h5d.COMPACT))),
    "gzip": ("layout", array(data=np.ones(4, "<f4"), compression="gzip")),
    "gzip bomb": ("layout", array(data=np.zeros(1 << 22, "<f4"), chunks=(1 << 22,), compression="gzip")),
    "gzip that may be left out": ("layout", filtered(h5z.FILTER_DEFLATE, h5z.FLAG_OPTIONAL, 9)),
    "szip": ("layout", filtered(h5z.FILTER_SZIP, h5z.FLAG_MANDATORY, h5z.SZIP_NN_OPTION_MASK, 2)),
    "shuffle": ("layout", array(data=np.ones(4, "<f4"), shuffle=True)),
    "fletcher32": ("layout", array(data=np.ones(4, "<f4"), fletcher32=True)),
    "lzf": ("layout", array(data=np.ones(4, "<f4"), compression="lzf")),
    "scale and offset": ("layout", array(data=np.ones(4, "<f4"), scaleoffset=2)),
    "n bits": ("layout", filtered(h5z.FILTER_NBIT, h5z.FLAG_MANDATORY)),
    "unknown filter": ("layout", filtered(31999, h5z.FLAG_OPTIONAL, 1)),
    "all filters": (
        "layout", array(data=np.ones(4, "<f4"), compression="gzip", shuffle=True, fletcher32=True, chunks=(2,)),
    ),
    "NULL dataspace": ("shape", array(data=h5py.Empty("<f4"))),
    "no element of a huge shape": ("shape", stored(shape=(0, 1 << 62))),
    "a petabyte without storage": ("shape", array(shape=(1 << 47,), dtype="<f8")),
    "more elements than int64 counts": ("shape", array(shape=(1 << 31, 1 << 31, 1 << 31), dtype="<f8")),
    "2^63 bytes": ("shape", array(shape=(1 << 60,), dtype="<f8")),
    "rank 32 without storage": ("storage", array(shape=(2,) * 32, dtype="<f4")),
    "one array without storage": ("storage", array(shape=(2,), dtype="<f4")),
    "a fill value in place of storage": ("storage", array(shape=(2,), dtype="<f4", fillvalue=3)),
}  # fmt: skip

TYPES: dict[str, Change] = {
    "variable-length string": array(data="text"),
    "variable-length bytes": array(data=np.array([b"a", b"b"], h5py.string_dtype("ascii"))),
    "variable-length numbers": array(shape=(1,), dtype=h5py.vlen_dtype(np.float32)),
    "variable length of variable length": array(
        shape=(1,), dtype=h5py.vlen_dtype(h5py.string_dtype())
    ),
    "fixed string": array(data=text(b"abc")),
    "compound": array(data=np.zeros(2, [("re", "<f4"), ("im", "<f4")])),
    "compound of one": array(data=np.zeros(2, [("x", "<f4")])),
    "complex": array(data=np.zeros(2, "<c8")),
    "object reference": array(shape=(1,), dtype=h5py.ref_dtype),
    "region reference": array(shape=(1,), dtype=h5py.regionref_dtype),
    "opaque": array(data=np.zeros(2, "V4")),
    "array type": array(shape=(2,), dtype=np.dtype(("<f4", (2,)))),
    "enum": array(shape=(2,), dtype=h5py.enum_dtype({"a": 0}, "<i8")),
    "bool": array(data=np.zeros(2, bool)),
    "float16": array(data=np.zeros(2, "<f2")),
    "float128": array(data=np.zeros(2, np.longdouble)),
    "int8": array(data=np.zeros(2, "i1")),
    "int32": array(data=np.zeros(2, "<i4")),
    "uint64": array(data=np.zeros(2, "<u8")),
    "big-endian float": array(data=np.zeros(2, ">f4")),
    "big-endian double": array(data=np.zeros(2, ">f8")),
    "big-endian int": array(data=np.zeros(2, ">i8")),
    "int64 of 60 bits": stored(kind=whole_number(8, 60)),
    "int64 of shifted bits": stored(kind=whole_number(8, 32, 16)),
    "int64 padded with ones": stored(kind=whole_number(8, 60, 0, h5t.PAD_ONE)),
    "int of 3 bytes": stored(kind=whole_number(3, 24)),
    "int of 16 bytes": stored(kind=whole_number(16, 64)),
    "float32 of another bias": stored(kind=real_number(8, 23, 100)),
    "float32 of another layout": stored(kind=real_number(5, 26, 15)),
    "float64 of another layout": stored(kind=real_number(15, 48, 16383)),
    "bit field": stored(kind=h5t.STD_B8LE),
    "time": stored(kind=h5t.UNIX_D32LE),
    "a type kept elsewhere": of_committed_type,
}

NAMES = {
    "not ASCII": "é".encode(),
    "not UTF-8": b"\xff",
    "space": b" ",
    "two dots": b"..",
    "hidden": b".x",
    "letters of the terminal": b"\x1b[2J",
    "a line feed": b"a\nb",
    "a backslash": b"a\\b",
    "a quotation mark": b"a'b",
    "60,000 letters": b"x" * 60_000,
}

LONG_LIST = b"a: [" + b"1," * 33_000 + b"1]"
OBJECTS: dict[str, tuple[str, str, Change]] = {
    "named type": ("kind", X, lambda file: file.__setitem__("params/x", np.dtype("<f4"))),
    "an array as a group": ("kind", "/buffers", replaced("buffers", np.float32(1))),
    "a group as the config": (
        "kind", "/config", both(replaced("config", None), lambda file: file.create_group("config")),
    ),
    "a group as a counter": ("dtype", "/counters/a/b", array("counters/a/b", data=1)),
    "config missing": ("missing", "/config", replaced("config", None)),
    "numerics missing": ("missing", "/numerics", replaced("numerics", None)),
    "unknown group": ("unknown", "/stranger", lambda file: file.create_group("stranger")),
    "unknown array": ("unknown", "/stranger", array("stranger", data=1.0)),
    "deep nesting": ("depth", "/params/x/x/x", lambda file: file.create_group("params/" + "/".join("x" * 1000))),
    "very many objects": ("objects", "/params", many_groups),
    "attribute of a group": ("attribute", "/params", noted("params", 1)),
    "attribute of an array": ("attribute", "/params/weight", noted("params/weight", 1)),
    "attribute of the config": ("attribute", "/config", noted("config", "text")),
    "attributes in a heap": ("attribute", "/params", many_attributes),
    "attribute of a megabyte": ("attribute", "/params", noted("params", np.zeros(1 << 20, "u1"))),
}  # fmt: skip

TEXTS: dict[str, tuple[str, str, Any]] = {
    "config as a number": ("dtype", "config", 1),
    "config as a list": ("dtype", "config", np.array([b"a", b"b"])),
    "config of variable length": ("dtype", "config", "seed: 0"),
    "config not UTF-8": ("text", "config", text(b"\xff\xfe!")),
    "config not YAML": ("text", "config", text(b"[1,")),
    "config not a mapping": ("text", "config", text(b"abc")),
    "config empty": ("text", "config", text(b"")),
    "config with an anchor bomb": (
        "text", "config",
        text(b"a: &a [x]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (n, n, n - 1, n - 1) for n in range(98, 122))),
    ),
    "config with a tag for the terminal": ("text", "config", text(b"a: !%1b[2J b")),
    "config with a key for the terminal": ("text", "config", text(b'"\\e[2J": 1\n"\\e[2J": 2')),
    "config with a letter that YAML has not": ("text", "config", text(b"a: \x1b[2J")),
    "config with a tag": ("text", "config", text(b"a: !!python/object/apply:os.system ['touch other.h5']")),
    "config with a merge key": ("text", "config", text(b"a: {<<: {b: 1}}")),
    "config of two documents": ("text", "config", text(b"a: 1\n---\nb: 2")),
    "config nested deeply": ("text", "config", text(b"a: " + b"[" * 30_000)),
    "config with a NUL in it": ("text", "config", text(b"a: b\0c")),
    "config too long": ("text", "config", text(LONG_LIST)),
    "numerics too long": ("text", "numerics", text(b'{"a": [' + b"1," * 33_000 + b"1]}")),
    "numerics not JSON": ("text", "numerics", text(b"abc")),
    "numerics not UTF-8": ("text", "numerics", text(b"\xff\xfe!")),
    "numerics not an object": ("text", "numerics", text(b"[1]")),
    "numerics nested deeply": ("text", "numerics", text(b'{"a":' + b"[" * 30_000)),
    "numerics with a number of many digits": ("text", "numerics", text(b'{"a":' + b"9" * 5000 + b"}")),
}  # fmt: skip

ROOT: dict[str, tuple[str, str, Change]] = {
    "strange root attribute": ("attribute", "stranger", lambda file: file.attrs.__setitem__("stranger", 1)),
    "root attribute missing": ("attribute", "run", rooted("run", None)),
    "no root attributes": ("attribute", "created_by", both(*(rooted(name, None) for name in (
        "format", "format_version", "global_step", "created_by", "run", "run_id")))),
    "root attribute of variable length": ("attribute", "run", rooted("run", "moon")),
    "root attribute of a megabyte": ("attribute", "run", rooted("run", text(b"x" * (1 << 20)))),
    "root attribute of four bytes": ("attribute", "global_step", rooted("global_step", np.int32(STEP))),
    "root attribute of three bytes": ("attribute", "global_step", root_typed(whole_number(3, 24))),
    "root attribute of time": ("attribute", "global_step", root_typed(h5t.UNIX_D32LE)),
    "root attribute big-endian": ("attribute", "global_step", rooted("global_step", np.array(STEP, ">i8"))),
    "root attribute of 2^63": ("attribute", "global_step", rooted("global_step", np.uint64(1 << 63))),
    "root attribute as a list": ("attribute", "global_step", rooted("global_step", np.array([STEP]))),
    "root attribute as a float": ("attribute", "format_version", rooted("format_version", 1.0)),
    "root attribute as a number": ("attribute", "format", rooted("format", 1)),
    "root attribute without a value": ("attribute", "global_step", rooted("global_step", h5py.Empty("<i8"))),
    "root attribute not UTF-8": ("text", "run", rooted("run", text(b"\xff\xfe!"))),
    "another format": ("version", "tar", rooted("format", text(b"tar"))),
    "another format for the terminal": ("version", "", rooted("format", text(b"\x1b[2J"))),
    "strange root attribute for the terminal": ("attribute", "", lambda file: file.attrs.__setitem__("\x1b[2J", 1)),
    "another version inside": ("version", "stepctl-checkpoint 3", rooted("format_version", np.int64(3))),
    "an older version inside": ("version", "stepctl-checkpoint 1", rooted("format_version", np.int64(1))),
    "no run_id": ("attribute", "run_id", rooted("run_id", None)),
    "a run_id of other letters": ("attribute", "run_id", rooted("run_id", text(b"g" * 32))),
    "a run_id of 31 digits": ("attribute", "run_id", rooted("run_id", text(b"0" * 31))),
    "a run_id of 33 digits": ("attribute", "run_id", rooted("run_id", text(b"0" * 33))),
    "a run_id for the terminal": ("attribute", "run_id", rooted("run_id", text(b"\x1b[2J"))),
    "a run_id as a number": ("attribute", "run_id", rooted("run_id", np.int64(0))),
    "version zero inside": ("version", "stepctl-checkpoint 0", rooted("format_version", np.int64(0))),
    "attribute of another step": ("step", "attribute 8", stepped(STEP + 1, STEP)),
    "counter of another step": ("step", "counter 8", stepped(STEP, STEP + 1)),
    "both of another step than the name": ("step", "name 7", stepped(STEP + 1, STEP + 1)),
    "negative steps": ("step", "attribute -7", stepped(-STEP, -STEP)),
    "no counter of steps": ("step", "counter None", replaced("counters/global_step", None)),
    "no counters": ("step", "counter None", replaced("counters", None)),
    "no counter of samples": ("counter", "samples_seen", replaced("counters/samples_seen", None)),
    "negative counter": ("counter", "model", replaced("counters/model", np.int64(-1))),
    "negative samples": ("counter", "samples_seen", replaced("counters/samples_seen", np.int64(-(2**63)))),
    "counter as a float": ("dtype", "/counters/model", replaced("counters/model", 7.5)),
    "counter as a string": ("dtype", "/counters/model", replaced("counters/model", text(b"7"))),
    "counter of four bytes": ("dtype", "/counters/model", replaced("counters/model", np.int32(STEP))),
    "counter of 2^63": ("dtype", "/counters/model", replaced("counters/model", np.uint64(1 << 63))),
    "counter big-endian": ("dtype", "/counters/model", replaced("counters/model", np.array(STEP, ">i8"))),
    "counter as a list": ("dtype", "/counters/model", replaced("counters/model", np.array([STEP]))),
}  # fmt: skip

# --- in files of version 1: name -> (code, what the message names, change)

VERSION_1: dict[str, tuple[str, str, Change]] = {
    "with a run_id": ("attribute", "run_id", rooted("run_id", text(b"0" * 32))),
    "of version 2 inside": (
        "version",
        "stepctl-checkpoint 2",
        rooted("format_version", np.int64(2)),
    ),
    "without its run": ("attribute", "'run'", rooted("run", None)),
}


def _all() -> Iterator[tuple[str, Hostile]]:
    for table in (LINKS, OBJECTS, ROOT):
        for name, (code, about, change) in table.items():
            yield name, Hostile(code, about, tampered(change))
    for name, (code, change) in STORAGE.items():
        yield name, Hostile(code, X, tampered(change))
    for name, change in TYPES.items():
        yield f"type: {name}", Hostile("dtype", X, tampered(change))
    for name, letters in NAMES.items():
        yield f"name: {name}", Hostile("name", "/params/", tampered(stored(letters)))
    for name, (code, where, value) in TEXTS.items():
        yield name, Hostile(code, f"/{where}", tampered(replaced(where, value)))
    for name, (code, about, change) in VERSION_1.items():
        yield f"version 1: {name}", Hostile(code, about, of_version_1(change))
    for name, (code, about, build) in (BYTES | FILES).items():
        yield name, Hostile(code, about, build)


def _programs() -> Iterator[tuple[str, Hostile]]:
    for name, (about, change) in hostile_programs.SPELLINGS.items():
        yield f"values: {name}", Hostile("values", about, program_tampered(change))
    for name, (code, about, change) in hostile_programs.OBJECTS.items():
        yield f"program: {name}", Hostile(code, about, program_tampered(change))
    for name, change in hostile_programs.STATE_TYPES.items():
        yield f"state type: {name}", Hostile("dtype", "/state/", program_tampered(change))


HOSTILE = dict(_all()) | dict(_programs())

# --- whole checkpoints of something else: they open, and do not fit the state

UNFIT: dict[str, tuple[str, Change]] = {
    "an array missing": ("/params/weight: expected float32 (2,), found nothing", replaced("params/weight", None)),
    "all arrays missing": ("/params/weight", replaced("params", None)),
    "an empty array more": ("/params/x: expected nothing, found float32 (0,)", stored(shape=(0,))),
    "an array more": ("/params/x: expected nothing, found float32 (2,)", stored()),
    "an array of hooks": ("/hooks/x/y: expected nothing", array("hooks/x/y", data=1.0)),
    "HDF5 in HDF5": ("/params/x: expected nothing", array(data=np.frombuffer(good_body(), "u1"))),
    "rank 32": ("/params/x: expected nothing", stored(shape=(1,) * 32)),
    "another shape": (
        "/params/weight: expected float32 (2,), found float32 (1, 2)",
        replaced("params/weight", np.ones((1, 2), "<f4")),
    ),
    "another type": ("/params/weight: expected float32 (2,), found float64", replaced("params/weight", np.ones(2))),
    "a counter more": ("/counters/critic: expected nothing", array("counters/critic", data=1)),
    "a counter missing": ("/counters/model: expected int64 (), found nothing", replaced("counters/model", None)),
}  # fmt: skip

# --- odd, and good: what must not be refused

GOOD: dict[str, Build] = {
    "unchanged": tampered(lambda file: None),
    "of version 1": of_version_1(lambda file: None),
    "under a free name": lambda folder: written(folder, small_state(), "best.h5"),
    "an empty group more": tampered(lambda file: file.create_group("params/empty")),
} | hostile_programs.GOOD_PROGRAMS  # fmt: skip
