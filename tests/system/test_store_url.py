"""The URLs of mirrors."""

from __future__ import annotations

import pytest

from stepctl.mirror.store import open_store
from stepctl.system import store_url


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/runs/digits",
        "gs://bucket/a(b)",
        "az://container/runs",
        "file:///tmp/a b/é",
    ],
)
def test_right(url: str) -> None:
    assert store_url.problem(url) is None
    assert store_url.is_url(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("runs/digits", "not a URL"),
        ("http://host/x", "not a URL"),
        ("S3://bucket/x", "not a URL"),
        ("file:/tmp/x", "not a URL"),
        ("s3://key:secret@bucket/x", "user info"),
        ("s3://bucket/x?versionId=1", "query"),
        ("s3://bucket#x", "query"),
        ("s3:///x", "no valid bucket"),
        ("s3://b\u00fccket/x", "no valid bucket"),
        ("s3://bucket/a/../b", "'..'"),
        ("s3://bucket//b", "empty part"),
        ("s3://bucket/a b", "characters"),
        ("s3://bucket/a\nb", "control characters"),
        ("s3://bucket/" + "a" * 1000, "1000 characters"),
        ("file://host/x", "absolute"),
        ("file:///", "absolute"),
    ],
)
def test_wrong(url: str, why: str) -> None:
    problem = store_url.problem(url)
    assert problem is not None
    assert why in problem
    assert "secret" not in problem


@pytest.mark.parametrize(
    ("url", "name"),
    [("s3://bucket/runs/digits/", "digits"), ("s3://bucket", "bucket"), ("file:///a/b", "b")],
)
def test_the_last_part_names_the_run(url: str, name: str) -> None:
    assert store_url.last_name(url) == name


@pytest.mark.parametrize(
    "url", ["s3://bucket/a/", "s3://bucket", "file:///tmp/a b/é/", "file:///tmp/a%20b"]
)
def test_the_canonical_form_is_the_store_s(url: str) -> None:
    assert store_url.canonical(url) == open_store(url).url


@pytest.mark.parametrize(
    "plain",
    [
        None,
        {},
        {"mirror": None},
        {"mirror": "s3://bucket/x"},
        {"mirror": {"url": 1}},
        {"mirror": {"url": "runs/digits"}},
        {"mirror": {"url": "s3://user:secret@bucket/x"}},
    ],
)
def test_a_config_without_a_valid_url_has_no_mirror(plain: object) -> None:
    assert store_url.mirror_of(plain) is None


def test_the_mirror_of_a_config() -> None:
    assert store_url.mirror_of({"mirror": {"url": "s3://bucket/x"}}) == "s3://bucket/x"
