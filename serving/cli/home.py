"""The home of a `serving up`: held by one at a time, and it says where that one listens."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final, Literal

from serving.config import ServingConfig, load_config, reachable_url
from serving.errors import ConflictError

_FILE: Final = "up.json"
_TURN: Final = "up.lock"
_VARIABLES: Final = {"gateway": "SERVING_URL", "control": "SERVING_CONTROL_URL"}


@dataclass(frozen=True, slots=True)
class Running:
    """A `serving up`: its process, and the URLs of its gateway and its admin API."""

    pid: int
    gateway: str
    control: str


@contextlib.contextmanager
def hold(config: ServingConfig) -> Iterator[None]:
    """Hold the home for one `serving up`, whose ports `config` names.

    Raises `ConflictError` naming the process that has it.
    """
    home = config.home_dir
    urls = {name: _configured(config, name) for name in ("gateway", "control")}
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / _TURN).touch()
        with _turn(home):
            file = (home / _FILE).open("a+", encoding="utf-8")
            other = _holder(file)
            if other is None:
                file.truncate(0)
                file.write(json.dumps(asdict(Running(os.getpid(), **urls))))
                file.flush()
    except OSError as error:
        raise ConflictError(f"{home}: cannot be used as home: {error.strerror}") from error
    with file:
        if other is not None:
            raise ConflictError(
                f"`serving up` already runs on {home} (process {other.pid}); "
                "stop it with `serving down`, or use another home"
            )
        yield


def running(home: Path) -> Running | None:
    """The `serving up` that holds `home`, if one does."""
    try:
        with _turn(home), (home / _FILE).open("r+", encoding="utf-8") as file:
            return _holder(file)
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def _turn(home: Path) -> Iterator[None]:
    """One process at a time: who takes the home writes who it is before another looks.

    To look takes the lock that is looked at, for an instant; so nobody is refused by a mere look.
    """
    with (home / _TURN).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _holder(file: IO[str]) -> Running | None:
    """Whose the file is; where it was nobody's it is ours until it is closed. In our turn only."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return Running(**json.load(file))
    return None


def admin_url(url: str | None, file: Path | None) -> str:
    """Where the admin API is; see `_find`."""
    return _find("control", url, file)


def gateway_url(url: str | None, file: Path | None) -> str:
    """Where the gateway is; see `_find`."""
    return _find("gateway", url, file)


def _find(section: Literal["gateway", "control"], url: str | None, file: Path | None) -> str:
    """`url`, else the environment's (without a file), else what runs on the home, else the file's.

    Raises `ConfigError`, or `ConflictError` where only a running deployment knows the port.
    """
    if url is None and file is None:
        url = os.environ.get(_VARIABLES[section])
    if url:
        return url.rstrip("/")
    config = load_config(file)
    if found := running(config.home_dir):
        return str(getattr(found, section))
    if getattr(config, section).port == 0:
        raise ConflictError(
            f"{file}: {section}.port is 0, so only a running deployment knows its port, and none "
            f"runs on {config.home_dir}; start one with `serving up`, or use --url"
        )
    return _configured(config, section)


def _configured(config: ServingConfig, section: str) -> str:
    listener = getattr(config, section)
    return reachable_url(listener.host, listener.port)
