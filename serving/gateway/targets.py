"""Request targets: their forms, the host that goes with them, and the model that one names."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable
from typing import Final

from serving.errors import NotFound

# RFC 3986 §3.2.2: an address in brackets, or a name (which an IPv4 address is, too); then a port.
_HOST: Final = re.compile(rb"(\[[\w.~!$&'()*+,;=:-]+\]|[\w.~!$&'()*+,;=%-]*)(:[0-9]*)?", re.ASCII)


def host_fault(headers: Iterable[tuple[bytes, bytes]], version: str) -> str | None:
    """What is wrong with a request's Host header, if anything (RFC 9112 §3.2).

    Names are lower-case. A proxy in front may have chosen the gateway by another one of several.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1:
        return f"{len(hosts)} Host headers, one is allowed"
    if not hosts:
        return "no Host header" if version == "1.1" else None
    if not _HOST.fullmatch(hosts[0].strip(b" \t")):
        return f"the Host header {hosts[0][:80].decode('latin-1')!r} is no host and port"
    return None


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
