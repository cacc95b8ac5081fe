"""The operations of each object store, and the URLs that open one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stepctl.errors import CheckpointError, ConfigError, StepctlError, UnreadableError
from stepctl.mirror import cloud_store
from stepctl.mirror.store import ObjectStore, StoreUnavailable, open_store
from tests.support.object_store import PAGE, MemoryStore, S3Server, environment, s3_server

PART = 5 << 20  # bytes; the smallest part of S3


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(
    params=["memory", "file", pytest.param("s3", marks=pytest.mark.process)],
)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "file":
        return open_store(f"file://{tmp_path}/missing/folders/mirror")
    server: S3Server = request.getfixturevalue("server")
    server.reset()
    server.create_bucket("bucket")
    _set_environment(monkeypatch, server.environment)
    monkeypatch.setattr(cloud_store, "_PART_BYTES", PART)
    return open_store("s3://bucket/runs/digits")


def _set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _downloaded(store: ObjectStore, name: str, size: int) -> bytes:
    pieces = store.download(name, size)
    assert pieces is not None
    return b"".join(pieces)


def test_an_object_is_created_once(store: ObjectStore) -> None:
    assert store.get("log/1", 10) is None
    assert store.create("log/1", b"first")
    assert not store.create("log/1", b"second")
    assert store.get("log/1", 10) == b"first"
    store.put("log/1", b"third")
    assert store.get("log/1", 5) == b"third"
    with pytest.raises(CheckpointError, match="has more than 4 bytes"):
        store.get("log/1", 4)


@pytest.mark.parametrize("size", [0, 1, PART, 2 * PART + 1])
def test_an_upload_comes_back(store: ObjectStore, size: int) -> None:
    content = os.urandom(size)
    file = io.BytesIO(b"before" + content + b"after")
    file.seek(6)
    store.upload("data/x", file, size, _digest(content))
    assert file.read() == b"after"
    assert store.size("data/x") == size
    assert _downloaded(store, "data/x", size) == content
    with pytest.raises(CheckpointError, match=f"{size} bytes instead of {size + 1}"):
        store.download("data/x", size + 1)


@pytest.mark.parametrize("size", [5, 2 * PART])
@pytest.mark.parametrize("fault", ["other bytes", "too short"])
def test_a_file_that_changed_is_not_uploaded(store: ObjectStore, size: int, fault: str) -> None:
    content = bytes(size)
    digest = _digest(content)
    if fault == "too short":
        content = content[:-1]
    else:
        content = content[:-1] + b"x"
    with pytest.raises(StepctlError, match="sha256 mismatch"):
        store.upload("data/x", io.BytesIO(content), size, digest)
    assert store.size("data/x") is None


@pytest.mark.parametrize("size", [5, 2 * PART])
def test_a_file_that_cannot_be_read_is_not_uploaded(store: ObjectStore, size: int) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() == 0 and size == PART:
                return super().read(size)
            raise OSError(5, "Input/output error")

    with pytest.raises(UnreadableError, match="Input/output error"):
        store.upload("data/x", Failing(bytes(size)), size, _digest(bytes(size)))
    assert store.size("data/x") is None


def test_names_are_listed_by_prefix(store: ObjectStore) -> None:
    assert list(store.list("log/")) == []
    for number in range(5):
        store.create(f"log/{number}", b"x" * number)
    store.create("data/1", b"")
    assert sorted(store.list("log/")) == [(f"log/{number}", number) for number in range(5)]
    assert sorted(store.list("log/", after="log/2")) == [("log/3", 3), ("log/4", 4)]
    store.delete("log/3")
    store.delete("log/3")
    assert sorted(store.list("log/", after="log/2")) == [("log/4", 4)]


def test_a_listing_has_all_pages(store: ObjectStore) -> None:
    names = [f"log/{number:02}" for number in range(2 * PAGE + 1)]
    for name in names:
        store.put(name, b"")
    assert sorted(name for name, _ in store.list("log/")) == names
    assert sorted(name for name, _ in store.list("log/", after=names[1])) == names[2:]


@pytest.mark.process
def test_one_of_many_creations_succeeds(store: ObjectStore) -> None:
    n_created = []
    barrier = threading.Barrier(8)

    def create() -> None:
        barrier.wait()
        n_created.append(store.create("log/1", threading.current_thread().name.encode()))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n_created) == [False] * 7 + [True]


# --- failures of a store on the network


def _answer(listener: socket.socket, status: str) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the test has ended
            return
        with connection, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in connection.recv(10_000):
                pass
            head = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode())


@pytest.mark.parametrize(
    "status",
    [
        "400 Bad Request",
        "403 Forbidden",
        "409 Conflict",
        "412 Precondition Failed",
        "500 Internal Server Error",
    ],
)
def test_every_bad_answer_is_store_unavailable(
    monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _set_environment(monkeypatch, environment(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        thread = threading.Thread(target=_answer, args=(listener, status), daemon=True)
        thread.start()
        store = open_store("s3://bucket/runs/digits")
        requests: list[Callable[[], object]] = [
            lambda: store.put("log/1", b""),
            lambda: store.get("log/1", 1),
            lambda: store.download("log/1", 1),
            lambda: store.size("log/1"),
            lambda: store.delete("log/1"),
            lambda: list(store.list("log/")),
        ]
        if status[:3] not in ("409", "412"):
            requests.append(lambda: store.create("log/1", b""))
        for request in requests:
            with pytest.raises(StoreUnavailable, match=f"the store answered {status[:3]}"):
                request()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.process
def test_a_missing_bucket_is_not_an_empty_one(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.reset()
    _set_environment(monkeypatch, server.environment)
    store = open_store("s3://missing/runs/digits")
    with pytest.raises(StoreUnavailable, match=r"404 Not Found \(NoSuchBucket\)"):
        store.get("log/1", 10)
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        list(store.list("log/"))
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        store.create("log/1", b"")


def test_no_message_contains_credentials_or_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    _set_environment(monkeypatch, environment(f"http://127.0.0.1:{port}"))
    store = open_store("s3://bucket/runs/digits")
    with pytest.raises(StoreUnavailable) as caught:
        store.create("log/1", b"")
    assert str(caught.value) == "s3://bucket/runs/digits: cannot create log/1: Connection refused"


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_store, "_IDLE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        _set_environment(monkeypatch, environment(f"http://127.0.0.1:{port}"))
        store = open_store("s3://bucket/runs/digits")
        for request in (
            lambda: store.create("log/1", b"x"),
            lambda: store.get("log/1", 1),
            lambda: store.delete("log/1"),
        ):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="did not answer in time"):
                request()
            assert 0.25 < time.monotonic() - began < 5


def _serve_slowly(listener: socket.socket, bytes_per_second: int) -> None:
    """Accept one request after the other, read its body slowly, and answer."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the test has ended
            return
        with connection, contextlib.suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(1000)
            head, _, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            remaining = int(length[1]) - len(body)
            while remaining > 0:
                piece = connection.recv(min(remaining, 1 << 16))
                if not piece:
                    break
                remaining -= len(piece)
                time.sleep(len(piece) / bytes_per_second)
            connection.sendall(b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 0\r\n\r\n")


def test_a_slow_network_gets_more_time_after_each_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_store, "_IDLE_SECONDS", 0.1)
    monkeypatch.setattr(cloud_store, "_FASTEST", 32 << 20)
    content = bytes(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        _set_environment(monkeypatch, environment(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        thread = threading.Thread(target=_serve_slowly, args=(listener, 4 << 20), daemon=True)
        thread.start()
        store = open_store("s3://bucket/runs/digits")
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            store.put("beats/1", content)
        n_failures = 1
        while n_failures < 10:
            try:
                store.put("beats/1", content)
            except StoreUnavailable:
                n_failures += 1
            else:
                break
        assert n_failures < 10
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_ALLOW_HTTP", "perhaps"), ("AWS_CHECKSUM_ALGORITHM", "crc")]
)
def test_a_wrong_variable_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    _set_environment(monkeypatch, {**environment("http://127.0.0.1:1"), variable: value})
    with pytest.raises(ConfigError, match=f"environment variables AWS_.*{value}"):
        open_store("s3://bucket/runs/digits")


@pytest.mark.parametrize(
    "endpoint",
    [
        "127.0.0.1:9000",
        "not a url",
        "http://",
        "ftp://host",
        "https://user:hunter2@host",
        "https://h/\n",
    ],
)
def test_a_wrong_endpoint_is_a_config_error(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    _set_environment(monkeypatch, environment(endpoint))
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL is not of the form") as caught:
        open_store("s3://bucket/runs/digits")
    assert "hunter2" not in str(caught.value)


def test_http_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_environment(monkeypatch, environment("http://127.0.0.1:1"))
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(ConfigError, match="AWS_ALLOW_HTTP=true"):
        open_store("s3://bucket/runs/digits")


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    _set_environment(monkeypatch, environment(f"http://127.0.0.1:{port}"))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreUnavailable, match="no credentials; set AWS_ACCESS_KEY_ID and"):
        open_store("s3://bucket/runs/digits").get("log/1", 1)


def test_an_unknown_host_is_store_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_environment(monkeypatch, environment("http://missing.invalid"))
    with pytest.raises(StoreUnavailable, match="failed to lookup address information"):
        open_store("s3://bucket/runs/digits").get("log/1", 1)


# --- a directory


def test_a_directory_holds_plain_files(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/a%20mirror/")
    assert store.url == f"file://{tmp_path}/a%20mirror"
    store.create("log/1", b"content")
    assert (tmp_path / "a mirror" / "log" / "1").read_bytes() == b"content"
    assert list((tmp_path / "a mirror" / ".tmp").iterdir()) == []


def test_links_and_pipes_in_a_directory_are_not_followed(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    store.create("log/1", b"content")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "log" / "2").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "log" / "3")
    assert [name for name, _ in store.list("log/")] == ["log/1"]
    for name in ("log/2", "log/3"):
        with pytest.raises(StoreUnavailable, match=f"cannot read {name}"):
            store.get(name, 10)


def test_abandoned_temporary_files_are_removed_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / ".tmp"
    folder.mkdir()
    for name, days in (("old", 2), ("new", 0)):
        (folder / name).write_bytes(b"")
        moment = time.time() - days * 86400
        os.utime(folder / name, (moment, moment))
    open_store(f"file://{tmp_path}").put("beats/1", b"")
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(f"file://{tmp_path}/file")
    with pytest.raises(StoreUnavailable, match="Not a directory"):
        store.create("log/1", b"")


def test_a_file_system_without_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ConfigError, match="no hard links"):
        open_store(f"file://{tmp_path}").create("log/1", b"")
    assert list((tmp_path / ".tmp").iterdir()) == []


# --- URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://my.bucket-1/runs/digits/", "s3://my.bucket-1/runs/digits"),
        ("gs://bucket/runs/lr=0.1", "gs://bucket/runs/lr=0.1"),
        ("az://container/runs/x", "az://container/runs/x"),
        ("file:///data/runs/x/", "file:///data/runs/x"),
        ("file:///data/my runs/x", "file:///data/my%20runs/x"),
        ("file:///data/my%20runs/x", "file:///data/my%20runs/x"),
    ],
)
def test_urls(url: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert open_store(url).url == expected


@pytest.mark.parametrize(
    "url",
    [
        "runs/digits",
        "http://host/path",
        "s3://key:hunter2@bucket/path",
        "s3://bucket/path?secret=hunter2",
        "s3://bucket/../other",
        "file://user:hunter2@host/path",
        "file:///",
        "file:///a/%00",
        "file:///a/%2e%2e/b",
    ],
)
def test_bad_urls(url: str) -> None:  # more: system/test_store_url.py
    with pytest.raises(ConfigError, match="the URL of the mirror") as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
