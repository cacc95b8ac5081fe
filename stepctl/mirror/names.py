"""The names of a mirror's objects, and their strict parsers.

    log/0000000002-0000000000                  who owns epoch 2
    log/0000000002-0000000007                  manifest: the 7th commit of epoch 2
    data/0000000002-0000000007-<sha256>        an object uploaded for that commit
    released/0000000002                        the owner of epoch 2 has ended
    beats/0000000002                           overwritten by a living owner
    probe/<nonce>                              a test of the store, removed at once

Numbers have ten digits, so that names sort like numbers. Owners and manifests have one prefix, so
that one listing shows both.
"""

import re
from typing import NamedTuple

MAX_NUMBER = 9_999_999_999

LOG = "log/"
DATA = "data/"
RELEASED = "released/"
BEATS = "beats/"
PROBES = "probe/"

_KEY = re.compile(r"([0-9]{10})-([0-9]{10})")
_DATA = re.compile(r"([0-9]{10})-([0-9]{10})-([0-9a-f]{64})")


class Key(NamedTuple):
    """The position of an entry of the log: keys sort by epoch, then by sequence number."""

    epoch: int  # 1, 2, ...
    seq: int  # 0: the owner of the epoch; 1, 2, ...: its commits

    @property
    def next(self) -> "Key":
        """The next key of the same epoch."""
        return Key(self.epoch, self.seq + 1)

    def __str__(self) -> str:
        return f"{self.epoch:010d}-{self.seq:010d}"


def log(key: Key) -> str:
    """Return the name of an entry of the log."""
    return f"{LOG}{key}"


def owner(epoch: int) -> str:
    """Return the name of the owner of an epoch."""
    return log(Key(epoch, 0))


def data(key: Key, sha256: str) -> str:
    """Return the name of an object that was uploaded for the commit `key`."""
    return f"{DATA}{key}-{sha256}"


def released(epoch: int) -> str:
    """Return the name of the object that ends an epoch."""
    return f"{RELEASED}{epoch:010d}"


def beat(epoch: int) -> str:
    """Return the name of the object that the owner of an epoch overwrites."""
    return f"{BEATS}{epoch:010d}"


def probe(nonce: str) -> str:
    """Return the name of an object that tests the store."""
    return f"{PROBES}{nonce}"


def parse_log(name: str) -> Key | None:
    """Return the key in the name of an entry of the log; None for any other name."""
    match = _KEY.fullmatch(name.removeprefix(LOG))
    if match is None or not name.startswith(LOG):
        return None
    return _key(match)


def parse_data(name: str) -> tuple[Key, str] | None:
    """Return the key and the sha256 in the name of a data object; None for any other name."""
    match = _DATA.fullmatch(name.removeprefix(DATA))
    if match is None or not name.startswith(DATA):
        return None
    key = _key(match)
    if key is None or key.seq == 0:
        return None
    return key, match[3]


def _key(match: re.Match[str]) -> Key | None:
    key = Key(int(match[1]), int(match[2]))
    return key if key.epoch else None
