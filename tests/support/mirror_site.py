"""An object store behind the fault proxy, the commands that use it, and readers of what is in it.

The objects are read as stepctl/mirror/PROTOCOL.md describes them, without the code under attack.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote
from xml.etree import ElementTree

from tests.support import series_files
from tests.support.fault_proxy import HOST, SLOW_RATE, FaultProxy, Request
from tests.support.object_store import S3Server, s3_server
from tests.support.program_runs import rows
from tests.support.run_checks import Trial, checkpoints, contents, leftovers

BUCKET = "mirrors"
BEAT_SECONDS = 0.2
_ENTRY = re.compile(r"log/([0-9]{10})-([0-9]{10})")
_SIGNED = "AWS4-HMAC-SHA256 Credential=key/20200101/us-east-1/s3/aws4_request"  # moto asks no more
_XML = "{http://s3.amazonaws.com/doc/2006-03-01/}"


@dataclass(frozen=True)
class Commit:
    """A manifest in the store."""

    epoch: int
    seq: int
    fields: dict[str, Any]

    @property
    def step(self) -> int:
        step: int = self.fields["step"]
        return step

    def objects(self) -> Iterator[tuple[str, str, int]]:
        """Yield name, sha256 and size of all its objects."""
        listed = [self.fields["checkpoint"], self.fields["config"]]
        listed += [chunk for chunks in self.fields["files"].values() for chunk in chunks]
        for epoch, seq, sha256, size in listed:
            yield f"data/{epoch:010d}-{seq:010d}-{sha256}", sha256, size


@contextlib.contextmanager
def object_store_site(rate: int = SLOW_RATE) -> Iterator[Site]:
    """Run a store with an empty bucket, and a proxy before it."""
    with s3_server() as server:
        port = int(server.endpoint.rpartition(":")[2])
        server.create_bucket(BUCKET)
        with FaultProxy((HOST, port), rate) as proxy:
            yield Site(server, proxy)


class Site:
    """A store of many mirrors. `proxy` stands between it and the processes of stepctl."""

    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._server = server
        self._n_mirrors = 0

    def new_url(self) -> str:
        """Return the URL of a mirror that is not there yet."""
        self._n_mirrors += 1
        return f"s3://{BUCKET}/mirror-{self._n_mirrors}"

    def environment(self) -> dict[str, str]:
        """Return what a process needs to reach the store through the proxy."""
        return {**self._server.environment, "AWS_ENDPOINT_URL": self.proxy.url}

    def names(self, url: str, prefix: str = "") -> list[str]:
        """Return the names of a mirror's objects, in their order."""
        root = _path(url)
        found: list[str] = []
        while True:
            after = f"{root}/{found[-1]}" if found else ""
            target = f"/{BUCKET}?list-type=2&prefix={quote(f'{root}/{prefix}')}&start-after={after}"
            page = ElementTree.fromstring(self._ask("GET", target))
            keys = [str(key.text) for key in page.iter(f"{_XML}Key")]
            found += [key.removeprefix(f"{root}/") for key in keys]
            if page.findtext(f"{_XML}IsTruncated") != "true":
                return found

    def read(self, url: str, name: str) -> bytes:
        """Return an object's content."""
        return self._ask("GET", f"/{BUCKET}/{_path(url)}/{name}")

    def write(self, url: str, name: str, content: bytes) -> None:
        """Create or overwrite an object."""
        self._ask("PUT", f"/{BUCKET}/{_path(url)}/{quote(name)}", content)

    def copy(self, url: str) -> str:
        """Copy a mirror; return the URL of the copy."""
        other = self.new_url()
        for name in self.names(url):
            self.write(other, name, self.read(url, name))
        return other

    def commits(self, url: str) -> list[Commit]:
        """Return the commits in a mirror, oldest first."""
        names = [name for name in self.names(url, "log/") if seq_of(name)]
        return [parse_commit(name, self.read(url, name)) for name in names]

    def newest_step(self, url: str) -> int | None:
        """Return the step of the newest commit, None without any."""
        commits = self.commits(url)
        return commits[-1].step if commits else None

    def faults(self, url: str) -> list[str]:
        """Return what is missing or wrong of the objects of the newest commit and of those it keeps."""
        wrong = []
        commits = {(commit.epoch, commit.seq): commit for commit in self.commits(url)}
        if not commits:
            return []
        newest = commits[max(commits)]
        kept = [commits[epoch, seq] for epoch, seq, _ in newest.fields["previous"]]
        for commit in (newest, *kept):
            present = set(self.names(url, "data/"))
            for name, sha256, size in commit.objects():
                if name not in present:
                    wrong.append(f"{commit.epoch}-{commit.seq}: {name} is missing")
                    continue
                content = self.read(url, name)
                if (len(content), hashlib.sha256(content).hexdigest()) != (size, sha256):
                    wrong.append(f"{commit.epoch}-{commit.seq}: {name} is damaged")
        return wrong

    def created(self, url: str) -> dict[str, dict[str, Any]]:
        """Return the fields of each owner and manifest that was created through the proxy, by name.

        Those whose process never got the reply count too.
        """
        part = f"/{_path(url)}/log/"
        return {
            f"log/{request.target.rpartition('/')[2]}": fields_of(request.body)
            for request in self.proxy.requests
            if part in request.target and was_created(request)
        }

    def _ask(self, method: str, target: str, body: bytes | None = None) -> bytes:
        client = HTTPConnection(*self.proxy.upstream)
        try:
            client.request(method, target, body, {"Authorization": _SIGNED})
            reply = client.getresponse()
            content = reply.read()
            assert reply.status in (200, 204), f"{method} {target}: {reply.status} {content!r}"
            return content
        finally:
            client.close()


def was_created(request: Request) -> bool:
    """Tell whether the store has carried out a PUT."""
    return request.method == "PUT" and request.status == 200


def parse_commit(name: str, content: bytes) -> Commit:
    """Return the commit of a manifest; AssertionError if it is damaged."""
    match = _ENTRY.fullmatch(name)
    assert match, name
    assert content.startswith(b"stepctl-manifest 1\n"), content
    return Commit(int(match[1]), int(match[2]), fields_of(content))


def fields_of(content: bytes) -> dict[str, Any]:
    """Return the fields of an owner or a manifest; AssertionError if it is damaged."""
    _, digest, body = content.split(b"\n", 2)
    assert digest == b"sha256: " + hashlib.sha256(body).hexdigest().encode(), content
    fields: dict[str, Any] = json.loads(body)
    return fields


def seq_of(name: str) -> int:
    """Return the number of a commit within its epoch; 0 for the owner of the epoch."""
    return int(name.rpartition("-")[2])


def assert_finished(trial: Trial, run: Path) -> None:
    """Assert that a run ended as the uninterrupted one without a mirror: checkpoint, rows and series."""
    expected = trial.folder / "whole" / "run"
    state = contents(checkpoints(run)[trial.last_step])
    assert state | {"config": None} == trial.contents | {"config": None}
    assert rows(run) == rows(expected)
    assert series_files.contents(run) == series_files.contents(expected)
    assert not leftovers(run)


# --- processes with short delays


def quick_mirror() -> None:
    """A `call` for `stepctl` whose delays are short; MIRROR_HOST names the host that it seems to be on.

    MIRROR_SECONDS is a file for the seconds that the training thread spent on the mirror.
    """
    from stepctl.__main__ import main
    from stepctl.mirror import cloud_store, fetch, manifest, uploader
    from stepctl.runs.mirroring import Mirroring

    def replace(place: object, name: str, value: object) -> None:
        mock.patch.object(place, name, value).start()

    replace(cloud_store, "_IDLE_SECONDS", 1)
    replace(fetch, "_DELAYS", (0.01, 0.02, 0.04, 0.1, 0.2))
    defaults: Any = uploader.Uploader.__init__.__kwdefaults__
    defaults["delays"] = uploader.Delays(0.02, 0.2)
    own = manifest.Owner.this_process
    replace(manifest.Owner, "this_process", lambda run_id: own(run_id, BEAT_SECONDS))
    host = os.environ.get("MIRROR_HOST")
    if host is not None:
        replace(manifest, "boot_id", lambda: f"boot of {host}")
    file = os.environ.get("MIRROR_SECONDS")
    if file is not None:
        close = Mirroring.close

        def noting_close(mirroring: Mirroring, seconds: float | None = None) -> None:
            Path(file).write_text(str(mirroring.seconds_on_training_thread))
            close(mirroring, seconds)

        replace(Mirroring, "close", noting_close)
    main()


def _path(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/")
