"""Compressed bodies, both ways, and the limits on what they may grow to."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from typing import Any

import numpy as np
import pytest

from serving.gateway import encoding
from tests.gateway.client import Client, Reply, body, get, infer, post, tensor
from tests.gateway.harness import Gateway, Replica, arm, eventually

M = "/v2/models/m/infer"
COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress}
DECOMPRESS = {"gzip": gzip.decompress, "deflate": zlib.decompress}


def wide(values: np.ndarray, *headers: str, **members: Any) -> bytes:
    data = {"inputs": [tensor("x", [values.tolist()])], **members}
    return post("/v2/models/wide/infer", json.dumps(data).encode(), *headers)


@pytest.mark.parametrize("name", ["gzip", "deflate", "x-gzip", "GZIP", " deflate ", "identity"])
@pytest.mark.parametrize("padding", [0, 2_000_000])
def test_compressed_requests(served: Gateway, name: str, padding: int) -> None:
    """Small ones are inflated on the loop, large ones beside it."""
    compress = COMPRESS.get(name.strip().lower().removeprefix("x-"), bytes)
    noise = "".join(map(str, np.random.default_rng(0).integers(0, 10, padding // 100).tolist()))
    data = compress(body(3, id=noise + " " * padding))
    assert (len(data) > encoding.INLINE_INFLATE_BYTES) is (padding > 0)
    with served.connect() as client:
        reply = client.ask(post(M, data, f"Content-Encoding: {name}"))
        assert reply.values == [6, 6]
        assert client.ask(infer("m", 1)).values == [2, 2]


GZIPPED = gzip.compress(body(1))
BAD = {
    "not gzip": ("gzip", b"{}" * 100, 400),
    "not deflate": ("deflate", b"{}" * 100, 400),
    "raw deflate": ("deflate", zlib.compress(body(1))[2:-4], 400),
    "empty": ("gzip", b"", 400),
    "cut short": ("gzip", GZIPPED[:-9], 400),
    "without its checksum": ("gzip", GZIPPED[:-8], 400),
    "a wrong checksum": ("gzip", GZIPPED[:-8] + bytes(8), 400),
    "bytes behind it": ("gzip", GZIPPED + b"garbage", 400),
    "two members": ("gzip", GZIPPED + GZIPPED, 400),
    "a large one cut short": (
        "gzip",
        gzip.compress(np.random.default_rng(0).bytes(9000))[:-9],
        400,
    ),
    "a bomb": ("gzip", gzip.compress(bytes(64 << 20)), 413),
    "a small bomb": ("deflate", zlib.compress(bytes((4 << 20) + 1)), 413),
    "an unknown encoding": ("br", b"{}", 415),
    "two encodings": ("gzip, deflate", b"{}", 415),
    "nonsense": ("\xff;;", b"{}", 415),
}


@pytest.mark.parametrize(("name", "data", "status"), BAD.values(), ids=BAD.keys())
def test_bad_compressed_requests(served: Gateway, name: str, data: bytes, status: int) -> None:
    before = sum(served.outcomes("m").values())
    with served.connect() as client:
        reply = client.ask(post(M, data, f"Content-Encoding: {name}"))
        assert reply.status == status
        assert reply.error
        assert client.ask(infer("m", 1)).values == [2, 2]
    assert sum(served.outcomes("m").values()) == before + 2


def inflated(reply: Reply) -> Any:
    assert reply.headers["vary"] == "accept-encoding"
    return json.loads(DECOMPRESS[reply.headers["content-encoding"]](reply.body))


ACCEPT = {
    "gzip": "gzip",
    "deflate": "deflate",
    "gzip, deflate": "gzip",
    "deflate, gzip": "deflate",
    "gzip;q=0.5, deflate;q=0.9": "deflate",
    "gzip;q=0.9, deflate;q=0.5": "gzip",
    "gzip;q=0, deflate": "deflate",
    "GZIP; Q=1.0": "gzip",
    "br, gzip;q=0.1": "gzip",
    "gzip;q=0": None,
    "gzip;q=nonsense": None,
    "identity": None,
    "br": None,
    "*": None,
    "": None,
}


@pytest.mark.parametrize(("accept", "chosen"), ACCEPT.items())
@pytest.mark.parametrize("size", [1_000, 40_000])
def test_compressed_replies(served: Gateway, accept: str, chosen: str | None, size: int) -> None:
    """Small ones are compressed on the loop, large ones beside it."""
    x = np.arange(size, dtype=np.float32)
    with served.connect() as client:
        reply = client.ask(wide(x, f"Accept-Encoding: {accept}"))
        assert reply.status == 200
        assert reply.headers.get("content-encoding") == chosen
        answer = inflated(reply) if chosen else reply.json
        assert answer["outputs"][0]["data"] == (-x).tolist()


def test_a_reply_of_a_packet_is_not_compressed(served: Gateway) -> None:
    with served.connect() as client:
        reply = client.ask(infer("m", 1, headers=["Accept-Encoding: gzip"]))
        assert "content-encoding" not in reply.headers
        assert reply.values == [2, 2]


def test_compressed_replies_keep_their_place(served: Gateway) -> None:
    """One that a thread compresses holds up those behind it on its connection."""
    accept = "Accept-Encoding: gzip"
    x = np.arange(40_000, dtype=np.float32)
    with served.connect() as client:
        client.send(wide(x, accept), infer("m", 1), get("/v2/health/live"), wide(x, accept))
        replies = [client.reply() for _ in range(4)]
        assert replies[1].values == [2, 2]
        assert replies[2].json == {"live": True}
        for reply in (replies[0], replies[3]):
            assert inflated(reply)["outputs"][0]["data"] == (-x).tolist()


def test_large_binary_replies_are_not_overwritten(served: Gateway) -> None:
    """A compressor in a thread and a slow reader hold on to bytes while other replies come in."""
    length = 16_000  # under 64 KiB: such a reply shares its receive buffer with others
    errors: list[str] = []

    def ask_many(seed: int, *headers: str) -> None:
        rng = np.random.default_rng(seed)
        with Client(served.port) as client:
            for _ in range(20):
                x = rng.standard_normal(length).astype(np.float32)
                meta = {"name": "x", "shape": [1, length], "datatype": "FP32"}
                meta["parameters"] = {"binary_data_size": x.nbytes}
                members = {"parameters": {"binary_data_output": True}, "id": "i" * 2000}
                text = json.dumps({"inputs": [meta], **members}).encode()
                framing = f"Inference-Header-Content-Length: {len(text)}"
                reply = client.ask(
                    post("/v2/models/wide/infer", text + x.tobytes(), framing, *headers)
                )
                data = reply.body
                if "content-encoding" in reply.headers:
                    data = gzip.decompress(data)
                at = int(reply.headers["inference-header-content-length"])
                if not np.array_equal(np.frombuffer(data[at:], np.float32), -x):
                    errors.append(f"request of seed {seed}")

    threads = [threading.Thread(target=ask_many, args=(s, "Accept-Encoding: gzip")) for s in (1, 2)]
    threads += [threading.Thread(target=ask_many, args=(seed,)) for seed in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("direction", ["Content-Encoding", "Accept-Encoding"])
def test_a_client_may_leave_while_a_thread_works_for_it(
    gateway: Gateway, replica: Replica, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    gateway.publish(arm("m", [replica]))
    entered, leave = threading.Event(), threading.Event()

    def stuck(*_: object) -> bytes:
        entered.set()
        leave.wait(10)
        return body(1)

    monkeypatch.setattr(encoding, "INLINE_INFLATE_BYTES", 0)
    monkeypatch.setattr(encoding, "INLINE_DEFLATE_BYTES", 0)
    monkeypatch.setattr(encoding, "MIN_COMPRESSED_BYTES", 0)
    name = {"Content-Encoding": "decompress", "Accept-Encoding": "compress"}[direction]
    monkeypatch.setattr(encoding, name, stuck)
    client = gateway.connect()
    client.send(infer("m", 5, headers=[f"{direction}: gzip"]))
    assert entered.wait(10)
    connection = gateway.connection(client)
    client.reset()
    gateway.until(lambda: connection not in gateway.server.front.connections)
    leave.set()
    with gateway.connect() as other:
        assert other.ask(infer("m", 7)).values == [14, 14]
    expected = [5.0, 7.0] if direction == "Accept-Encoding" else [7.0]
    assert replica.backend.seen == expected


@pytest.mark.parametrize("inline", [0, 1 << 30])
@pytest.mark.parametrize("direction", ["Content-Encoding", "Accept-Encoding"])
def test_a_compressor_that_fails_is_an_internal_error(
    gateway: Gateway,
    replica: Replica,
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
    inline: int,
) -> None:
    gateway.publish(arm("m", [replica]))

    def fails(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(encoding, "INLINE_INFLATE_BYTES", inline)
    monkeypatch.setattr(encoding, "INLINE_DEFLATE_BYTES", inline)
    monkeypatch.setattr(encoding, "MIN_COMPRESSED_BYTES", 0)
    name = {"Content-Encoding": "decompress", "Accept-Encoding": "compress"}[direction]
    monkeypatch.setattr(encoding, name, fails)
    with gateway.connect() as client:
        reply = client.ask(infer("m", 5, headers=[f"{direction}: gzip"]))
        assert reply.status == 500
        assert reply.error == "internal error"
        assert client.ask(infer("m", 1)).values == [2, 2]
    eventually(lambda: sum(gateway.outcomes("m").values()) == 2)
