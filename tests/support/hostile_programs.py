"""Hostile checkpoints of programs: `/state` and `/values` that no capture writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5t

from stepctl.state import values
from tests.support.checkpoints import NAME, encoded, small_state, written
from tests.support.hostile_parts import (
    Build,
    Change,
    array,
    both,
    changed,
    replaced,
    sealed,
    stored,
    text,
    whole_number,
)
from tests.support.program_states import program_state, small_program

Edit = Callable[[dict[str, Any]], object]


def program_tampered(change: Change) -> Build:
    """The checkpoint of a program with a changed HDF5 part behind a right digest."""
    return lambda folder: sealed(
        folder / NAME, changed(folder, encoded(program_state(small_program())), change)
    )


def edited(edit: Edit) -> Change:
    """Change what `/values` says."""

    def change(file: h5py.File) -> None:
        content = json.loads(file["values"][()])
        edit(content)
        replaced("values", text(json.dumps(content).encode()))(file)

    return change


def said(key: str, value: Any) -> Change:
    """Let `/values` give the value of a key."""
    return edited(lambda content: content["$dict"].__setitem__(*_pair(content, key, value)))


def _pair(content: dict[str, Any], key: str, value: Any) -> tuple[int, list[Any]]:
    keys = [name for name, _ in content["$dict"]]
    return keys.index(key), [key, value]


def of_generator(key: str, edit: Edit) -> Change:
    """Change the state that `/values` has of a generator."""

    def change(content: dict[str, Any]) -> None:
        (generator,) = dict(content["$dict"])[key].values()
        edit(generator)

    return edited(change)


def spelled(data: bytes) -> Change:
    return replaced("values", text(data))


def seeded(**items: Any) -> Change:
    return of_generator("philox", lambda generator: generator["seed"].update(items))


def positioned(**items: Any) -> Change:
    return of_generator("philox", lambda generator: generator["state"].update(items))


def twister(**items: Any) -> Change:
    return of_generator("mt", lambda generator: generator["state"]["state"].update(items))


def dict_of(*pairs: Any) -> dict[str, Any]:
    return {"$dict": list(pairs)}


DEEP = 2 * values.MAX_DEPTH
# --- /values: name -> (what the message names, change)
SPELLINGS: dict[str, tuple[str, Change]] = {
    "empty": (f"{NAME}: /values is not JSON", spelled(b"")),
    "not JSON": ("not JSON", spelled(b"abc")),
    "a list": ("root: unexpected", spelled(b"[]")),
    "a number": ("root: unexpected", spelled(b"3")),
    "NaN": ("NaN is not JSON", spelled(b'{"a": NaN}')),
    "infinity": ("Infinity is not JSON", spelled(b'{"a": -Infinity}')),
    "a key twice": ("occurs twice", spelled(b'{"a": 1, "a": 2}')),
    "a number of many digits": ("not JSON", spelled(b'{"a": ' + b"9" * 5000 + b"}")),
    "nested beyond Python": ("too deeply", spelled(b'{"a": ' + b"[" * 90_000)),
    "nested deeply": ("n/0/0/0", said("n", json.loads("[" * DEEP + "]" * DEEP))),
    "a tag in the root": ("root: unexpected", spelled(b'{"$tuple": []}')),
    "an array less": ("does not refer to /state/x", said("x", 1)),
    "an array that is not there": ("n: unexpected", said("n", {"$array": "n"})),
    "an array that is not there, by columns": ("n: unexpected", said("n", {"$fortran": "n"})),
    "two arrays exchanged": (
        'x: unexpected "y"', both(said("x", {"$array": "y"}), said("y", {"$array": "x"})),
    ),
    "an array by a number": ("x: unexpected", said("x", {"$array": 3})),
    "an array by a list": ("x: unexpected", said("x", {"$array": ["x"]})),
    "an unknown tag": ("n: unexpected", said("n", {"$open": "other.h5"})),
    "a tag beside a key": ("n: unexpected", said("n", {"$int": "0x1", "a": 1})),
    "a key with a slash": ("n: unexpected", said("n", {"a/b": 1})),
    "an empty key": ("n: unexpected", said("n", {"": 1})),
    "a key that is a dot": ("n: unexpected", said("n", {".": 1})),
    "a key with NUL": ("n: unexpected", said("n", {"a\0": 1})),
    "a key with half a letter": ("n: unexpected", said("n", {"\udc80": 1})),
    "a key of 256 bytes": ("n: unexpected", said("n", {"é" * 128: 1})),
    "a pair with a slash": ("n: unexpected", said("n", dict_of(["a/b", 1]))),
    "a pair whose key is a number": ("n: unexpected", said("n", dict_of([1, 1]))),
    "a pair twice": ("n: unexpected", said("n", dict_of(["$a", 1], ["$a", 2]))),
    "a pair of one": ("n:", said("n", dict_of(["a"]))),
    "pairs that are a number": ("n:", said("n", {"$dict": 3})),
    "text with half a letter": ("n: unexpected", said("n", "\udc80")),
    "a tuple of a number": ("n: unexpected", said("n", {"$tuple": 3})),
    "an int of other letters": ("n:", said("n", {"$int": "zz"})),
    "an int as a number": ("n:", said("n", {"$int": 4})),
    "a float of one byte": ("n:", said("n", {"$float": "00"})),
    "a float of other letters": ("n:", said("n", {"$float": "zz" * 8})),
    "a complex number of one part": ("n:", said("n", {"$complex": [1]})),
    "a complex number of large parts": ("n:", said("n", {"$complex": [10**400, 1]})),
    "bytes of other letters": ("n:", said("n", {"$bytes": "?"})),
    "a scalar of objects": ("n: unexpected", said("n", {"$scalar": ["object", "00" * 8]})),
    "a scalar of text": ("n: unexpected", said("n", {"$scalar": ["str", ""]})),
    "a scalar of no dtype": ("n:", said("n", {"$scalar": [["int8"], "00"]})),
    "a scalar of too few bytes": ("n:", said("n", {"$scalar": ["float32", "00"]})),
    "two scalars": ("n:", said("n", {"$scalar": ["int8", "0000"]})),
    "a bool of 2": ("n: unexpected", said("n", {"$scalar": ["bool", "02"]})),
    "a generator of nothing": ("n:", said("n", {"$generator": {}})),
    "a generator of a list": ("n:", said("n", {"$generator": []})),
    "a RandomState of a number": ("n:", said("n", {"$random_state": 3})),
    "a RandomState of nothing": ("n:", said("n", {"$random_state": {"bit_generator": "MT19937"}})),
    "an object of a number": ("n: unexpected", said("n", {"$object": 3})),
    "an unknown generator": ("unknown bit generator", positioned(bit_generator="os")),
    "a generator by a list": ("philox:", positioned(bit_generator=["Philox"])),
    "a generator of another kind": ("philox:", positioned(bit_generator="SFC64")),
    "a generator with a state in its state": ("philox:", positioned(state={"counter": {"a": {}}})),
    "words of no dtype": ("philox:", positioned(buffer=["object", [1, 2, 3, 4]])),
    "words that are floats": ("is not an integer", positioned(buffer=["uint64", [0.5, 0, 0, 0]])),
    "words that are true": ("is not an integer", positioned(buffer=["uint64", [True, 0, 0, 0]])),
    "words that are negative": ("is not an integer", positioned(buffer=["uint64", [-1, 0, 0, 0]])),
    "words that are too large": ("is not an integer", positioned(buffer=["uint64", [1 << 64] * 4])),
    "too few words": ("philox:", positioned(buffer=["uint64", [1]])),
    "a position before the buffer": ("is not an integer from 0 to 4", positioned(buffer_pos="-0x1")),
    "a position behind the buffer": ("is not an integer from 0 to 4", positioned(buffer_pos="0x5")),
    "a position behind the words": ("is not an integer from 0 to 624", twister(pos="0x100000")),
    "a position before the words": ("is not an integer from 0 to 624", twister(pos="-0x400")),
    "a position in a RandomState": (
        "is not an integer from 0 to 624",
        of_generator("legacy", lambda state: state["state"].update(pos="0x271")),
    ),
    "a pool of a gigaword": ("is not an integer from 0 to 64", seeded(pool_size=1 << 30)),
    "a pool of no words": ("philox:", seeded(pool_size=0)),
    "a pool that is a float": ("is not an integer", seeded(pool_size=4.0)),
    "a seed of many digits": ("is not an integer from 0 to 2000", seeded(entropy="0x" + "1" * 5000)),
    "a seed of a negative number": ("philox:", seeded(entropy="-0x1")),
    "a seed of floats": ("philox:", seeded(entropy=[0.5])),
    "a spawn key of a number": ("philox:", seeded(spawn_key=3)),
    "a spawn key of many digits": ("is not an integer", seeded(spawn_key=["1" * 5000])),
    "negative children": ("philox:", seeded(spawned=-1)),
    "children that are text": ("philox:", seeded(spawned="1")),
    "a seed that is missing": (
        "without a seed sequence",
        of_generator("spawned", lambda generator: generator.update(seed=None)),
    ),
}  # fmt: skip

# --- the rest: name -> (code, what the message names, change)
OBJECTS: dict[str, tuple[str, str, Change]] = {
    "no values": ("missing", "/values", replaced("values", None)),
    "values as a number": ("dtype", "/values", replaced("values", 1)),
    "values as a list": ("dtype", "/values", replaced("values", np.array([b"{}"]))),
    "values of variable length": ("dtype", "/values", replaced("values", "{}")),
    "values not UTF-8": ("text", "/values", spelled(b"\xff\xfe!")),
    "values too long": ("text", "/values", spelled(b" " * values.MAX_TEXT + b"3")),
    "a group as the values": (
        "kind", "/values", both(replaced("values", None), lambda file: file.create_group("values")),
    ),
    "an array as the state": ("kind", "/state", replaced("state", np.float32(1))),
    "an array more in the state": ("values", "does not refer to /state/more", array("state/more", data=1.0)),
    "an attribute in the state": (
        "attribute", "/state/x", lambda file: file["state/x"].attrs.__setitem__("a", 1),
    ),
    "a link in the state": (
        "link", "/state/more", lambda file: file.__setitem__("state/more", h5py.SoftLink("/state/x")),
    ),
    "a second name in the state": (
        "doubled", "/state/", lambda file: file.__setitem__("state/more", file["state/x"]),
    ),
    "a name that is not UTF-8": ("name", "/state/", stored(b"\xff", where="state")),
    "a name of 256 bytes": ("name", "/state/", stored(b"x" * 256, where="state")),
    "a name of half a letter": ("name", "/state/", stored(b"\xed\xb2\x80", where="state")),
    "chunks in the state": ("layout", "/state/more", array("state/more", data=np.ones(2), chunks=(1,))),
    "an external file in the state": (
        "external", "/state/more", array("state/more", shape=(2,), dtype="<f4", external=[("other.h5", 0, 8)]),
    ),
    "deep nesting in the state": (
        "depth", "/state/more/x", lambda file: file.create_group("state/more/" + "/".join("x" * 1000)),
    ),
}  # fmt: skip

# --- types that only look like NumPy's
STATE_TYPES: dict[str, Change] = {
    "big-endian": array("state/more", data=np.zeros(2, ">i2")),
    "text": array("state/more", data=np.zeros(2, "S4")),
    "long double": array("state/more", data=np.zeros(2, np.longdouble)),
    "int of 12 bits": stored(b"more", whole_number(2, 12), where="state"),
    "complex of other names": array("state/more", data=np.zeros(2, [("re", "<f4"), ("im", "<f4")])),
    "complex of integers": array("state/more", data=np.zeros(2, [("r", "<i4"), ("i", "<i4")])),
    "complex of three parts": array("state/more", data=np.zeros(2, [("r", "<f4"), ("i", "<f4"), ("j", "<f4")])),
    "complex of half floats": array("state/more", data=np.zeros(2, [("r", "<f2"), ("i", "<f2")])),
    "bool of other names": array("state/more", shape=(2,), dtype=h5py.enum_dtype({"NO": 0, "YES": 1}, "i1")),
    "bool of three values": array(
        "state/more", shape=(2,), dtype=h5py.enum_dtype({"FALSE": 0, "TRUE": 1, "MAYBE": 2}, "i1"),
    ),
    "bool of eight bytes": array(
        "state/more", shape=(2,), dtype=h5py.enum_dtype({"FALSE": 0, "TRUE": 1}, "<i8"),
    ),
    "bit field": stored(b"more", h5t.STD_B8LE, where="state"),
    "reference": array("state/more", shape=(1,), dtype=h5py.ref_dtype),
    "opaque": array("state/more", data=np.zeros(2, "V4")),
}  # fmt: skip


def flagged(file: h5py.File) -> None:
    """Store a byte of 2 in an array of bools, which h5py would not write."""
    offset = file["state/flags"].id.get_offset()
    name = file.filename
    file.close()
    with open(name, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\2")


def of_task(folder: Path) -> Path:
    return written(folder, small_state())


# --- whole checkpoints that do not fit: name -> (code, what the message names, file, manner)
UNFIT_PROGRAMS: dict[str, tuple[str, str, Build, str]] = {
    "a bool of two": ("bool", "/state/flags", program_tampered(flagged), "restored"),
    "a program for a task": (
        "mismatch", "and this config has a task", program_tampered(lambda file: None), "restored into a task",
    ),
    "a task for a program": ("mismatch", "and this config has a program", of_task, "restored into a program"),
    "a key more": (
        "ConfigError", "state has no key 'more'",
        program_tampered(edited(lambda content: content["$dict"].append(["more", 1]))), "restored",
    ),
    "a key less": (
        "ConfigError", "state['n'] is not in the checkpoint",
        program_tampered(edited(lambda content: content["$dict"].remove(["n", 3]))), "restored",
    ),
    "an object more": (
        "ConfigError", "state['n']: the checkpoint holds",
        program_tampered(said("n", {"$object": {}})), "restored",
    ),
    "an object in a list more": (
        "ConfigError", "state['n/0']: ", program_tampered(said("n", [{"$object": {}}])), "restored",
    ),
    "an object that cannot be loaded": (
        "ConfigError", "state['emulator']: load_state_dict() failed: ",
        program_tampered(both(said("emulator", {"$object": {}}), replaced("state/emulator", None))), "restored",
    ),
    "a counter less": (
        "mismatch", "/counters/model: expected nothing",
        program_tampered(array("counters/model", data=1)), "restored",
    ),
    "a parameter": ("mismatch", "/params/x", program_tampered(array("params/x", data=1.0)), "restored"),
}  # fmt: skip
GOOD_PROGRAMS: dict[str, Build] = {
    "a program": lambda folder: written(folder, program_state(small_program())),
    "a program, rewritten": program_tampered(edited(lambda content: None)),
    "a program with an empty group more": program_tampered(
        lambda file: file.create_group("state/more")
    ),
}
