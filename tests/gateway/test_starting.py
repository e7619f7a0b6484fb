"""A gateway that begins: what it answers before it knows all models."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from serving.core.routing import ModelRoute, RouteTable
from tests.gateway.client import get, infer
from tests.gateway.harness import Gateway, Replica, StubController, arm


class Watching(StubController):
    """Tries the gateway's port when it is first asked for routes."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self.answered: list[bool] = []
        self._gateway = gateway

    async def call(self, method: str, *args: Any, timeout_s: float = 5.0) -> Any:
        if method == "poll_routes" and not self.answered:
            with socket.socket() as probe:
                refused = probe.connect_ex(("127.0.0.1", self._gateway.port))
            self.answered.append(not refused)
        return await super().call(method, *args, timeout_s=timeout_s)


def test_a_gateway_that_replaces_another_knows_its_models_before_its_first_client(
    replica: Replica,
) -> None:
    gateway = Gateway()
    gateway.controller = Watching(gateway)
    gateway.controller.table = RouteTable(
        7, {"m": ModelRoute("m", "1", {"1": arm("m", [replica])})}
    )
    with gateway:
        assert gateway.controller.answered == [False]
        with gateway.connect() as client:
            assert client.ask(infer("m", 1)).values == [2, 2]


def test_without_a_controller_it_listens_and_says_that_it_knows_nothing_yet(
    replica: Replica,
) -> None:
    gateway = Gateway()
    gateway.controller.away = True
    with gateway, gateway.connect() as client:
        reply = client.ask(infer("m", 1))
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert client.ask(get("/v2/health/live")).status == 200
        gateway.run(lambda: setattr(gateway.controller, "away", False))
        gateway.publish(arm("m", [replica]))
        assert client.ask(infer("m", 1)).status == 200
        assert client.ask(infer("n", 1)).status == 404


@pytest.mark.parametrize("target", ["/v2/models/n", "/v2/models/m/versions/2/config"])
def test_what_is_still_to_come_is_unavailable_not_unknown(
    gateway: Gateway, replica: Replica, target: str
) -> None:
    """A client tries a 503 again; a 404 is final."""
    gateway.publish(arm("m", [replica]), complete=False)
    with gateway.connect() as client:
        assert client.ask(infer("m", 1)).status == 200
        for request in (infer("n", 1), get(target)):
            reply = client.ask(request)
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert "still starting" in reply.error
        reply = client.ask(get("/v2/models/n/ready"))
        assert (reply.status, reply.json) == (400, {"name": "n", "ready": False})
        gateway.publish(arm("m", [replica]))
        for request in (infer("n", 1), get(target), get("/v2/models/n/ready")):
            reply = client.ask(request)
            assert reply.status == 404
            assert "Request for unknown model" in reply.error
