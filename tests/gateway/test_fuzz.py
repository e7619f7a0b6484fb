"""Ten thousand malformed requests: each is refused with a message, and none harms another.

Hypothesis draws what is wrong; every example puts it in every place of a few valid requests. A
mutation may leave a request valid: then its answer must be right, and it does not count.
"""

from __future__ import annotations

import copy
import gzip
import json
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.client import Client, Reply, head, post, tensor
from tests.gateway.harness import Gateway

ROW = list(range(16))
VALID: dict[str, dict[str, Any]] = {
    "m": {"id": "a", "inputs": [tensor("x", [[1.5, 2.5], [3.5, 4.5]])]},
    "wide": {"inputs": [tensor("x", [[1.0, 2.0, 3.0]])], "outputs": [{"name": "y"}]},
    "whole": {"inputs": [tensor("x", [1, 2, 3], "INT64", [3])], "parameters": {"a": "b"}},
    "strings": {"inputs": [tensor("x", [["a", "é"]], "BYTES")]},
    "simple": {
        "inputs": [tensor("INPUT0", [ROW], "INT32"), tensor("INPUT1", [ROW], "INT32")],
        "outputs": [{"name": "OUTPUT1", "parameters": {"binary_data": False}}],
    },
}
BODIES = {model: json.dumps(request).encode() for model, request in VALID.items()}


def values(tensors: list[dict[str, Any]]) -> list[np.ndarray]:
    kinds = {"BYTES": object, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
    return [np.array(t["data"], kinds[t["datatype"]]).reshape(-1) for t in tensors]


ORACLES: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "m": lambda x: {"y": x * 2},
    "wide": lambda x: {"y": -x},
    "whole": lambda x: {"y": -x},
    "strings": lambda x: {"y": x},
    "simple": lambda a, b: {"OUTPUT0": a + b, "OUTPUT1": a - b},
}


class Attacker:
    """Sends requests on one connection for as long as it lasts, and judges the replies."""

    def __init__(self, gateway: Gateway) -> None:
        self.refused = 0
        self.valid = 0
        self._gateway = gateway
        self._stack = ExitStack()
        self._client: Client | None = None

    def close(self) -> None:
        self._stack.close()
        self._client = None

    def send(self, raw: bytes) -> Reply:
        """One request and its reply. A reply that says so is the last of its connection."""
        if self._client is None:
            self._client = self._stack.enter_context(self._gateway.connect())
        reply = self._client.ask(raw)
        if reply.headers.get("connection") == "close":
            assert self._client.closed()
            self.close()
        return reply

    def attack(self, raw: bytes, model: str = "", body: bytes = b"") -> None:
        """A request that should be refused; `model` and `body` tell what is right if it is not."""
        try:
            reply = self.send(raw)
        except (EOFError, OSError) as error:
            raise AssertionError(f"no reply to {raw!r}") from error
        if 400 <= reply.status < 500:
            assert reply.error, raw
            self.refused += 1
        else:
            assert model, (raw, reply)
            self.check(model, body, reply, raw)
        if (self.refused + self.valid) % 20 == 0:
            self.probe()

    def probe(self) -> None:
        """A valid request among the others."""
        model = list(BODIES)[self.valid % len(BODIES)]
        reply = self.send(post(f"/v2/models/{model}/infer", BODIES[model]))
        self.check(model, BODIES[model], reply, b"a valid request")

    def check(self, model: str, body: bytes, reply: Reply, raw: bytes) -> None:
        assert reply.status == 200, (raw, reply)
        inputs = {t["name"]: t for t in json.loads(body)["inputs"]}
        ordered = [inputs[t["name"]] for t in VALID[model]["inputs"]]
        expected = ORACLES[model](*values(ordered))
        at = int(reply.headers.get("inference-header-content-length", len(reply.body)))
        outputs = json.loads(reply.body[:at])["outputs"]
        assert outputs, (raw, reply)
        for output in outputs:
            if "data" not in output:
                # Only outputs of INT32 are asked for with a switch that may become true.
                output["data"] = np.frombuffer(reply.body[at:], np.int32)
            (found,) = values([output])
            np.testing.assert_array_equal(found, expected[output["name"]], str(raw))
        self.valid += 1


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value, the first two of each long list."""
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, child in items:
        yield from places(child, (*path, key))


def replaced(request: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    request = copy.deepcopy(request)
    parent = request
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return request


def removed(request: Any, path: tuple[Any, ...]) -> Any:
    request = copy.deepcopy(request)
    parent = request
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return request


PLACES = [(model, path) for model, request in VALID.items() for path in places(request)]

# Names that start so ask for features that this server says it does not have, with 501.
reserved = ("sequence_", "shared_memory_", "triton_")
names = st.text(max_size=6).filter(lambda s: not s.startswith(reserved))
NUMBERS = (-1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(2**63) - 1, 1e300, -0.0, 0.1, True)
OBJECTS = (
    {},
    {"binary_data": 1},
    {"binary_data_size": 8},
    {"classification": -1},
    {"priority": 10},
    {"timeout": -1},
)
LISTS = ([], [[]], [0], [-1, 2], [1, 2, 3, 4], [[[1]]])
hard = st.sampled_from([*NUMBERS, *OBJECTS, *LISTS, "", "1", "x", "FP32", "FP16", "BF16"])
junk = hard | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2),
    max_leaves=5,
)


def json_is_wrong(attacker: Attacker, value: Any) -> None:
    """A value of another kind in every place of every request, one request each."""
    for model, path in PLACES:
        request = replaced(VALID[model], path, value)
        body = json.dumps(request).encode()
        attacker.attack(post(f"/v2/models/{model}/infer", body), model, body)


def members_are_wrong(attacker: Attacker, name: str, value: Any) -> None:
    """A member too many or one too few."""
    for model, path in PLACES:
        requests = []
        if path:
            requests.append(removed(VALID[model], path))
        if isinstance(path[-1] if path else None, int) and isinstance(value, str):
            requests.append(replaced(VALID[model], (*path[:-1],), value))
        if not path or path in ((("inputs"), 0), ("outputs", 0)):
            requests.append(replaced(VALID[model], (*path, "~" + name), value))
        for request in requests:
            body = json.dumps(request).encode()
            attacker.attack(post(f"/v2/models/{model}/infer", body), model, body)


def bytes_are_wrong(attacker: Attacker, noise: bytes, where: float) -> None:
    """Bodies cut, overwritten and with bytes put in."""
    for model, body in BODIES.items():
        at = int(where * len(body))
        target = f"/v2/models/{model}/infer"
        for mutant in (
            body[:at],
            body[:at] + noise + body[at:],
            body[:at] + noise + body[at + len(noise) :],
            noise + body,
            body + noise,
            b"[" * (at * 50) + body,
        ):
            attacker.attack(post(target, mutant), model, mutant)


def framing_is_wrong(attacker: Attacker, by: int, noise: bytes) -> None:
    """Binary tensors whose sizes do not agree."""
    x = np.arange(6, dtype=np.float32)

    def binary(size: Any, length: Any = None, data: bytes = x.tobytes(), **members: Any) -> bytes:
        meta = {"name": "x", "shape": [2, 3], "datatype": "FP32", **members}
        meta["parameters"] = {"binary_data_size": size}
        text = json.dumps({"inputs": [meta]}).encode()
        framing = len(text) if length is None else length(len(text))
        header = f"Inference-Header-Content-Length: {framing}"
        return post("/v2/models/wide/infer", text + data, header)

    raw = x.tobytes()
    shown = noise.decode("latin-1").translate(dict.fromkeys(range(33), "-"))
    for request in (
        binary(24 + by),
        binary(24, data=raw + bytes(by)),
        binary(24, data=raw[:-by]),
        binary(24 + 4 * by, data=raw + bytes(4 * by)),
        binary(24, lambda n: n + by),
        binary(24, lambda n: n - by),
        binary(24, lambda n: -n),
        binary(24, lambda n: 10**by * 10**9),
        binary(24, lambda n: f"{n}.0"),
        binary(24, lambda n: shown + "-"),
        binary(-24),
        binary("24"),
        binary(24.0),
        binary(None),
        binary(24, data_=0),
        binary(24, data=raw, shape=[2, 3 + by]),
        binary(24, data=raw, datatype="FP64"),
        post("/v2/models/m/infer", bytes(8 + by % 8 + 1), "Inference-Header-Content-Length: 0"),
        post("/v2/models/simple/infer", bytes(64), "Inference-Header-Content-Length: 0"),
    ):
        attacker.attack(request)
    elements = b"\x01\x00\x00\x00a" + (by + 1).to_bytes(4, "little") + b"b"
    for data in (elements, elements[:-1], b"\xff" * 10, noise + b"\xff" * 4):
        meta = {"name": "x", "shape": [1, 2], "datatype": "BYTES"}
        meta["parameters"] = {"binary_data_size": len(data)}
        text = json.dumps({"inputs": [meta]}).encode()
        header = f"Inference-Header-Content-Length: {len(text)}"
        attacker.attack(post("/v2/models/strings/infer", text + data, header))


def headers_are_wrong(attacker: Attacker, noise: bytes, name: str) -> None:
    """Header values, targets and methods that mean nothing here."""
    body = BODIES["m"]
    target = "/v2/models/m/infer"
    shown = noise.decode("latin-1").translate(dict.fromkeys([*range(32), 127], "-"))
    quoted = urllib.parse.quote(name + "~", safe="")
    for request in (
        post(target, body, f"X-Request-Timeout-Ms: -{shown}"),
        post(target, body, f"X-Request-Id: é{shown}"),
        post(target, body, f"X-Request-Id: {'a' * 129}"),
        post(target, body, f"Content-Encoding: x{shown}"),
        post(target, gzip.compress(body)[: len(body) // 2] + noise, "Content-Encoding: gzip"),
        post(target, noise + b"\xff" + body, "Content-Encoding: deflate"),
        post(target, body, f"Inference-Header-Content-Length: ~{shown}"),
        post(f"/v2/models/{quoted}/infer", body),
        post(f"/v2/models/m/versions/{quoted}/infer", body),
        post(f"/v2/models/m/{quoted}", body),
        post(f"/{quoted}", body),
        post(f"/v2/repository/index?{quoted}", b"~" + noise),
        head("GET", f"/v2/models/{quoted}"),
        head("GET", f"/v2/models/m/versions/{quoted}/config"),
        head("PUT", f"{target}?{quoted}"),
        head("DELETE", "/v2/health/live"),
    ):
        attacker.attack(request)


def http_is_wrong(attacker: Attacker, noise: bytes, where: float) -> None:
    """Bytes in the head that are no HTTP. A proxy would not let them through either."""
    odd = noise.replace(b"\r", b"").replace(b"\n", b"") + b"\x00"
    lines = [b"POST /v2/models/m/infer HTTP/1.1", b"Host: gateway", b"X: y"]
    which = int(where * len(lines))
    line = lines[which]
    at = int(where * len(line))
    for mutant in (line[:at] + odd + line[at:], odd + line, line + odd):
        attacker.attack(b"\r\n".join([*lines[:which], mutant, *lines[which + 1 :], b"", b""]))
    for name in (b"Content-Length", b"Transfer-Encoding"):
        attacker.attack(b"\r\n".join([*lines, name + b": ~" + odd[:-1], b"", b""]))


small_noise = st.binary(min_size=1, max_size=8)
fractions = st.floats(0, 1, exclude_max=True)
# What is wrong, and how many draws of it.
ATTACKS: list[tuple[int, Callable[..., None], tuple[st.SearchStrategy[Any], ...]]] = [
    (80, json_is_wrong, (junk,)),
    (12, members_are_wrong, (names, junk)),
    (80, bytes_are_wrong, (small_noise, fractions)),
    (80, framing_is_wrong, (st.integers(1, 20), small_noise)),
    (80, headers_are_wrong, (small_noise, names)),
    (80, http_is_wrong, (small_noise, fractions)),
]


def fuzz(examples: int, strategy: st.SearchStrategy[Any], attack: Callable[..., None]) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(arguments: tuple[Any, ...]) -> None:
        attack(*arguments)

    run()


def test_ten_thousand_malformed_requests(served: Gateway) -> None:
    attacker = Attacker(served)
    for examples, attack, drawn in ATTACKS:
        fuzz(examples, st.tuples(st.just(attacker), *drawn), attack)
    attacker.close()
    assert attacker.refused >= 10_000
    assert attacker.valid >= attacker.refused / 20
    assert served.run(lambda: served.server.front.connections) == set()
    for model in VALID:
        assert set(served.outcomes(model)) <= {"success", "invalid_request", "unsupported_encoding"}
