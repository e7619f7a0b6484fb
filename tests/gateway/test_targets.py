"""Which request target leads where, and what the routes beside inference say."""

from __future__ import annotations

import json

import pytest

from tests.gateway.client import body, get, head, infer, post, tensor
from tests.gateway.harness import Gateway, Replica, arm
from tests.gateway.models import VECTOR


@pytest.mark.parametrize(
    "target",
    [
        "/v2/models/m/infer",
        "/v2/models/m/versions/1/infer",
        "/v2/models/m/infer?a=b&c=/infer?",
        "/v2/models/%6D/infer",
        "/v2/models/m/inf%65r",
        "/v2/%6dodels/m/infer?x=%20",
        "http://gateway/v2/models/m/infer",
        "http://other:8000/v2/models/m/versions/1/infer?x=1",
    ],
)
def test_forms_of_one_target(served: Gateway, target: str) -> None:
    with served.connect() as client:
        assert client.ask(post(target, body(3))).values == [6, 6]


@pytest.mark.parametrize(
    "target",
    [
        "/v2/models/other/infer",
        "/v2/models/m/versions/2/infer",
        "/v2/models/m/versions/v1/infer",
        "/v2/models/m/versions//infer",
        "/v2/models//infer",
        "/v2/models/a%2Fb/infer",
        "/v2/models/%FF%00/infer",
    ],
)
def test_an_unknown_model_or_version(served: Gateway, target: str) -> None:
    with served.connect() as client:
        reply = client.ask(post(target, body(3)))
        assert reply.status == 404
        assert reply.error
        assert client.ask(infer("m", 1)).status == 200


def test_the_message_for_an_unknown_model_is_the_protocols(served: Gateway) -> None:
    with served.connect() as client:
        for request in (infer("other", 1), get("/v2/models/other"), get("/v2/models/other/ready")):
            assert "Request for unknown model" in client.ask(request).error
        message = client.ask(post("/v2/models/m/versions/7/infer", body(1))).error
        assert "version '7'" in message
        assert "served versions: 1" in message


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/v2/nothing",
        "/v2/models",
        "/v2/models/m/infer/",
        "/v2/models/infer",
        "/v2/models/m/what/infer",
        "/v2/models/m/versions/1/x/infer",
        "/v2/health/live/",
        "/V2/models/m/infer",
        "//v2/models/m/infer",
        "/v2/models/m/../m/infer",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path(served: Gateway, target: str, method: str) -> None:
    with served.connect() as client:
        reply = client.ask(head(method, target, "Content-Length: 2") + b"{}")
        assert reply.status == 404
        assert reply.error
        assert client.ask(infer("m", 1)).status == 200


@pytest.mark.parametrize("target", ["/v2/models/m/infer", "/v2/models/m/versions/1/infer"])
def test_other_methods_on_infer(served: Gateway, target: str) -> None:
    with served.connect() as client:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            reply = client.ask(head(method, target, "Content-Length: 2") + b"{}")
            assert reply.status == 405
            assert reply.headers["allow"] == "POST"
            assert reply.error
        client.send(head("HEAD", target))
        assert client._until(b"\r\n\r\n").startswith(b"HTTP/1.1 405 ")
        assert client.ask(infer("m", 1)).status == 200


def test_head_of_a_get_route_has_no_body(served: Gateway) -> None:
    with served.connect() as client:
        client.send(head("HEAD", "/v2/health/live"))
        assert client._until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert client.ask(infer("m", 1)).status == 200


@pytest.mark.parametrize("method", ["OPTIONS", "CONNECT"])
def test_targets_that_are_no_path(served: Gateway, method: str) -> None:
    target = {"OPTIONS": "*", "CONNECT": "gateway:80"}[method]
    with served.connect() as client:
        reply = client.ask(head(method, target))
        assert 400 <= reply.status < 500
        assert reply.error


def test_health_and_metadata(served: Gateway) -> None:
    with served.connect() as client:
        assert client.ask(get("/v2/health/live")).json == {"live": True}
        assert client.ask(get("/v2/health/ready")).json == {"ready": True}
        assert client.ask(get("/v2/models/m/ready")).json == {"name": "m", "ready": True}
        server = client.ask(get("/v2")).json
        assert server["name"] == "serving-gateway"
        assert "binary_tensor_data" in server["extensions"]
        model = client.ask(get("/v2/models/simple/versions/1")).json
        assert model["versions"] == ["1"]
        assert [t["name"] for t in model["inputs"]] == ["INPUT0", "INPUT1"]
        assert model["inputs"][0]["shape"] == [-1, 16]
        config = client.ask(get("/v2/models/simple/config")).json
        assert config["max_batch_size"] == 64
        assert config["input"][0]["dims"] == [16]


def test_every_advertised_extension_has_its_routes(served: Gateway) -> None:
    """What GET /v2 lists is what clients then call."""
    probes = {
        "binary_tensor_data": None,
        "classification": None,
        "parameters": None,
        "schedule_policy": None,
        "model_configuration": get("/v2/models/m/config"),
        "model_repository": post("/v2/repository/index", b""),
    }
    with served.connect() as client:
        for extension in client.ask(get("/v2")).json["extensions"]:
            if probe := probes[extension]:
                assert client.ask(probe).status == 200


@pytest.mark.parametrize(
    ("method", "target", "extension"),
    [
        ("GET", "/v2/models/m/stats", "statistics"),
        ("GET", "/v2/models/m/versions/1/stats", "statistics"),
        ("POST", "/v2/repository/models/m/load", "model_repository"),
        ("POST", "/v2/repository/models/m/unload", "model_repository"),
        ("GET", "/v2/systemsharedmemory/status", "system_shared_memory"),
        ("POST", "/v2/cudasharedmemory/region/r/register", "cuda_shared_memory"),
        ("POST", "/v2/models/m/trace/setting", "trace"),
        ("GET", "/v2/logging", "logging"),
    ],
)
def test_an_extension_that_is_not_served_says_so(
    served: Gateway, method: str, target: str, extension: str
) -> None:
    with served.connect() as client:
        reply = client.ask(head(method, target, "Content-Length: 0"))
        assert reply.status == 501
        assert f"does not have the extension {extension!r}" in reply.error
        assert extension not in client.ask(get("/v2")).json["extensions"]


def test_the_repository_index(served: Gateway) -> None:
    with served.connect() as client:
        index = client.ask(post("/v2/repository/index", b"")).json
        assert {"name": "m", "version": "1", "state": "READY", "reason": ""} in index
        assert client.ask(post("/v2/repository/index", b'{"ready":true}')).json == index
        for bad in (b"[]", b"{", b'{"ready":1}', b'"x"', b"\xff"):
            reply = client.ask(post("/v2/repository/index", bad))
            assert reply.status == 400
            assert reply.error


def test_a_model_without_a_replica_is_not_ready(gateway: Gateway, replica: Replica) -> None:
    with gateway.connect() as client:
        reply = client.ask(get("/v2/health/ready"))
        assert (reply.status, reply.json) == (503, {"ready": False})
        gateway.publish(arm("m", [], of=VECTOR), arm("n", [replica]))
        assert client.ask(get("/v2/health/ready")).status == 503
        reply = client.ask(get("/v2/models/m/ready"))
        assert (reply.status, reply.json) == (400, {"name": "m", "ready": False})
        assert client.ask(get("/v2/models/n/ready")).status == 200
        (entry,) = (
            e for e in client.ask(post("/v2/repository/index", b"")).json if e["name"] == "m"
        )
        assert entry["state"] == "UNAVAILABLE"
        assert "replica" in entry["reason"]
        (only,) = client.ask(post("/v2/repository/index", b'{"ready":true}')).json
        assert only["name"] == "n"


def test_it_is_not_ready_while_models_are_still_to_come(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica]), complete=False)
    with gateway.connect() as client:
        assert client.ask(get("/v2/models/m/ready")).status == 200
        assert client.ask(get("/v2/health/ready")).status == 503
        gateway.publish(arm("m", [replica]))
        assert client.ask(get("/v2/health/ready")).status == 200


def test_a_default_version_that_is_not_served_yet(gateway: Gateway, replica: Replica) -> None:
    gateway.publish(arm("m", [replica], version="1"), default={"m": "2"})
    with gateway.connect() as client:
        assert client.ask(get("/v2/health/ready")).status == 503
        reply = client.ask(infer("m", 1))
        assert reply.status == 404
        assert "version '2'" in reply.error
        assert client.ask(post("/v2/models/m/versions/1/infer", body(1))).status == 200


@pytest.mark.parametrize("name", ["strings", "simple", "wide", "whole", "frozen"])
def test_real_models_give_their_numbers(served: Gateway, name: str) -> None:
    row = list(range(16))
    inputs, expected = {
        "strings": ([tensor("x", [["a", "é"], ["", "z"]], "BYTES")], ["a", "é", "", "z"]),
        "simple": (
            [tensor("INPUT0", [row], "INT32"), tensor("INPUT1", [row[::-1]], "INT32")],
            [15] * 16,
        ),
        "wide": ([tensor("x", [[1.5, -2.0, 3.0]])], [-1.5, 2.0, -3.0]),
        "whole": ([tensor("x", [1, 2, 3], "INT64", [3])], [-1, -2, -3]),
        "frozen": ([tensor("x", [[1, 2], [3, 4], [5, 6]])], [-1, -2, -3, -4, -5, -6]),
    }[name]
    with served.connect() as client:
        request = json.dumps({"id": "i", "inputs": inputs}).encode()
        reply = client.ask(post(f"/v2/models/{name}/infer", request))
        assert reply.values == expected
        assert reply.json["id"] == "i"
