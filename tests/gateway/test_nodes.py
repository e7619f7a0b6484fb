"""A replica on another node: TCP with mutual TLS."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from serving import tls
from serving.replica.backends.base import Backend
from serving.replica.server import TlsListener
from tests.gateway.client import body, infer, post
from tests.gateway.harness import Gateway, Replica, arm, eventually
from tests.gateway.models import ScriptedBackend, build

Remote = Callable[[Backend, Path], Replica]


@pytest.fixture
def remote(run_dir: Path) -> Iterator[Remote]:
    """Starts a replica on another node whose certificate is signed by the CA in a directory."""
    with ExitStack() as stack:

        def start(backend: Backend, authority: Path) -> Replica:
            ca = tls.ensure_ca(authority)
            key, csr = tls.make_csr()
            context = tls.server_context(key, tls.sign_csr(authority, csr), ca)
            listener = TlsListener("127.0.0.1", context)
            replica = Replica(backend, run_dir, "remote", listener=listener)
            stack.callback(replica.stop)
            return replica

        yield start


def test_requests_small_and_large(gateway: Gateway, remote: Remote, tmp_path: Path) -> None:
    replica = remote(build("wide", tmp_path), tmp_path / "ca")
    gateway.controller.certificates = tmp_path / "ca"
    gateway.publish(arm("wide", [replica]))
    with gateway.connect() as client:
        for length in (1, 10, 300_000, 5):
            row = np.arange(length, dtype=np.float64).tolist()
            data = body(row, parameters={"binary_data_output": True})
            reply = client.ask(post("/v2/models/wide/infer", data))
            at = int(reply.headers["inference-header-content-length"])
            found = np.frombuffer(reply.body[at:], np.float32)
            np.testing.assert_array_equal(found, -np.array(row, np.float32))


def test_a_replica_of_another_cluster_is_not_trusted(
    gateway: Gateway, remote: Remote, replica: Replica, tmp_path: Path
) -> None:
    backend = ScriptedBackend()
    stranger = remote(backend, tmp_path / "other ca")
    gateway.controller.certificates = tmp_path / "ca"
    gateway.publish(arm("m", [stranger, replica]), ready=False)
    batcher = gateway.batcher("m")
    gateway.until(lambda: batcher.ready)
    (link,) = gateway.run(
        lambda: [x for x in batcher.links.values() if x.endpoint == stranger.endpoint]
    )
    gateway.until(lambda: link._failures >= 3)
    with gateway.connect() as client:
        for i in range(5):
            assert client.ask(infer("m", i)).status == 200
    assert backend.seen == []


def test_a_table_waits_for_the_certificate(
    gateway: Gateway, remote: Remote, tmp_path: Path
) -> None:
    """Without one the last table stays in force, and the next attempt applies the new one."""
    replica = remote(ScriptedBackend(), tmp_path / "ca")
    # It returns when the table is in force.
    thread = threading.Thread(target=gateway.publish, args=(arm("m", [replica]),))
    thread.start()
    eventually(lambda: gateway.controller.table.revision == 1)
    assert gateway.server.routes.table.revision == 0
    gateway.controller.certificates = tmp_path / "ca"
    thread.join()
    with gateway.connect() as client:
        assert client.ask(infer("m", 1)).values == [2, 2]
