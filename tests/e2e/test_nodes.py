"""A cluster of two Ray nodes: `serving up` deploys on it and returns, `down` removes it.

The gateway on one node serves a replica on the other, over TCP with mutual TLS.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import tls
from serving.core import frames
from tests.e2e.deployment import Deployment, serving
from tests.e2e.load import Load
from tests.e2e.test_faults import MLP, mlp_body, replicas

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]


@pytest.fixture
def ray_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of two nodes; "front" and "back" are custom resources of one each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"front": 10}, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=2, resources={"back": 10})
        yield cluster.address
    finally:
        cluster.shutdown()


def test_on_a_cluster_it_deploys_returns_and_is_removed_and_nodes_talk_by_mutual_tls_only(
    home: Path, ray_address: str
) -> None:
    deployment = Deployment(
        home,
        {"mlp": {"version": "1", "resources": {"back": 1}}},
        gateway={"resources": {"front": 1}},
    )
    deployment.write(deployment.config["models"])
    env = {"RAY_ADDRESS": ray_address}
    up = serving("up", "-f", deployment.file, home=home, env=env)
    try:
        assert up.returncode == 0, up.stderr
        assert "ready: " in up.stdout
        status = serving("status", "-f", deployment.file, home=home)
        assert "ready" in status.stdout, status.stderr
        endpoint = only_endpoint(deployment)
        assert endpoint["tcp"], "the replica listens for other nodes"
        assert {r["node"] for r in replicas(deployment, "mlp")} == {endpoint["node"]}
        assert deployment.status()["gateways"][0]["node"] != endpoint["node"]
        with Load(deployment.port, MLP, [mlp_body(1), mlp_body(64)]) as load:
            load.wait_for(500)
        assert load.failed == {}, load.failures
        assert load.broken == []

        host, _, port = endpoint["tcp"].rpartition(":")
        assert refuses(host, int(port), None), "plain TCP is answered"
        assert refuses(host, int(port), anonymous()), "a client without a certificate is answered"
        assert refuses(host, int(port), stranger(home)), "another CA's certificate is accepted"
        again = serving("up", "-f", deployment.file, home=home, env=env)
        assert again.returncode == 1
        assert "already runs" in again.stderr
    finally:
        down = serving("down", "-f", deployment.file, home=home, env=env)
    assert down.returncode == 0, down.stderr
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", deployment.port), 5)
    assert serving("status", "-f", deployment.file, home=home).returncode == 1
    nothing = serving("down", "-f", deployment.file, home=home, env=env)
    assert nothing.returncode == 1
    assert "nothing of ours" in nothing.stderr


def only_endpoint(deployment: Deployment) -> Any:
    table = deployment.get(deployment.control_port, "/v1/routes")
    [arm] = table["models"][0]["arms"]
    [endpoint] = arm["endpoints"]
    return endpoint


def anonymous() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def stranger(home: Path) -> ssl.SSLContext:
    """The certificate of another cluster."""
    ca = tls.ensure_ca(home / "other-ca")
    key, csr = tls.make_csr()
    context = tls.client_context(key, tls.sign_csr(home / "other-ca", csr), ca)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def refuses(host: str, port: int, context: ssl.SSLContext | None) -> bool:
    """Whether a HELLO is met by silence and a closed connection."""
    hello = frames.encode_json(frames.Kind.HELLO, {"role": "data", "gateway": "x"})
    with socket.create_connection((host, port), 10) as plain:
        plain.settimeout(15)
        try:
            with plain if context is None else context.wrap_socket(plain) as peer:
                peer.sendall(hello)
                return peer.recv(1) == b""
        except (ssl.SSLError, ConnectionError):
            return True
