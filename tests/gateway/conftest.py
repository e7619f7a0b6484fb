from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.gateway.harness import Gateway, NewReplica, Replica, ReplicaProcess, arm
from tests.gateway.models import VECTOR, ScriptedBackend, build
from tests.gateway.rollouts import Rollout


@pytest.fixture(scope="session")
def sockets() -> Iterator[Path]:
    """A short path: a unix socket's has at most 107 characters, and tmp_path may have more."""
    with tempfile.TemporaryDirectory(prefix="gw-") as directory:
        yield Path(directory)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def served(sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for a whole module: mlp, strings, simple, wide, whole, frozen and scripted m."""
    graphs = ("mlp", "strings", "simple", "wide", "whole", "frozen")
    with ExitStack() as stack:
        gateway = stack.enter_context(Gateway(max_body_bytes=4 << 20, max_header_bytes=8 << 10))
        replicas = {}
        for name in graphs:
            backend = build(name, tmp_path_factory.mktemp(name))
            replicas[name] = Replica(backend, sockets, name)
        replicas["m"] = Replica(ScriptedBackend(), sockets, "m")
        for replica in replicas.values():
            stack.callback(replica.stop)
        gateway.publish(*(arm(name, [replica]) for name, replica in replicas.items()))
        yield gateway


@pytest.fixture(scope="session")
def stopping() -> Iterator[list[Gateway]]:
    """The gateway that a test has told to stop; the next test does not wait for that."""
    gateways: list[Gateway] = []
    yield gateways
    for gateway in gateways:
        gateway.wait_stopped()


@pytest.fixture
def gateway(stopping: list[Gateway]) -> Iterator[Gateway]:
    """A gateway of one's own."""
    gateway = Gateway().start()
    yield gateway
    gateway.begin_stop()
    stopping.append(gateway)
    if len(stopping) > 1:
        stopping.pop(0).wait_stopped()


@pytest.fixture
def replica(run_dir: Path) -> Iterator[Replica]:
    """A replica whose model is under control."""
    replica = Replica(ScriptedBackend(), run_dir)
    yield replica
    replica.backend.gate.set()
    replica.stop()


@pytest.fixture
def new(run_dir: Path) -> Iterator[NewReplica]:
    """Starts replicas whose models are under control."""
    with ExitStack() as stack:

        def start(name: str) -> Replica:
            replica = Replica(ScriptedBackend(), run_dir, name)
            stack.callback(replica.stop)
            stack.callback(replica.backend.gate.set)
            return replica

        yield start


@pytest.fixture
def rollout(gateway: Gateway, run_dir: Path) -> Iterator[Rollout]:
    """Version 1 of m and a canary, version 2, whose models are under control."""
    replicas = [Replica(ScriptedBackend(), run_dir, name) for name in ("stable-1", "canary-1")]
    yield Rollout(gateway, *replicas)
    for replica in replicas:
        replica.backend.gate.set()
        replica.stop()


@pytest.fixture
def processes(run_dir: Path) -> Iterator[Callable[[str], ReplicaProcess]]:
    """Starts replicas as processes."""
    with ExitStack() as stack:

        def start(name: str) -> ReplicaProcess:
            process = ReplicaProcess(VECTOR, run_dir, name)
            stack.callback(process.stop)
            return process

        yield start
