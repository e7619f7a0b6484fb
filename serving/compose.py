"""Where the parts are put together: a local Ray or one that exists, and the applications on it.

The only module that knows controller, gateway and replica at once, and it knows the latter two by
name only. Light to import: ray is imported by the functions that need it, after
`prepare_environment`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from serving.config import ServingConfig
from serving.errors import ClusterError, first_line, operator_error

REPLICA_CLASS: Final = "serving.replica.deployment:ModelReplica"
AGENT_CLASS: Final = "serving.agent.deployment:NodeAgent"
CONTROLLER_APP: Final = "controller"
GATEWAY_APP: Final = "gateway"
AGENT_APP: Final = "agent"

SERVE_FLAGS: Final = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""What Serve replicas need in their environment; on an existing cluster, through runtime_env."""

_EMBEDDED_FLAGS: Final = {
    **SERVE_FLAGS,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_DEDUP_LOGS": "0",
    # What runtime_env's worker_process_setup_hook sets. As a runtime_env it would double a
    # replica's start: an environment to make for each worker, and no use for the workers that Ray
    # starts ahead.
    "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "serving.compose.keep_to_loopback",
    # Ray replaces a loopback --node-ip-address by the machine's own address and binds there, and
    # some servers to every interface. Without "clusters", which a local Ray does not need, it stays
    # on 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

_RUN: Final = "run"
# 107 less "/", 8 characters of hash, "/" and "r-<16 characters>.sock".
_RUN_DIR_LENGTH: Final = 74
_SHORT_TEMP: Final = Path("/tmp")
_DELETE_S: Final = 60.0
_CALL_TIMEOUT_S: Final = 10.0
_APPLY_TIMEOUT_S: Final = 600.0
_OBJECT_STORE_BYTES: Final = 128 << 20
_PR_SET_CHILD_SUBREAPER: Final = 36


def prepare_environment() -> None:
    """Set the embedded Ray's flags, before ray is imported. One set by the operator is kept."""
    for name, value in _EMBEDDED_FLAGS.items():
        os.environ.setdefault(name, value)


def keep_to_loopback() -> None:
    """Run in every worker of the embedded Ray, before it loads Serve.

    Serve binds the gRPC server of each replica to all interfaces ("[::]:0"), whatever the node's
    address. Nothing outside this machine needs it.
    """
    from ray._common import tls_utils

    bind = tls_utils.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> int:
        return int(bind(server, address.replace("[::]:", "127.0.0.1:")))

    tls_utils.add_port_to_grpc_server = on_loopback


def load_ray() -> None:
    """Import what an embedded Ray needs of this process: seconds."""
    prepare_environment()
    import serving.control.deployment
    import serving.gateway.deployment  # noqa: F401


def external_cluster() -> str | None:
    """RAY_ADDRESS, if there is one: deploy there instead of starting a local Ray."""
    return os.environ.get("RAY_ADDRESS") or None


def start_ray(config: ServingConfig, directory: Path) -> None:
    """Start the embedded Ray and Serve on it, on loopback only. Raises `ClusterError`.

    `directory` is for its logs and sockets; short enough for their paths.
    """
    prepare_environment()
    _adopt_orphans()
    # Sockets of replicas that were killed.
    shutil.rmtree(config.home_dir / _RUN, ignore_errors=True)
    import ray
    from ray import serve

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with _own_sessions():
            _init_ray(ray, config, directory)
        _start_serve(serve)
    except Exception as error:
        raise ClusterError(f"the local Ray does not start: {first_line(error)}") from error


@contextlib.contextmanager
def _own_sessions() -> Iterator[None]:
    """Let each process that Ray starts meanwhile begin a session of its own.

    A signal to our process group then reaches us alone: Ray must run until all have drained. Those
    processes end with us all the same, which is what Ray calls this function for.
    """
    from ray._private import utils

    end_with_parent = utils.set_kill_on_parent_death_linux

    def in_child() -> None:
        os.setsid()
        end_with_parent()

    if sys.platform == "linux":
        utils.set_kill_on_parent_death_linux = in_child
    try:
        yield
    finally:
        utils.set_kill_on_parent_death_linux = end_with_parent


def _init_ray(ray: Any, config: ServingConfig, directory: Path) -> None:
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": config.cluster.num_cpus,
        "num_gpus": _claim_gpus(),
        "include_dashboard": False,
        "_temp_dir": str(directory),
        "_node_ip_address": "127.0.0.1",
        "logging_level": "ERROR",
        "log_to_driver": False,
        # Tensors never pass through Ray: the least it accepts, with room to spare.
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    try:
        ray.init(**options)
    except Exception as error:
        if "timed out" not in str(error):
            raise
        # Ray gives its own processes 30 s, which is short on a machine that is busy.
        stop_ray()
        ray.init(**options)


def _claim_gpus() -> int:
    """How many devices Ray is to count: whole GPUs and slices that work can be placed on.

    They are named by UUID to Ray and whatever it starts: CUDA numbers GPUs in another order, and a
    GPU in MIG mode is as many devices as it has slices.
    """
    from serving.agent.nvml import VISIBLE_DEVICES, usable_devices

    devices = usable_devices()
    if devices:
        os.environ[VISIBLE_DEVICES] = ",".join(devices)
    return len(devices)


def connect_ray(address: str) -> None:
    """Connect to a Ray cluster and make sure that Serve runs there. Raises `ClusterError`."""
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    import ray
    from ray import serve

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        _start_serve(serve)
    except Exception as error:
        raise ClusterError(
            f"the Ray cluster at {address} cannot be used: {first_line(error)}"
        ) from error


def _start_serve(serve: Any) -> None:
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="Disabled",
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )


def deploy(config: ServingConfig, *, embedded: bool) -> str:
    """Start the controller and the gateways, without waiting for them. Raises `ClusterError`.

    Returns the deployment's id, which its controller's status repeats.
    """
    from ray import serve

    deployment = uuid.uuid4().hex
    try:
        serve.run_many(
            _applications(config, deployment, embedded=embedded),
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    except Exception as error:
        raise ClusterError(f"cannot deploy: {first_line(error)}") from error
    return deployment


def _applications(config: ServingConfig, deployment: str, *, embedded: bool) -> list[Any]:
    from ray import serve

    from serving.control.cluster import replica_options
    from serving.control.deployment import Controller
    from serving.gateway.deployment import Gateway

    env = {} if embedded else SERVE_FLAGS
    plain = config.model_dump(mode="json")
    control = {
        "config": plain,
        "deployment": deployment,
        "replica_class": REPLICA_CLASS,
        "agent_class": AGENT_CLASS,
        "run_prefix": run_prefix(config.home_dir, embedded=embedded),
        "env": env,
        "listen_tcp": not embedded,
    }
    drain = {"graceful_shutdown_timeout_s": config.gateway.drain_s + 5.0}
    # `serve.deployment` makes them Deployments, which its type hints do not say.
    gateway_class: Any = Gateway
    controller_class: Any = Controller
    gateway = gateway_class.options(
        **{**replica_options(env, config.gateway.resources), **drain},
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=100,
    ).bind(plain)
    controller = controller_class.options(
        **replica_options(env, {}), num_replicas=1, max_ongoing_requests=1000
    ).bind(control)
    return [
        serve.RunTarget(controller, name=CONTROLLER_APP, route_prefix=None),
        serve.RunTarget(gateway, name=GATEWAY_APP, route_prefix=None),
    ]


class ControllerHandle:
    """The controller of the connected cluster, by Serve handle instead of HTTP."""

    def __init__(self) -> None:
        self._handle: Any = None

    def status(self) -> dict[str, Any]:
        """What runs. Raises `ClusterError`."""
        return self._call(_CALL_TIMEOUT_S, "status")

    def apply(self, config: dict[str, Any], *, dry_run: bool) -> dict[str, Any]:
        """Send a configuration; the plan. Raises `OperatorError`."""
        answer = self._call(_APPLY_TIMEOUT_S, "apply", config, dry_run)
        if "error" in answer:
            raise operator_error(answer["slug"], answer["error"])
        return answer

    def _call(self, timeout_s: float, method: str, *args: Any) -> dict[str, Any]:
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            if self._handle is None:
                self._handle = serve.get_app_handle(CONTROLLER_APP)
            call = getattr(self._handle, method).remote(*args)
            answer: dict[str, Any] = call.result(timeout_s=timeout_s)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ClusterError(f"the controller does not answer: {first_line(error)}") from error
        return answer


def run_prefix(home: Path, *, embedded: bool) -> str:
    """What the directories of unix sockets begin with.

    They lie in `home`, unless it is shared by the nodes of a cluster, or so long that a socket's
    path would exceed its 107 characters.
    """
    inside = home / _RUN
    if embedded and len(str(inside)) <= _RUN_DIR_LENGTH:
        return f"{inside}/"
    tag = hashlib.sha256(str(home).encode()).hexdigest()[:8]
    name = f"serving-{os.getuid()}-{tag}-"
    prefix = f"{tempfile.gettempdir()}/{name}"
    return prefix if len(prefix) <= _RUN_DIR_LENGTH else f"{_SHORT_TEMP}/{name}"


def deployed_apps() -> dict[str, tuple[str, str]]:
    """Our applications on the connected cluster: name to (status, message)."""
    from ray import serve

    return {
        name: (
            str(app.status.value),
            app.message or "".join(d.message for d in app.deployments.values()),
        )
        for name, app in serve.status().applications.items()
        if name in (CONTROLLER_APP, GATEWAY_APP, AGENT_APP) or name.startswith("model-")
    }


def delete_apps(tell: Callable[[str], None]) -> None:
    """Delete our applications: gateways first (they drain), then the controller, then the rest.

    The controller goes after the gateways so that it gets their last report, and before what it
    would start again.
    """
    from ray import serve

    names = list(deployed_apps())
    for group in (
        [n for n in names if n == GATEWAY_APP],
        [n for n in names if n == CONTROLLER_APP],
        [n for n in names if n == AGENT_APP or n.startswith("model-")],
    ):
        for name in group:
            tell(f"stopping {name}")
            serve.delete(name, _blocking=False)
        _wait_deleted(group)


def _wait_deleted(names: list[str]) -> None:
    deadline = time.monotonic() + _DELETE_S
    while set(names) & deployed_apps().keys():
        if time.monotonic() > deadline:
            raise ClusterError(f"{', '.join(names)} did not stop within {_DELETE_S:g} s")
        time.sleep(0.1)


def stop_ray() -> None:
    """Disconnect and, where Ray is embedded, end every process that it started."""
    import psutil

    children = psutil.Process().children(recursive=True)
    ray = sys.modules.get("ray")
    if ray is not None:
        with contextlib.suppress(Exception):
            ray.shutdown()
    # Ray can leave children behind; being a subreaper, we inherit those whose parents are gone.
    children = list({*children, *psutil.Process().children(recursive=True)})
    _, alive = psutil.wait_procs(children, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=3)


def kill_children() -> None:
    """End every child process at once."""
    import psutil

    while children := psutil.Process().children(recursive=True):
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(children, timeout=1)


def _adopt_orphans() -> None:
    """Become the parent of descendants whose parent dies, so that none is lost (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reason(message: str) -> str:
    """The sentence in a Serve message: the last exception of a traceback, or the first line."""
    from serving.control.cluster import reason as found

    return found(message)
