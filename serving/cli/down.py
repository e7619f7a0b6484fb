"""`serving down`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

import typer

from serving import compose
from serving.cli import home
from serving.config import load_config
from serving.errors import ClusterError, ConflictError

_STOP_S: Final = 120.0


def run(file: Path | None) -> None:
    """Stop what runs. Raises `ConflictError` if nothing does."""
    config = load_config(file)
    address = compose.external_cluster()
    if address is not None:
        _remove(address)
        return
    found = home.running(config.home_dir)
    if found is None:
        raise ConflictError(
            f"nothing runs on {config.home_dir}; for a cluster, set RAY_ADDRESS, for another home, "
            "use -f or SERVING_HOME"
        )
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.kill(found.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while home.running(config.home_dir) == found:
        if time.monotonic() > deadline:
            raise ClusterError(f"process {found.pid} did not stop within {_STOP_S:g} s")
        time.sleep(0.1)
    typer.echo("stopped")


def _remove(address: str) -> None:
    compose.connect_ray(address)
    if not compose.deployed_apps():
        raise ConflictError(f"nothing of ours runs on {address}")
    compose.delete_apps(typer.echo)
    typer.echo("removed")
