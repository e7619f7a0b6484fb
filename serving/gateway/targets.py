"""Request targets: their forms, and the model that one names."""

from __future__ import annotations

import urllib.parse

from serving.errors import NotFound


def origin_form(target: bytes) -> bytes:
    """`http://host/path?query` without its first part (RFC 9112 §3.2.2); others as they are."""
    scheme, separator, rest = target.partition(b"://")
    authority_end = min((i for i in map(rest.find, (b"/", b"?")) if i >= 0), default=len(rest))
    if not separator or scheme.lower() not in (b"http", b"https") or not authority_end:
        return target
    path = rest[authority_end:]
    return path if path.startswith(b"/") else b"/" + path


def normal_path(path: bytes) -> bytes:
    """A target's path in origin form and without percent-encoding."""
    return urllib.parse.unquote_to_bytes(origin_form(path))


def model_and_version(path: bytes) -> tuple[str, str | None]:
    """The names in /v2/models/M[/versions/V]/infer. Raises `NotFound`."""
    parts = path.decode("utf-8", "replace").split("/")
    if len(parts) == 5:
        return parts[3], None
    if len(parts) == 7 and parts[4] == "versions":
        return parts[3], parts[5]
    raise NotFound("the path is not of the form /v2/models/MODEL[/versions/VERSION]/infer")
