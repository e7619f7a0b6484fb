"""What `serving up` makes sure of before it starts anything: a home of its own, and free ports."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from serving.config import ServingConfig
from serving.errors import ConflictError


def concrete(config: ServingConfig) -> ServingConfig:
    """`config` with an absolute home and free ports in place of 0: every process sees the same."""
    gateway, control = config.gateway, config.control
    if gateway.port == 0:
        gateway = gateway.model_copy(update={"port": _free_port(gateway.host)})
    if control.port == 0:
        control = control.model_copy(update={"port": _free_port(control.host)})
    return config.model_copy(
        update={"home": config.home_dir, "gateway": gateway, "control": control}
    )


def _free_port(host: str) -> int:
    with _socket(host) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def port_error(host: str, port: int) -> str | None:
    """Why `port` cannot be listened on, or None if it can."""
    with _socket(host) as probe:
        # As our listeners do: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            return error.strerror or str(error)
    return None


def check_ports(config: ServingConfig) -> None:
    """Raise `ConflictError` naming the first port that cannot be listened on."""
    for what, host, port, key in (
        ("inference", config.gateway.host, config.gateway.port, "gateway.port"),
        ("the admin API", config.control.host, config.control.port, "control.port"),
    ):
        if error := port_error(host, port):
            raise ConflictError(
                f"port {port} on {host}, for {what}, cannot be used: {error}. "
                f"Stop what listens there, or set {key}"
            )


@contextlib.contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Hold `home` for one `serving up`. Raises `ConflictError` naming the process that has it."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (home / "up.pid").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConflictError(f"{home}: cannot be used as home: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConflictError(
                f"`serving up` already runs on {home} (process {file.read().strip() or '?'}); "
                "stop it with `serving down`, or use another home"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)


def running_pid(home: Path) -> int | None:
    """The process of the `serving up` that holds `home`, if one does."""
    try:
        with (home / "up.pid").open("r+", encoding="utf-8") as file:
            try:
                # Shared: to look must not stop another from taking it.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                text = file.read().strip()
                return int(text) if text.isdigit() else None
            return None
    except OSError:
        return None
