"""The home of a `serving up`: held by one at a time, and it says where that one listens."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from serving.config import ServingConfig, load_config, reachable_url
from serving.errors import ConflictError

_FILE: Final = "up.json"
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
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (home / _FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConflictError(f"{home}: cannot be used as home: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = running(home)
            raise ConflictError(
                f"`serving up` already runs on {home} (process {other.pid if other else '?'}); "
                "stop it with `serving down`, or use another home"
            ) from None
        urls = {name: _configured(config, name) for name in ("gateway", "control")}
        file.truncate(0)
        file.write(json.dumps(asdict(Running(os.getpid(), **urls))))
        file.flush()
        yield
        file.truncate(0)


def running(home: Path) -> Running | None:
    """The `serving up` that holds `home`, if one does."""
    try:
        with (home / _FILE).open("r+", encoding="utf-8") as file:
            try:
                # Shared: to look must not stop another from taking it.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return Running(**json.load(file))
            return None
    except (OSError, ValueError, TypeError):
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
