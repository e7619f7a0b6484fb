"""ModelReplica on a real Ray Serve, with a controller that only writes down what it hears."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import compose, tls
from serving.artifacts import build_manifest, place_copy
from serving.control_link import CONTROLLER_APP
from serving.core.ledger_leases import ReplicaUsage
from serving.core.replica import GpuLease, ReplicaSpec
from serving.errors import DeviceError, Unavailable
from serving.replica.backends import cuda

from . import models
from .client import Client
from .conftest import wait_until
from .test_golden import Bundle, X

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]
OPTIONS: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0},
    "health_check_period_s": 1,
    "graceful_shutdown_wait_loop_s": 0.1,
    "max_ongoing_requests": 100,
}


class Recorder:
    """The control calls that a replica makes."""

    def __init__(self, log: str, bundle: str, ca: str) -> None:
        self.log, self.bundle, self.ca = log, Path(bundle), Path(ca)
        self.asked: set[str] = set()
        self._write({"controller": os.getpid()})

    def _write(self, entry: dict[str, Any]) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    async def announce(self, info: dict[str, Any]) -> None:
        self._write(info)

    async def lease_gpu(self, app: str, replica: str, node: str, pid: int) -> dict[str, Any]:
        asked = replica in self.asked
        self.asked.add(replica)
        self._write({"leased": replica, "app": app, "node": node, "pid": pid})
        if app == "model-full":
            return {"error": "needs 9 GiB, 2 GiB are free", "slug": DeviceError.slug}
        if not asked:
            return {"error": "the GPUs are not known yet", "slug": Unavailable.slug}
        if app == "model-auto":
            return {"lease": None}
        return {"lease": GpuLease("l", "GPU-7", 2 << 30, 80 << 30).to_dict()}

    async def release_gpu(self, replica: str) -> None:
        self._write({"released": replica})

    async def manifest(self, digest: str) -> dict[str, Any]:
        return build_manifest(self.bundle).to_dict()

    async def read_artifact(self, digest: str, path: str, offset: int, size: int) -> bytes:
        return (self.bundle / path).read_bytes()[offset : offset + size]

    async def issue_certificate(self, csr_pem: str) -> dict[str, str]:
        ca = tls.ensure_ca(self.ca)
        return {"cert": tls.sign_csr(self.ca, csr_pem.encode()).decode(), "ca": ca.decode()}


def breakable_replica() -> type:
    """A replica on a GPU of which the inputs -1 and -2 break something."""
    from serving.replica.backends.faults import FatalDeviceError
    from serving.replica.deployment import ModelReplica

    class Breakable(ModelReplica.func_or_class):
        async def _load(self) -> None:
            await super()._load()
            backend = self._loaded.engine.backend
            run, check, fallen_back = backend.run, backend.check, []

            def breakable_run(inputs: list[np.ndarray]) -> list[np.ndarray]:
                if (inputs[0] == -1).any():
                    raise FatalDeviceError("an illegal memory access was encountered")
                fallen_back.extend((inputs[0] == -2).any(1))
                return run(inputs)

            def breakable_check() -> None:
                check()
                if any(fallen_back):
                    raise DeviceError("the model runs on the CPU")

            backend.run, backend.check = breakable_run, breakable_check

    return Breakable


class Cluster:
    """A local Serve with a `Recorder`, and what it wrote down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.bundle = Bundle(directory / "bundle", directory / "home")

    def start(self) -> None:
        import ray
        from ray import serve

        ray.init(
            num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False
        )
        serve.start(proxy_location="Disabled")
        bound = serve.deployment(Recorder).options(**OPTIONS)
        arguments = (str(self.log), str(self.bundle.directory), str(self.directory / "ca"))
        serve.run(bound.bind(*arguments), name=CONTROLLER_APP, route_prefix=None)

    def deploy(self, name: str, spec: ReplicaSpec, *, breakable: bool = False) -> None:
        from ray import serve

        from serving.replica.deployment import ModelReplica

        replica = serve.deployment(breakable_replica()) if breakable else ModelReplica
        app = replica.options(**OPTIONS).bind(spec.to_dict())
        serve.run_many(
            [serve.RunTarget(app, name=name, route_prefix=None)],
            wait_for_applications_running=False,
        )

    def spec(self, name: str, **settings: Any) -> ReplicaSpec:
        return ReplicaSpec(
            model=name,
            version="1",
            digest=self.bundle.digest,
            home=str(self.directory / "home"),
            run_dir=str(self.directory / "run"),
            app=f"model-{name}",
            **{"device": "cpu", **settings},
        )

    def entries(self) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        # The last line may be on its way.
        whole = self.log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def heard(self, state: str, of: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first announcement with `state` that satisfies `of`; waits for it."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [e for e in self.entries() if e.get("state") == state and of(e)]
            return bool(found)

        wait_until(look, f"a replica announces {state}", 90)
        return found[0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    environment = dict(os.environ)
    compose.prepare_environment()
    import ray
    from ray import serve
    from ray._private import ray_constants

    # Read from the environment when ray is imported, and another test may have done that: without
    # it the node takes the machine's own address, and Serve listens on loopback only.
    patch = pytest.MonkeyPatch()
    patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)

    # Unix sockets lie in it: pytest's own directories have too long names.
    directory = Path(tempfile.mkdtemp(prefix="sg-"))
    started = Cluster(directory)
    started.start()
    yield started
    serve.shutdown()
    ray.shutdown()
    patch.undo()
    os.environ.clear()
    os.environ.update(environment)
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            path.chmod(0o700)
    shutil.rmtree(directory)


def serves(path: str) -> None:
    with Client.unix(path) as client:
        np.testing.assert_allclose(client.infer(X)[0], X @ models.LINEAR_W)


def test_a_replica_fetches_its_artifact_announces_itself_and_serves(cluster: Cluster) -> None:
    cluster.deploy("model-a", cluster.spec("a"))
    info = cluster.heard("ready", lambda e: e["model"] == "a")
    assert info["digest"] == cluster.bundle.digest
    assert (info["app"], info["device"], info["platform"]) == ("model-a", "cpu", "onnxruntime_onnx")
    assert info["error"] is None
    assert info["tcp"] is None
    assert info["rss_bytes"] > 1 << 20
    assert info["load_s"] > 0
    assert {k: info[k] for k in ("gpu", "lease_bytes", "profile", "ceiling", "fatal")} == {
        "gpu": None,
        "lease_bytes": None,
        "profile": None,
        "ceiling": None,
        "fatal": None,
    }
    assert info["oom_batches"] == 0
    usage = info["usage"]
    assert ReplicaUsage.from_dict(usage) == ReplicaUsage(
        up_ns=usage["up_ns"], warmup_ns=int(info["load_s"] * 1e9)
    )
    assert usage["up_ns"] >= usage["warmup_ns"] > 0
    serves(info["unix"])
    with Client.unix(info["unix"]) as client:
        assert client.hello == {k: info[k] for k in ("model", "version", "digest", "replica")}


def test_it_serves_on_and_announces_again_when_the_controller_was_killed(
    cluster: Cluster,
) -> None:
    info = cluster.heard("ready", lambda e: e["model"] == "a")
    before = [e["controller"] for e in cluster.entries() if "controller" in e]
    os.kill(before[-1], signal.SIGKILL)
    for _ in range(50):
        serves(info["unix"])

    def announced_to_the_successor() -> bool:
        entries = cluster.entries()
        starts = [i for i, e in enumerate(entries) if "controller" in e]
        later = entries[starts[-1] :]
        return len(starts) > len(before) and any(e.get("pid") == info["pid"] for e in later)

    wait_until(announced_to_the_successor, "the new controller hears of the old replica", 90)


def test_a_replica_that_was_killed_is_replaced(cluster: Cluster) -> None:
    info = cluster.heard("ready", lambda e: e["model"] == "a")
    with Client.unix(info["unix"]) as client:
        os.kill(info["pid"], signal.SIGKILL)
        with suppress(ConnectionResetError):
            assert client.sock.recv(1) == b""
    successor = cluster.heard("ready", lambda e: e["model"] == "a" and e["pid"] != info["pid"])
    assert successor["replica"] != info["replica"]
    serves(successor["unix"])


def test_a_replica_on_another_node_is_reached_by_mutual_tls_only(cluster: Cluster) -> None:
    cluster.deploy("model-t", cluster.spec("t", listen_tcp=True, node_host="127.0.0.1"))
    info = cluster.heard("ready", lambda e: e["model"] == "t")
    host, port = info["tcp"].rsplit(":", 1)
    key, csr = tls.make_csr("gateway")
    directory = cluster.directory / "ca"
    context = tls.client_context(key, tls.sign_csr(directory, csr), tls.ensure_ca(directory))
    with (
        context.wrap_socket(socket.create_connection((host, int(port)))) as sock,
        Client(sock) as client,
    ):
        np.testing.assert_allclose(client.infer(X)[0], X @ models.LINEAR_W)
    with (
        socket.create_connection((host, int(port))) as plain,
        pytest.raises((ConnectionError, EOFError)),
    ):
        Client(plain)


def test_a_replica_whose_gpu_broke_says_so_ends_and_is_replaced(cluster: Cluster) -> None:
    cluster.deploy("model-b", cluster.spec("b"), breakable=True)
    info = cluster.heard("ready", lambda e: e["model"] == "b")
    process = os.pidfd_open(info["pid"])
    with Client.unix(info["unix"]) as client:
        client.send_infer(np.full((1, 4), -1, np.float32))
        with suppress(ConnectionResetError):
            assert client.sock.recv(1) == b"", "a batch that met a broken GPU gets no answer"
    assert select.select([process], [], [], 30)[0], "the process has not ended"
    os.close(process)
    last = cluster.heard("draining", lambda e: e["pid"] == info["pid"])
    assert last["fatal"] == "an illegal memory access was encountered"
    successor = cluster.heard("ready", lambda e: e["model"] == "b" and e["pid"] != info["pid"])
    assert successor["fatal"] is None
    serves(successor["unix"])


def test_a_replica_whose_model_left_its_device_is_replaced(cluster: Cluster) -> None:
    served = [e for e in cluster.entries() if e.get("model") == "b" and e["state"] == "ready"]
    info = served[-1]
    process = os.pidfd_open(info["pid"])
    with Client.unix(info["unix"]) as client:
        client.infer(np.full((1, 4), -2, np.float32))
    assert select.select([process], [], [], 60)[0], "the process has not ended"
    os.close(process)
    successor = cluster.heard(
        "ready",
        lambda e: (
            e["model"] == "b"
            and e["pid"] != info["pid"]
            and e["replica"] not in {s["replica"] for s in served}
        ),
    )
    serves(successor["unix"])


def test_a_replica_that_may_use_a_gpu_asks_for_a_share_until_the_controller_knows(
    cluster: Cluster,
) -> None:
    cluster.deploy("model-auto", cluster.spec("auto", device="auto"))
    info = cluster.heard("ready", lambda e: e["model"] == "auto")
    asked = [e for e in cluster.entries() if e.get("leased") == info["replica"]]
    assert len(asked) >= 2
    wanted = {k: info[k] for k in ("app", "node", "pid")}
    assert {k: asked[0][k] for k in wanted} == wanted
    serves(info["unix"])


def test_a_refused_share_reaches_the_controller_in_its_own_words(cluster: Cluster) -> None:
    cluster.deploy("model-full", cluster.spec("full", device="auto"))
    info = cluster.heard("failed", lambda e: e["model"] == "full")
    assert info["error"] == "needs 9 GiB, 2 GiB are free"


@pytest.mark.skipif(cuda.missing_cuda() is None, reason="there is a GPU here")
def test_who_was_given_a_gpu_that_is_not_there_never_runs_on_the_cpu(cluster: Cluster) -> None:
    cluster.deploy("model-gone", cluster.spec("gone", device="auto"))
    info = cluster.heard("failed", lambda e: e["model"] == "gone")
    assert info["error"].startswith("device: cuda: no NVIDIA driver is installed here")


def test_a_load_failure_reaches_the_controller_in_one_sentence(cluster: Cluster) -> None:
    wrong = Bundle(cluster.directory / "wrong", cluster.directory / "home", p=np.zeros((2, 3), "f"))
    # Put into the node's cache, because the controller here has one bundle only.
    place_copy(wrong.home, wrong.digest, wrong.directory)
    spec = ReplicaSpec.from_dict({**cluster.spec("f").to_dict(), "digest": wrong.digest})
    cluster.deploy("model-f", spec)
    info = cluster.heard("failed", lambda e: e["model"] == "f")
    assert info["error"].startswith("golden check: output 'p' differs by at most ")
    assert info["unix"] is None


def test_a_deleted_app_says_goodbye_and_its_process_ends(cluster: Cluster) -> None:
    from ray import serve

    info = cluster.heard("ready", lambda e: e["model"] == "t")
    process = os.pidfd_open(info["pid"])
    serve.delete("model-t", _blocking=False)
    cluster.heard("draining", lambda e: e["model"] == "t")
    wait_until(lambda: not Path(info["unix"]).exists(), "the socket is gone", 20)
    assert select.select([process], [], [], 30)[0], "the process has not ended"
    os.close(process)
