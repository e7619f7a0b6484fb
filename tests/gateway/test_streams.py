"""However a stream of requests is cut into pieces, the replies are the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.client import Reply, body, chunked, get, head, infer, post
from tests.gateway.harness import Gateway

M = "/v2/models/m/infer"
UPGRADE = ("Upgrade: h2c", "Connection: Upgrade")


def gives(*values: float) -> Callable[[Reply], bool]:
    return lambda reply: reply.status == 200 and reply.values == list(values)


def status(code: int) -> Callable[[Reply], bool]:
    return lambda reply: reply.status == code and (code < 400 or bool(reply.error))


Case = tuple[bytes, Callable[[Reply], bool] | None]

# Bytes that a client may send, and what comes back; None for no reply.
REQUESTS: list[Case] = [
    # Alike to the byte but for their bodies, some of which begin like the end of a head.
    (infer("m", 11), gives(22, 22)),
    (infer("m", 12), gives(24, 24)),
    (infer("m", 1, 2), gives(2, 2, 4, 4)),
    (post(M, b"\r\n" + body(13)), gives(26, 26)),
    (post(M, b"\r\n\r\n" + body(14)), gives(28, 28)),
    (post(M, body(15) + b"\r\n"), gives(30, 30)),
    (post(M, body("1")), status(400)),
    (post(M, b"{" * 94), status(400)),
    (post(M, body(16), "X-Request-Id: \xff"), status(400)),
    (
        post(M, body(17), "X-Request-Id: seventeen"),
        lambda r: r.headers["x-request-id"] == "seventeen",
    ),
    (post(M, b""), status(400)),
    (head("POST", M), status(400)),
    (post("/v2/models/n/infer", body(11)), status(404)),
    (post("http://gateway" + M, body(18)), gives(36, 36)),
    (post(M, body(19), *UPGRADE), gives(38, 38)),
    (chunked(M, [body(20)[:7], body(20)[7:]]), gives(40, 40)),
    (chunked(M, [body(21)], trailers=b"A: b\r\n"), gives(42, 42)),
    (chunked(M, [body(22)], *UPGRADE), gives(44, 44)),
    (get("/v2/health/live"), lambda r: r.json == {"live": True}),
    (get("/v2/health/live", *UPGRADE), status(200)),
    (head("PUT", M, "Content-Length: 2") + b"{}", status(405)),
    (post("/v2/repository/index", json.dumps({"ready": True}).encode()), status(200)),
    (post("/v2/repository/index", b"["), status(400)),
    (b"\r\n", None),
]


ALIKE = [*REQUESTS[:9], REQUESTS[-1], REQUESTS[-1]]
sequences = st.one_of(
    st.lists(st.sampled_from(pool), min_size=1, max_size=8) for pool in (ALIKE, REQUESTS)
)
# Near the end of each request, where one with the same head may begin; None for no cut there.
near_ends = st.lists(st.sampled_from([None, 0, 0, -2, -1, 1, 2]), min_size=8, max_size=8)
anywhere = st.lists(st.floats(0, 1), max_size=6)


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(sequences, near_ends | anywhere)
def test_pieces(served: Gateway, requests: list[Case], cuts: list[Any]) -> None:
    ends = list(itertools.accumulate(len(raw) for raw, _ in requests))
    stream = b"".join(raw for raw, _ in requests)
    if any(isinstance(cut, float) for cut in cuts):
        places = {round(cut * len(stream)) for cut in cuts}
    else:
        pairs = zip(ends, cuts, strict=False)
        places = {end + cut for end, cut in pairs if cut is not None}
    bounds = [0, *sorted(p for p in places if 0 < p < len(stream)), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    with served.connect() as client:
        connection = served.connection(client)
        for piece in pieces:
            # As the loop would deliver it, and as no socket would promise to.
            served.run(lambda p=piece: connection.data_received(p))
        for raw, judge in requests:
            if judge is not None:
                reply = client.reply()
                assert judge(reply), (raw, reply, pieces)
        assert client.ask(infer("m", 99)).values == [198, 198]
