"""The control objects: their form, and the refusal of everything else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from stepctl.errors import CheckpointError
from stepctl.mirror import names
from stepctl.mirror.manifest import Contents, Kept, Manifest, Owner, StoredObject
from stepctl.mirror.names import Key
from tests.support.mirrors import RUN_ID, make_owner

KEY = Key(3, 7)


def make_object(key: Key = KEY, size: int = 5) -> StoredObject:
    return StoredObject(key, "ab" * 32, size)


def make_manifest() -> Manifest:
    contents = Contents(
        step=100,
        checkpoint=make_object(),
        config=make_object(Key(1, 1)),
        files={
            "ledger.jsonl": (make_object(Key(3, 6)), make_object()),
            "series/x.bin": (make_object(size=0),),
            "series/x.json": (),
        },
    )
    previous = (Kept(Key(3, 6), 90), Kept(Key(1, 9), 40))
    return Manifest(KEY, RUN_ID, "f" * 32, contents, previous)


def with_fields(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return an object with other fields and a valid digest."""
    kind, _, body = content.split(b"\n", 2)
    fields = json.loads(body)
    change(fields)
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    return with_body(kind, body)


def with_body(kind: bytes, body: bytes) -> bytes:
    return kind + f"\nsha256: {hashlib.sha256(body).hexdigest()}\n".encode() + body


def test_a_manifest_comes_back() -> None:
    manifest = make_manifest()
    content = manifest.to_bytes()
    assert Manifest.parse(content, KEY) == manifest
    assert content.startswith(b"stepctl-manifest 1\nsha256: ")
    assert content.isascii()
    assert content.endswith(b"}\n")
    assert len(list(manifest.contents.objects())) == 5
    name = f"data/0000000003-0000000007-{'ab' * 32}"
    assert manifest.contents.checkpoint.name == name


def test_an_owner_comes_back() -> None:
    owner = make_owner(5)
    assert Owner.parse(owner.to_bytes(), 9) == owner
    assert str(owner) == "process 5 on host5"


def test_every_changed_byte_is_noticed() -> None:
    content = make_manifest().to_bytes()
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1
        with pytest.raises(CheckpointError, match="log/0000000003-0000000007 is damaged"):
            Manifest.parse(bytes(damaged), KEY)
    for size in range(len(content)):
        with pytest.raises(CheckpointError):
            Manifest.parse(content[:size], KEY)


def set_to(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        place: Any = fields
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = to

    return change


STORED = [3, 7, "ab" * 32, 5]
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown field": (set_to("x", to=1), "normal form"),
    "missing field": (lambda fields: fields.pop("nonce"), "nonce is missing"),
    "other key": (set_to("key", to=[3, 8]), "made for another name"),
    "owner's key": (set_to("key", to=[3, 0]), "integer from 1"),
    "negative step": (set_to("step", to=-1), "integer from 0"),
    "huge step": (set_to("step", to=2**63), "integer from 0"),
    "step is true": (set_to("step", to=True), "integer from 0"),
    "step is a float": (set_to("step", to=100.0), "integer from 0"),
    "run id with a path": (set_to("run_id", to="../" + "0" * 29), "hexadecimal"),
    "run id in capitals": (set_to("run_id", to="A" * 32), "hexadecimal"),
    "digest with a path": (set_to("checkpoint", 2, to="../" * 21 + "x"), "hexadecimal"),
    "digest with a line end": (set_to("checkpoint", 2, to="ab" * 32 + "\n"), "hexadecimal"),
    "negative size": (set_to("checkpoint", 3, to=-1), "integer from 0"),
    "huge size": (set_to("checkpoint", 3, to=2**40 + 1), "integer from 0"),
    "object of a later commit": (set_to("config", to=[3, 8, "ab" * 32, 5]), "later commit"),
    "object of epoch 0": (set_to("config", to=[0, 1, "ab" * 32, 5]), "integer from 1"),
    "object with five fields": (set_to("config", to=[*STORED, 1]), "4 values"),
    "object is a number": (set_to("config", to=7), "4 values"),
    "file with ..": (set_to("files", "../ledger.jsonl", to=[]), "not the name of a run's file"),
    "absolute file": (set_to("files", "/etc/passwd", to=[]), "not the name of a run's file"),
    "other file": (set_to("files", "lock", to=[]), "not the name of a run's file"),
    "checkpoint as file": (set_to("files", "checkpoints/x", to=[]), "not the name"),
    "series in a folder": (set_to("files", "series/a/b.bin", to=[]), "not the name"),
    "series ..": (set_to("files", "series/...bin", to=[]), "not the name"),
    "series with a line end": (set_to("files", "series/x\n.bin", to=[]), "not the name"),
    "series of another kind": (set_to("files", "series/x.sh", to=[]), "not the name"),
    "files is a list": (set_to("files", to=[]), "files must be an object"),
    "chunks is a number": (set_to("files", "ledger.jsonl", to=1), "a list is needed"),
    "file of too many bytes": (
        set_to("files", "ledger.jsonl", to=[[3, 7, "ab" * 32, 2**40]] * 2),
        "too large",
    ),
    "previous is itself": (set_to("previous", to=[[3, 7, 90]]), "out of order"),
    "previous is later": (set_to("previous", to=[[4, 1, 90]]), "out of order"),
    "previous rises": (set_to("previous", to=[[1, 1, 40], [3, 6, 30]]), "out of order"),
    "previous of the same step": (set_to("previous", to=[[3, 6, 100]]), "out of order"),
    "previous steps rise": (set_to("previous", to=[[3, 6, 30], [1, 1, 40]]), "out of order"),
}


@pytest.mark.parametrize(("change", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(
    change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    content = with_fields(make_manifest().to_bytes(), change)
    with pytest.raises(CheckpointError, match=problem) as caught:
        Manifest.parse(content, KEY)
    assert caught.value.code == "mirror"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]\n",
        b"null\n",
        b"{",
        b"[" * 100_000,
        b"9" * 10_000,
        b"\xff",
        b'{"key": NaN}',
        make_manifest().to_bytes().split(b"\n", 2)[2].replace(b":", b": "),
        make_manifest().to_bytes().split(b"\n", 2)[2] + b"\n",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_another_body_is_refused(body: bytes) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        Manifest.parse(with_body(b"stepctl-manifest 1", body), KEY)


@pytest.mark.parametrize("kind", [b"stepctl-manifest 2", b"stepctl-owner 1", b""])
def test_another_kind_is_refused(kind: bytes) -> None:
    body = make_manifest().to_bytes().split(b"\n", 2)[2]
    with pytest.raises(CheckpointError, match="does not begin with"):
        Manifest.parse(with_body(kind, body), KEY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pid", 0),
        ("pid", "1"),
        ("pid", 2**40),
        ("host", ""),
        ("host", "x" * 256),
        ("host", 1),
        ("beat_seconds", 0.0),
        ("beat_seconds", 10),
        ("beat_seconds", 3601.0),
        ("beat_seconds", float("nan")),
        ("beat_seconds", float("inf")),
        ("nonce", "0" * 31),
        ("x", 1),
    ],
)
def test_a_hostile_owner_is_refused(field: str, value: object) -> None:
    content = with_fields(make_owner(1).to_bytes(), set_to(field, to=value))
    with pytest.raises(CheckpointError, match="log/0000000001-0000000000 is damaged"):
        Owner.parse(content, 1)


def test_an_owner_with_control_characters_is_shown_in_one_line() -> None:
    owner = dataclasses.replace(make_owner(1), host="a\n\x1b[31m\ud800")
    assert str(Owner.parse(owner.to_bytes(), 1)).isprintable()


# --- is the owner dead?


def test_this_process_is_alive() -> None:
    assert not Owner.this_process(RUN_ID).is_known_dead()


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a boot id")
def test_an_ended_process_of_this_machine_is_dead() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    owner = dataclasses.replace(Owner.this_process(RUN_ID), pid=process.pid)
    assert owner.is_known_dead()
    for field in ("host", "boot_id", "pid_namespace"):
        assert not dataclasses.replace(owner, **{field: "another"}).is_known_dead()
        assert not dataclasses.replace(owner, **{field: "unknown"}).is_known_dead()


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not Owner.this_process(RUN_ID).is_known_dead()


def test_each_owner_has_a_nonce_of_its_own() -> None:
    owners = {Owner.this_process(RUN_ID).nonce for _ in range(10)}
    assert len(owners) == 10


# --- names


@pytest.mark.parametrize("key", [Key(1, 0), Key(1, 1), Key(9_999_999_999, 9_999_999_999)])
def test_names_come_back(key: Key) -> None:
    assert names.parse_log(names.log(key)) == key
    expected = (key, "ab" * 32) if key.seq else None
    assert names.parse_data(names.data(key, "ab" * 32)) == expected


def test_names_sort_like_keys() -> None:
    keys = [Key(1, 9), Key(1, 10), Key(2, 0), Key(2, 1), Key(10, 0)]
    assert sorted(map(names.log, keys)) == [names.log(key) for key in keys]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "log/",
        "log/1-1",
        "log/0000000000-0000000001",
        "log/0000000001-0000000001\n",
        "log/0000000001-0000000001/x",
        "log/00000000010-000000001",
        f"log/{chr(0x660) * 9}1-0000000001",
        "log/../0000000001-0000000001",
        "0000000001-0000000001",
        f"data/0000000001-0000000001-{'AB' * 32}",
        f"data/0000000001-0000000001-{'ab' * 31}",
        f"data/0000000001-0000000001-{'ab' * 32}/..",
        f"0000000001-0000000001-{'ab' * 32}",
    ],
)
def test_other_names_are_not_parsed(name: str) -> None:
    assert names.parse_log(name) is None
    assert names.parse_data(name) is None
