"""What `serving up` makes sure of before it starts anything: its ports and GPUs."""

from __future__ import annotations

import errno
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from serving.config import ServingConfig
from serving.errors import ClusterError, ConflictError, DeviceError

# Ray hands out 10002 to 19999, and systems give 32768 and above to whoever asks for any port: one
# that is chosen now and listened on seconds later would be taken in between.
_CHOSEN_FROM: Final = range(20_000, 32_768)
_TRIES: Final = 1_000


def concrete(config: ServingConfig) -> ServingConfig:
    """`config` with an absolute home and free ports in place of 0: every process sees the same."""
    gateway, control = config.gateway, config.control
    if gateway.port == 0:
        gateway = gateway.model_copy(update={"port": free_port(gateway.host)})
    if control.port == 0:
        control = control.model_copy(
            update={"port": free_port(control.host, other_than=gateway.port)}
        )
    return config.model_copy(
        update={"home": config.home_dir, "gateway": gateway, "control": control}
    )


def free_port(host: str = "127.0.0.1", *, other_than: int = 0) -> int:
    """A TCP port that nobody listens on, and that nobody will be given who asks for any.

    Raises `ClusterError`.
    """
    for port in random.sample(_CHOSEN_FROM, _TRIES):
        if port == other_than:
            continue
        with _socket(host) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    return port  # the host is at fault, which `port_problem` explains
            else:
                return port
    raise ClusterError(
        f"no free port on {host}: {_TRIES} from {_CHOSEN_FROM[0]} to {_CHOSEN_FROM[-1]} are in use"
    )


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


@dataclass(frozen=True, slots=True)
class PortProblem:
    """Why a port cannot be listened on, and what to do about it."""

    fact: str
    advice: str


def port_problem(section: str, host: str, port: int) -> PortProblem | None:
    """What keeps `section` (gateway or control) from listening on `port`, or None."""
    with _socket(host) as probe:
        # As our listeners do: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            fact = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                advice = f"Stop what listens there, or set {section}.port"
                return PortProblem(f"{fact}{_listener(port)}", advice)
            if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                return PortProblem(fact, f"Set {section}.host to an address of this machine")
            return PortProblem(fact, f"Set {section}.port to another")
    return None


def _listener(port: int) -> str:
    """Who listens on `port`, as the end of a sentence; empty where only root may know."""
    import psutil

    try:
        pids = {
            c.pid
            for c in psutil.net_connections(kind="tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid
        }
        for process in map(psutil.Process, sorted(pids)):
            for ancestor in process.parents():
                if _is_up(ancestor.cmdline()):
                    return f" by another `serving up` (process {ancestor.pid})"
            return f" by process {process.pid} ({process.name()})"
    except (psutil.Error, OSError):
        pass
    return ""


def _is_up(command: list[str]) -> bool:
    names = [Path(word).name for word in command]
    return "serving" in names and "up" in names[names.index("serving") :]


def check_ports(config: ServingConfig) -> None:
    """Raise `ConflictError` naming the first port that cannot be listened on."""
    gateway, control = config.gateway, config.control
    if (gateway.host, gateway.port) == (control.host, control.port):
        raise ConflictError(
            f"gateway.port and control.port are both {gateway.port} on {gateway.host}; change one"
        )
    for what, section, listener in (
        ("inference", "gateway", gateway),
        ("the admin API", "control", control),
    ):
        if problem := port_problem(section, listener.host, listener.port):
            raise ConflictError(
                f"port {listener.port} on {listener.host}, for {what}, cannot be used: "
                f"{problem.fact}. {problem.advice}"
            )


def check_devices(config: ServingConfig) -> None:
    """Raise `DeviceError` naming the models that ask for a GPU where this machine has none."""
    asking = models_on_cuda(config)
    if asking and (reason := missing_gpu()):
        keys = ", ".join(f"models.{name}.device" for name in asking)
        raise DeviceError(f"{keys}: cuda, but {reason}; allowed on this machine: auto, cpu")


def models_on_cuda(config: ServingConfig) -> list[str]:
    """The models that start on a GPU or not at all."""
    return [name for name, model in config.models.items() if model.device == "cuda"]


def missing_gpu() -> str | None:
    """Why no replica can have a GPU on this machine; None where one can.

    NVML is asked first, as placement goes by it; where it knows of none, the driver itself, as a
    replica does. Neither needs a runtime such as torch, which takes seconds to load.
    """
    from serving.agent.nvml import usable_devices
    from serving.replica.backends.cuda import missing_cuda

    return None if usable_devices() else missing_cuda()
