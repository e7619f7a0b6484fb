"""Bytes that are no frames: each ends its own connection and hurts no other."""

from __future__ import annotations

import contextlib
import socket
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.core import frames
from serving.core.frames import Kind
from serving.replica.backends.base import Backend
from serving.replica.server import ReplicaServer

from . import models
from .client import Client, infer_frame
from .conftest import Serve, rows


@pytest.mark.parametrize(
    "first",
    [
        infer_frame(1, 1, (np.ones((1, 4), np.float32),)),
        frames.encode_json(Kind.HELLO, {"role": "admin"}),
        frames.encode_json(Kind.HELLO, {"role": ["data"]}),
        frames.encode_prefix(Kind.HELLO, 0, 4096, 0) + b"[" * 4096,
        frames.encode_prefix(Kind.HELLO, 0, 3, 0) + b"{}}",
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        struct.pack("<BBHIQ", Kind.HELLO, 9, 0, 0, 0),
        frames.encode_prefix(Kind.HELLO, 0, 1 << 19, 0),
    ],
)
def test_a_bad_handshake_is_refused(serve: Serve, linear_backend: Backend, first: bytes) -> None:
    server = serve(linear_backend)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.unix_path)
        sock.settimeout(30)
        sock.sendall(first)
        answer = read_all(sock)
    kind, _, meta, _ = frames.decode_prefix(answer)
    assert kind is Kind.REFUSED
    assert frames.decode_json(answer[16 : 16 + meta])["error"]
    with Client.unix(server.unix_path) as client:
        assert len(client.infer(rows(1))[0]) == 1


@pytest.mark.parametrize(
    ("role", "frame"),
    [
        ("data", frames.encode_prefix(Kind.PING, 0, 0, 0)),
        ("heartbeat", infer_frame(1, 1, (np.ones((1, 4), np.float32),))),
        ("data", frames.encode_prefix(Kind.INFER, 0, 8, 0) + bytes(8)),
        ("data", frames.encode_prefix(Kind.INFER, 1, 24, 0) + bytes(24)),
        ("data", frames.encode_prefix(Kind.INFER, 0, 40, 0) + bytes(40)),
        ("data", frames.encode_prefix(Kind.INFER, 0, 1 << 21, 0)),
        ("data", frames.encode_prefix(Kind.INFER, 0, 24, 1 << 40)),
        ("data", frames.encode_prefix(Kind.INFER, 0, 24, 8) + bytes(32)),
    ],
)
def test_a_malformed_frame_closes_its_connection_only(
    serve: Serve, linear_backend: Backend, role: str, frame: bytes
) -> None:
    server = serve(linear_backend)
    with Client.unix(server.unix_path) as other, Client.unix(server.unix_path, role) as bad:
        bad.sock.sendall(frame)
        assert read_all(bad.sock) == b""
        assert len(other.infer(rows(2))[0]) == 2


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            data += part
    return data


GOOD = infer_frame(5, 2, (np.ones((2, 4), np.float32),))


@st.composite
def damaged_frames(draw: st.DrawFn) -> bytes:
    """Random bytes, or a good frame with some bytes changed, removed or added."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    frame = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(frame) - 1))
        frame[at] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(frame)))
    return bytes(frame[: draw(st.sampled_from([cut, len(frame)]))] + draw(st.binary(max_size=8)))


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(damaged_frames())
def test_damaged_frames_never_hurt_others(
    serve: Serve, linear_backend: Backend, frame: bytes
) -> None:
    server = _shared_server(serve, linear_backend)
    with Client.unix(server.unix_path) as bad:
        bad.sock.sendall(frame)
        bad.sock.shutdown(socket.SHUT_WR)
        answer = read_all(bad.sock)
    if answer:
        # Whatever was answered is a whole frame of a kind that answers INFER.
        kind, _, meta, payload = frames.decode_prefix(answer)
        assert kind in (Kind.RESULT, Kind.FAILED)
        assert len(answer) >= frames.PREFIX.size + meta + payload
    with Client.unix(server.unix_path) as good:
        x = np.ones((2, 4), np.float32)
        np.testing.assert_allclose(good.infer(x)[0], x @ models.LINEAR_W, rtol=1e-5)


def _shared_server(serve: Serve, backend: Backend) -> ReplicaServer:
    """One server for all examples of a property: `serve` is one object for the whole test."""
    if not hasattr(serve, "shared"):
        serve.shared = serve(backend)  # type: ignore[attr-defined]
    return serve.shared  # type: ignore[attr-defined]
