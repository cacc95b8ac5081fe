"""Mirrors in a directory whose objects are not those that stepctl wrote, each to be refused.

A hostile manifest has a valid digest: it is refused for what it says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Fields = dict[str, Any]
Change = Callable[[Fields], object]
SHA256 = "0" * 64
KEY = "0000000001-0000000001"
BEYOND = 1 << 63


def encode(kind: str, fields: object) -> bytes:
    """Return a control object of stepctl/mirror/PROTOCOL.md with these fields."""
    body = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    return with_digest(kind, body)


def with_digest(kind: str, body: bytes) -> bytes:
    """Return a control object with this body, whatever it is."""
    return f"{kind}\nsha256: {hashlib.sha256(body).hexdigest()}\n".encode() + body


def newest_manifest(store: Path) -> Path:
    """Return the file of the newest manifest."""
    return max(manifests(store))


def manifests(store: Path) -> list[Path]:
    """Return the files of all manifests."""
    return [path for path in (store / "log").iterdir() if not path.name.endswith(f"-{0:010d}")]


def fields_of(path: Path) -> Fields:
    """Return the fields of a control object."""
    fields: Fields = json.loads(path.read_bytes().split(b"\n", 2)[2])
    return fields


def change_manifest(store: Path, change: Change) -> None:
    """Change the fields of the newest manifest, and remove the others."""
    newest = newest_manifest(store)
    fields = fields_of(newest)
    fields["previous"] = []
    change(fields)
    for path in manifests(store):
        path.unlink()
    newest.write_bytes(encode("stepctl-manifest 1", fields))


def set_field(name: str, value: object) -> Change:
    """Return a change of one field."""
    return lambda fields: fields.__setitem__(name, value)


def set_object(name: str, place: int, value: object) -> Change:
    """Return a change of the checkpoint or the config: epoch, seq, sha256 or size."""
    return lambda fields: fields[name].__setitem__(place, value)


def add_file(name: str) -> Change:
    """Return a change that adds a file, with the content of the config."""
    return lambda fields: fields["files"].__setitem__(name, [fields["config"]])


FILE_NAMES = (
    "../evil",
    "../../evil.bin",
    "/tmp/evil-of-stepctl",
    "series/../../evil.bin",
    "series/../evil.bin",
    "series/a/b.bin",
    "series//evil.bin",
    "series/..bin",
    "series/.bin",
    "series/.evil.bin",
    "series/evil.bin\0",
    "series/evil.bin\n",
    "series/evil",
    "series/evil.exe",
    "series/" + "e" * 300 + ".bin",
    "series",
    "series/",
    "Series/evil.bin",
    "checkpoints/step-00000001.h5",
    "config.yaml",
    "metrics.csv",
    "lock",
    "STOP",
    "",
    ".",
    "..",
    "./ledger.jsonl",
    "ledger.jsonl/",
    "LEDGER.JSONL",
    "ledger.jsonl\0",
    "~/evil",
    "C:\\evil",
    "..\\evil",
)
MANIFESTS: dict[str, Change] = {
    **{f"a file named {name[:40]!r}": add_file(name) for name in FILE_NAMES},
    "a step below 0": set_field("step", -1),
    "a step above int64": set_field("step", BEYOND),
    "a step of 10^30": set_field("step", 10**30),
    "a step that is a float": set_field("step", 8.0),
    "a step that is text": set_field("step", "../8"),
    "a step that is true": set_field("step", True),
    "no step": lambda fields: fields.pop("step"),
    "a step that is not the checkpoint's": lambda fields: fields.update(step=fields["step"] + 1),
    "an unknown field": set_field("command", "rm -rf /"),
    "another key": set_field("key", [1, 99]),
    "a key of epoch 0": set_field("key", [0, 1]),
    "a key of three numbers": set_field("key", [1, 1, 1]),
    "a key that is text": set_field("key", "../1"),
    "a run_id that is a path": set_field("run_id", "../../evil"),
    "a run_id of capitals": set_field("run_id", "A" * 32),
    "a run_id of another run": set_field("run_id", "0" * 32),
    "a nonce that is empty": set_field("nonce", ""),
    "a nonce that is a list": set_field("nonce", []),
    "no checkpoint": set_field("checkpoint", None),
    "a checkpoint of huge size": set_object("checkpoint", 3, 1 << 40),
    "a checkpoint of a size above all caps": set_object("checkpoint", 3, 1 << 70),
    "a checkpoint of negative size": set_object("checkpoint", 3, -1),
    "a checkpoint of size 0": set_object("checkpoint", 3, 0),
    "a checkpoint whose size is a float": set_object("checkpoint", 3, 1e4),
    "a checkpoint whose digest is a path": set_object("checkpoint", 2, "../../evil"),
    "a checkpoint whose digest is short": set_object("checkpoint", 2, "0" * 63),
    "a checkpoint whose digest has capitals": set_object("checkpoint", 2, "A" * 64),
    "a checkpoint that is missing": set_object("checkpoint", 2, SHA256),
    "a checkpoint of a later commit": set_object("checkpoint", 0, 9_999_999_999),
    "a checkpoint of epoch -1": set_object("checkpoint", 0, -1),
    "a checkpoint that is the config": lambda fields: fields.update(checkpoint=fields["config"]),
    "a config that is the checkpoint": lambda fields: fields.update(config=fields["checkpoint"]),
    "a config of huge size": set_object("config", 3, 1 << 40),
    "a ledger that is the checkpoint": lambda fields: fields["files"].update(
        {"ledger.jsonl": [fields["checkpoint"]]}
    ),
    "no ledger": lambda fields: fields["files"].pop("ledger.jsonl"),
    "a ledger of no chunks": lambda fields: fields["files"].update({"ledger.jsonl": []}),
    "files that are a list": set_field("files", []),
    "a chunk that is null": lambda fields: fields["files"].update({"metrics.jsonl": [None]}),
    "chunks of 2^40 bytes each": lambda fields: fields["files"].update(
        {"metrics.jsonl": [[1, 1, SHA256, 1 << 40]] * 100}
    ),
    "10,000 chunks that are missing": lambda fields: fields["files"].update(
        {"metrics.jsonl": [[1, 1, SHA256, 1]] * 10_000}
    ),
    "previous commits that are later": set_field("previous", [[9_999_999_999, 1, 1]]),
    "a previous commit that is itself": lambda fields: fields.update(
        previous=[[*fields["key"], fields["step"]]]
    ),
    "previous commits that are a number": set_field("previous", 10**9),
}


# --- what is no manifest at all


def replace_manifest(content: bytes) -> Callable[[Path], None]:
    """Return a change of a store: the newest manifest has this content, and is the only one."""

    def change(store: Path) -> None:
        change_manifest(store, lambda fields: None)
        newest_manifest(store).write_bytes(content)

    return change


def repeated_field(store: Path) -> None:
    """Give the manifest a second `step`."""
    change_manifest(store, lambda fields: None)
    path = newest_manifest(store)
    body = path.read_bytes().split(b"\n", 2)[2].replace(b'"step":', b'"step":1,"step":')
    path.write_bytes(with_digest("stepctl-manifest 1", body))


def in_place_of_manifest(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a change of a store: something else has the name of its only manifest."""

    def change(store: Path) -> None:
        change_manifest(store, lambda fields: None)
        path = newest_manifest(store)
        path.unlink()
        make(path)

    return change


def link_checkpoint(store: Path) -> None:
    """Replace the checkpoint by a symbolic link to itself, elsewhere."""
    checkpoint = checkpoint_object(store)
    outside = store.with_name("outside")
    checkpoint.rename(outside)
    checkpoint.symlink_to(outside)


def pipe_checkpoint(store: Path) -> None:
    """Replace the checkpoint by a named pipe, which nobody writes to."""
    checkpoint = checkpoint_object(store)
    checkpoint.unlink()
    os.mkfifo(checkpoint)


def checkpoint_object(store: Path) -> Path:
    """Return the file of the newest checkpoint, now of the only manifest."""
    change_manifest(store, lambda fields: None)
    epoch, seq, sha256, _ = fields_of(newest_manifest(store))["checkpoint"]
    return store / "data" / f"{epoch:010d}-{seq:010d}-{sha256}"


def many_manifests(store: Path) -> None:
    """Add 100,000 manifests."""
    for number in range(1, 100_001):
        (store / "log" / f"{number:010d}-{number:010d}").touch()


STORES: dict[str, Callable[[Path], None]] = {
    "an empty manifest": replace_manifest(b""),
    "a manifest of zeros": replace_manifest(bytes(1000)),
    "a manifest without a digest": replace_manifest(b"stepctl-manifest 1\n{}\n"),
    "a manifest of another version": replace_manifest(encode("stepctl-manifest 2", {})),
    "a manifest that is an owner": replace_manifest(encode("stepctl-owner 1", {})),
    "a manifest without fields": replace_manifest(encode("stepctl-manifest 1", {})),
    "a manifest that is a list": replace_manifest(encode("stepctl-manifest 1", [1])),
    "a manifest that is null": replace_manifest(encode("stepctl-manifest 1", None)),
    "a manifest that is no JSON": replace_manifest(with_digest("stepctl-manifest 1", b"{]")),
    "a manifest that is no UTF-8": replace_manifest(with_digest("stepctl-manifest 1", b'"\xff"')),
    "a manifest of NaN": replace_manifest(with_digest("stepctl-manifest 1", b'{"step":NaN}')),
    "a manifest that is nested 100,000 deep": replace_manifest(
        with_digest("stepctl-manifest 1", b"[" * 100_000)
    ),
    "a manifest with a number of 10^5 digits": replace_manifest(
        with_digest("stepctl-manifest 1", b'{"step":' + b"9" * 100_000 + b"}")
    ),
    "a manifest of 20 MB": replace_manifest(
        encode("stepctl-manifest 1", {"files": {"x": "y" * 20_000_000}})
    ),
    "a manifest with a repeated field": repeated_field,
    "a manifest that is a folder": in_place_of_manifest(Path.mkdir),
    "a manifest that is a pipe": in_place_of_manifest(os.mkfifo),
    "a manifest that is a link to itself": in_place_of_manifest(lambda path: path.symlink_to(path)),
    "a manifest that is a link to a device": in_place_of_manifest(
        lambda path: path.symlink_to("/dev/zero")
    ),
    "a checkpoint that is a link": link_checkpoint,
    "a checkpoint that is a pipe": pipe_checkpoint,
    "100,000 manifests": many_manifests,
}
