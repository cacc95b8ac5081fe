"""The names of a mirror's objects, and their strict parsers.

    owners/0000000002                          who owns epoch 2
    released/0000000002                        that owner has ended
    beats/0000000002                           overwritten by a living owner
    manifests/0000000002-0000000007            the 7th commit of epoch 2
    data/0000000002-0000000007-<sha256>        an object uploaded for that commit
    probe/<nonce>                              a test of the store, removed at once

Numbers have ten digits, so that names sort like numbers.
"""

import re
from typing import NamedTuple

MAX_NUMBER = 9_999_999_999

OWNERS = "owners/"
RELEASED = "released/"
BEATS = "beats/"
MANIFESTS = "manifests/"
DATA = "data/"
PROBES = "probe/"

_EPOCH = re.compile(r"[0-9]{10}")
_KEY = re.compile(r"([0-9]{10})-([0-9]{10})")
_DATA = re.compile(r"([0-9]{10})-([0-9]{10})-([0-9a-f]{64})")


class Key(NamedTuple):
    """The position of a commit: keys sort by epoch, then by sequence number."""

    epoch: int  # 1, 2, ...
    seq: int  # 1, 2, ... within the epoch

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"


def owner(epoch: int) -> str:
    """Return the name of the owner of an epoch."""
    return f"{OWNERS}{epoch:010d}"


def released(epoch: int) -> str:
    """Return the name of the object that ends an epoch."""
    return f"{RELEASED}{epoch:010d}"


def beat(epoch: int) -> str:
    """Return the name of the object that the owner of an epoch overwrites."""
    return f"{BEATS}{epoch:010d}"


def manifest(key: Key) -> str:
    """Return the name of a manifest."""
    return f"{MANIFESTS}{key.epoch:010d}-{key.seq:010d}"


def data(key: Key, sha256: str) -> str:
    """Return the name of an object that was uploaded for the commit `key`."""
    return f"{DATA}{key.epoch:010d}-{key.seq:010d}-{sha256}"


def probe(nonce: str) -> str:
    """Return the name of an object that tests the store."""
    return f"{PROBES}{nonce}"


def parse_owner(name: str) -> int | None:
    """Return the epoch in the name of an owner; None for any other name."""
    return _epoch(OWNERS, name)


def parse_beat(name: str) -> int | None:
    """Return the epoch in the name of a beat; None for any other name."""
    return _epoch(BEATS, name)


def parse_manifest(name: str) -> Key | None:
    """Return the key in the name of a manifest; None for any other name."""
    match = _KEY.fullmatch(name.removeprefix(MANIFESTS))
    if match is None or not name.startswith(MANIFESTS):
        return None
    return _key(match)


def parse_data(name: str) -> tuple[Key, str] | None:
    """Return the key and the sha256 in the name of a data object; None for any other name."""
    match = _DATA.fullmatch(name.removeprefix(DATA))
    if match is None or not name.startswith(DATA):
        return None
    key = _key(match)
    return None if key is None else (key, match[3])


def _epoch(prefix: str, name: str) -> int | None:
    digits = name.removeprefix(prefix)
    if not name.startswith(prefix) or not _EPOCH.fullmatch(digits):
        return None
    return int(digits) or None


def _key(match: re.Match[str]) -> Key | None:
    key = Key(int(match[1]), int(match[2]))
    return key if key.epoch and key.seq else None
