"""Frames from a stream of bytes: the receiving half of a connection to a replica."""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import Final

from typing_extensions import override

from serving.core import frames
from serving.core.frames import FrameError, Kind

log = logging.getLogger(__name__)

_SCRATCH: Final = 1 << 16
_PREFIX: Final = frames.PREFIX.size


class FrameReceiver(asyncio.BufferedProtocol):
    """Reassembles frames: small ones in a scratch buffer, a large one in a buffer of its own."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._scratch = bytearray(_SCRATCH)
        self._view = memoryview(self._scratch)
        self._have = 0
        self._head = (Kind.PING, 0, 0, 0)
        self._need = _PREFIX
        self._large: memoryview | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    @override
    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._have :] if self._large is None else self._large[self._have :]

    @override
    def buffer_updated(self, nbytes: int) -> None:
        self._have += nbytes
        try:
            while self._have >= self._need:
                if self._need == _PREFIX and not self._start_frame():
                    continue
                self._end_frame()
        except (FrameError, struct.error) as error:
            log.warning("replica sent a malformed frame: %s", error)
            if self.transport is not None:
                self.transport.abort()

    def _start_frame(self) -> bool:
        """Read the prefix; True when the whole frame is there already."""
        self._head = frames.decode_prefix(self._scratch)
        _, _, meta, payload = self._head
        self._need = _PREFIX + meta + payload
        if self._need == _PREFIX:
            return True
        if self._need > _SCRATCH:
            large = memoryview(bytearray(self._need))
            large[: self._have] = self._view[: self._have]
            self._large = large
        return self._have >= self._need

    def _end_frame(self) -> None:
        kind, tensors, meta, payload = self._head
        whole = self._view if self._large is None else self._large
        rest = bytes(whole[self._need : self._have]) if self._have > self._need else b""
        end = _PREFIX + meta
        frame_meta, frame_payload = whole[_PREFIX:end], whole[end : end + payload]
        if self._large is None:
            # The scratch buffer is about to be read into again; an answer may be written later.
            frame_payload = memoryview(bytes(frame_payload))
        self._large, self._have, self._need = None, len(rest), _PREFIX
        self.frame(kind, tensors, frame_meta, frame_payload)
        if rest:
            self._view[: len(rest)] = rest

    def frame(self, kind: Kind, tensors: int, meta: memoryview, payload: memoryview) -> None:
        """Handle one frame. `meta` is only valid during the call; `payload` may be kept."""
        raise FrameError(f"unexpected {kind.name}")
