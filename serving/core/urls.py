"""URLs as people may read them: paths, queries and user names may hold secrets."""

from __future__ import annotations

from urllib.parse import urlsplit


def place(url: str) -> str:
    """What a person may read of a URL: scheme, host and port."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        host = parts.hostname or ""
    except ValueError:
        return "a malformed URL"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"
