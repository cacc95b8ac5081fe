"""URLs of folders in object storage: s3://BUCKET/PATH, gs://, az:// and file:///PATH.

A wrong URL may hold a password. The messages about it, therefore, do not repeat it.
"""

import re

_SCHEMES = ("s3", "gs", "az", "file")
_FORM = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<host>[^/]*)(?P<path>/.*)?", re.DOTALL
)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_FOLDER = re.compile(r"[A-Za-z0-9!_.*'()=,+-]{1,255}")
_MAX_LENGTH = 1000


def is_url(text: str) -> bool:
    """Tell whether a text is the URL of a store, and not a path."""
    match = _FORM.match(text)
    return match is not None and match["scheme"] in _SCHEMES


def mirror_of(plain: object) -> str | None:
    """Return the mirror's URL in a config that is not validated yet; None without a valid one."""
    section = plain.get("mirror") if isinstance(plain, dict) else None
    url = section.get("url") if isinstance(section, dict) else None
    if not isinstance(url, str) or problem(url) is not None:
        return None
    return url


def last_name(url: str) -> str:
    """Return the last part of the path, or the bucket: the name of the run in a checked URL."""
    return url.rstrip("/").rpartition("/")[2]


def canonical(url: str) -> str:
    """Return a checked URL in the form that the store's messages and files have."""
    if url.startswith("file://"):
        import urllib.parse  # not at the top: `--help` needs none
        from pathlib import Path

        return Path(urllib.parse.unquote(url.removeprefix("file://"))).as_uri()
    return url.rstrip("/")


def problem(url: str) -> str | None:
    """Return what is wrong with a URL, and what is allowed; None if it is right."""
    match = _FORM.fullmatch(url)
    if match is None or match["scheme"] not in _SCHEMES:
        return (
            "is not a URL of a store; give s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH "
            "or file:///PATH"
        )
    if "@" in match["host"]:
        return (
            "contains user info; remove it, and give credentials by environment variables such as "
            "AWS_ACCESS_KEY_ID"
        )
    place = f"{match['host']}{match['path'] or ''}"
    if "?" in place or "#" in place:
        return "contains a query or a fragment; give the bucket and the path alone"
    if not url.isprintable() or len(url) > _MAX_LENGTH:
        return f"has control characters, or more than {_MAX_LENGTH} characters; give another"
    return _problem_of_parts(
        match["scheme"], match["host"], (match["path"] or "")[1:].removesuffix("/")
    )


def _problem_of_parts(scheme: str, bucket: str, path: str) -> str | None:
    folders = path.split("/")
    if any(folder in (".", "..") for folder in folders) or "" in folders[:-1]:
        return "has an empty part, '.' or '..' in its path; give the path itself"
    if scheme == "file":
        if bucket or not path:
            return "is not that of a directory; give an absolute path: file:///PATH"
        return None
    if not _BUCKET.fullmatch(bucket):
        return f"has no valid bucket; give one: {scheme}://BUCKET/PATH"
    if path and not all(map(_FOLDER.fullmatch, folders)):
        return "has other characters in its path than letters, digits and !_.*'()=,+-"
    return None
