"""URLs of folders in object storage: s3://BUCKET/PATH, gs://, az:// and file:///PATH.

A wrong URL may hold a password. The messages about it, therefore, do not repeat it.
"""

import re

_SCHEMES = ("s3", "gs", "az", "file")
_FORM = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<host>[^/]*)(?P<path>/.*)?", re.DOTALL
)
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_LENGTH = 1000


def is_url(text: str) -> bool:
    """Tell whether a text is the URL of a store, and not a path."""
    match = _FORM.match(text)
    return match is not None and match["scheme"] in _SCHEMES


def last_name(url: str) -> str:
    """Return the last part of the path, or the bucket: the name of the run in a checked URL."""
    return url.rstrip("/").rpartition("/")[2]


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
    return _problem_of_parts(match["scheme"], match["host"], match["path"] or "", len(url))


def _problem_of_parts(scheme: str, host: str, path: str, length: int) -> str | None:
    if "?" in path or "#" in path or "?" in host or "#" in host:
        return "contains a query or a fragment; give the bucket and the path alone"
    if not path.isprintable() or "\\" in path or length > _MAX_LENGTH:
        return "has characters that a path in a store cannot have, or too many of them"
    names = path.strip("/").split("/")
    if any(name in (".", "..") for name in names) or "" in names[:-1]:
        return "has an empty part, '.' or '..' in its path; give the path itself"
    if scheme == "file":
        if host:
            return "is not of this machine; a file URL has three slashes: file:///PATH"
        if not path.strip("/"):
            return "has no path; give one: file:///PATH"
    elif not _HOST.fullmatch(host):
        return f"has no valid bucket; give one: {scheme}://BUCKET/PATH"
    return None
