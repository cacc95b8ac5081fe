"""`mirror.json`: how far the mirror of a run has come, for other processes.

The uploader of a segment publishes it after each commit, and when the store starts to fail.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from stepctl.rundir import json_lines
from stepctl.system import store_url
from stepctl.system.folder import Folder

NAME = "mirror.json"
_MAX_BYTES = 1 << 16


class MirrorStatus(NamedTuple):
    """The newest checkpoint in the mirror, and why a newer one is not there.

    `step`, its `sha256` as in the ledger, and `time` are None before the first commit; `error` and
    `failing_since` are None while the store works. Times are ISO 8601, in UTC.
    """

    url: str
    epoch: int | None = None
    seq: int | None = None
    step: int | None = None
    sha256: str | None = None
    time: str | None = None
    error: str | None = None
    failing_since: str | None = None

    def write(self, folder: Folder) -> None:
        """Publish the file in the folder of a locked run."""
        content = json.dumps(self._asdict()).encode() + b"\n"
        folder.publish(NAME, [content])


def read_status(folder: Folder) -> MirrorStatus | None:
    """Return the status in a run's folder; None if it has no mirror, or the file is damaged."""
    row = json_lines.parse_row(json_lines.read_start(folder, NAME, _MAX_BYTES))
    if row is None or not isinstance(row.get("url"), str):
        return None
    known: dict[str, Any] = {"url": row["url"]}
    for name in ("epoch", "seq", "step"):
        if type(row.get(name)) is int:
            known[name] = row[name]
    for name in ("sha256", "time", "error", "failing_since"):
        if isinstance(row.get(name), str):
            known[name] = row[name]
    return MirrorStatus(**known)


def is_mirrored(folder: Folder, url: str, sha256: str) -> bool:
    """Tell whether the newest commit in the mirror, as far as is known here, has this checkpoint."""
    status = read_status(folder)
    return status is not None and (status.url, status.sha256) == (store_url.canonical(url), sha256)
