"""Content encodings of bodies: gzip and deflate, bounded."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from serving.errors import InvalidRequest, PayloadTooLarge, UnsupportedEncoding

# Smaller replies grow, or gain less than a packet, when compressed.
MIN_COMPRESSED_BYTES: Final = 1024
# Beyond these, the work takes milliseconds and is kept off the event loop. What is inflated may
# grow a thousandfold.
INLINE_DEFLATE_BYTES: Final = 64 << 10
INLINE_INFLATE_BYTES: Final = 4 << 10
_LEVEL: Final = 1
_GZIP_WBITS: Final = 31
_ZLIB_WBITS: Final = 15

_Buffer = bytes | bytearray | memoryview


def decompress(data: _Buffer, encoding: str, max_bytes: int) -> _Buffer:
    """A request body in `Content-Encoding: encoding`, decoded.

    "deflate" is the zlib format of RFC 9110 §8.4.1.2. Raises `UnsupportedEncoding`,
    `InvalidRequest` for malformed data, and `PayloadTooLarge` past `max_bytes`.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnsupportedEncoding(
            f"Content-Encoding {encoding[:40]!r} is not supported; allowed: gzip, deflate, identity"
        )
    stream = zlib.decompressobj(_ZLIB_WBITS if encoding == "deflate" else _GZIP_WBITS)
    try:
        out = stream.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not valid {encoding}: {error}") from error
    if len(out) > max_bytes:
        raise PayloadTooLarge(f"the body exceeds {max_bytes} bytes when decompressed")
    if not stream.eof:
        raise InvalidRequest(f"the {encoding} body is cut short")
    if stream.unused_data:
        raise InvalidRequest(f"{len(stream.unused_data)} bytes follow the {encoding} body")
    return out


def choose(accept_encoding: bytes) -> str:
    """The encoding to answer with, "" for none: the client's most preferred of gzip and deflate."""
    best, best_q = "", 0.0
    for item in accept_encoding.decode("latin-1").lower().split(","):
        name, _, parameters = item.partition(";")
        name = name.strip()
        if name not in ("gzip", "deflate"):
            continue
        q = 1.0
        key, _, value = parameters.strip().partition("=")
        if key.strip() == "q":
            try:
                q = float(value)
            except ValueError:
                continue
        if q > best_q:
            best, best_q = name, q
    return best


def compress(parts: Sequence[_Buffer], encoding: str) -> bytes:
    """A reply body, compressed."""
    wbits = _ZLIB_WBITS if encoding == "deflate" else _GZIP_WBITS
    stream = zlib.compressobj(_LEVEL, wbits=wbits)
    return b"".join([*(stream.compress(p) for p in parts), stream.flush()])
