"""`serving up`: start, follow until ready, stay until a signal, leave no process behind."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

from serving import compose
from serving.cli.client import Admin, failures
from serving.config import ServingConfig, load_config, reachable_url
from serving.errors import ClusterError, ConflictError

_POLL_S: Final = 0.2
_LIVE_POLL_S: Final = 1.0
_AWAY_S: Final = 60.0


class _Stop(BaseException):
    """A signal asked us to end. Not an Exception: nothing on the way may take it for a failure."""


def run(file: Path | None, timeout_s: float) -> None:
    """Start serving. Raises `OperatorError`."""
    config = compose.concrete(load_config(file))
    address = compose.external_cluster()
    if address is not None:
        _deploy_and_return(config, address, timeout_s)
        return
    with compose.home_lock(config.home_dir):
        compose.check_ports(config)
        _check_store(config)
        _foreground(config, timeout_s)


def _check_store(config: ServingConfig) -> None:
    """Open and close the store before anything starts: where its errors are clearest."""
    from serving.store.sql import open_store

    open_store(config.store_url).close()


def _deploy_and_return(config: ServingConfig, address: str, timeout_s: float) -> None:
    compose.connect_ray(address)
    if compose.deployed_apps():
        raise ConflictError(
            f"it already runs on {address}; change it with `serving apply`, or remove it with "
            "`serving down`"
        )
    view = _View(config, live=False)
    compose.deploy(config, embedded=False)
    _until_ready(config, view, time.monotonic() + timeout_s)
    view.ready()


def _foreground(config: ServingConfig, timeout_s: float) -> None:
    view = _View(config, live=sys.stdout.isatty())
    with _signals() as signals:
        try:
            view.say("starting Ray")
            compose.start_ray(config)
            signals.install()  # Ray has put its own in place
            view.say(f"logs in {compose.log_dir()}")
            view.say("starting controller and gateway")
            compose.deploy(config, embedded=True)
            _until_ready(config, view, time.monotonic() + timeout_s)
            view.ready()
            _stay(config, view)
        except _Stop:
            view.say("stopping; press Ctrl-C again to end it at once")
        finally:
            _stop(view)
    view.say("stopped")


class _Signals:
    """SIGINT and SIGTERM: the first raises `_Stop`, the second kills every child and exits."""

    def __init__(self) -> None:
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        self._stopping = False

    def install(self) -> None:
        """Take both signals."""
        for number in self._before:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back what was there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            compose.kill_children()
            sys.stderr.write("error: ended before everything was stopped\n")
            sys.stderr.flush()
            _exit_now(128 + number)
        self._stopping = True
        raise _Stop


def _exit_now(code: int) -> None:
    import os

    os._exit(code)


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    signals.install()
    try:
        yield signals
    finally:
        signals.restore()


def _stop(view: _View) -> None:
    view.close()
    try:
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            compose.delete_apps(view.say)
    except Exception as error:
        view.say(f"not everything stopped in order: {error}")
    finally:
        compose.stop_ray()


def _until_ready(config: ServingConfig, view: _View, deadline: float) -> None:
    """Wait for the controller, apply the configuration, wait for models and gateways."""
    admin = Admin(reachable_url(config.control.host, config.control.port))
    _wait(admin.healthy, compose.CONTROLLER_APP, deadline)
    plan = admin.apply(config.model_dump(mode="json"), dry_run=False)
    view.say("loading models")
    while True:
        status = admin.status()
        view.update(status)
        if status["apply"]["state"] == "failed":
            raise ClusterError(failures(status))
        if (
            status["apply"]["state"] == "converged"
            and status["apply"]["id"] >= plan["apply"]
            and len(status["gateways"]) >= config.gateway.replicas
            and all(g["revision"] >= status["controller"]["revision"] for g in status["gateways"])
            and _gateway_ready(status["urls"]["inference"])
        ):
            return
        _check_deadline(deadline, compose.GATEWAY_APP)
        time.sleep(_POLL_S)


def _wait(condition: Any, app: str, deadline: float) -> None:
    while not condition():
        _check_deadline(deadline, app)
        time.sleep(_POLL_S)


def _check_deadline(deadline: float, app: str) -> None:
    status, message = compose.deployed_apps().get(app, ("NOT_STARTED", ""))
    if status == "DEPLOY_FAILED":
        raise ClusterError(f"the {app} does not start: {compose.reason(message)}")
    if time.monotonic() > deadline:
        raise ClusterError(f"not ready in time; the {app} is {status.lower()}")


def _gateway_ready(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/v2/health/ready", timeout=5.0) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _stay(config: ServingConfig, view: _View) -> None:
    """Show what runs until a signal comes, or the controller has been away for a minute."""
    admin = Admin(reachable_url(config.control.host, config.control.port))
    heard = time.monotonic()
    while True:
        try:
            view.update(admin.status())
            heard = time.monotonic()
        except ClusterError as error:
            if time.monotonic() - heard > _AWAY_S:
                raise ClusterError(f"the controller does not come back: {error}") from error
        time.sleep(_LIVE_POLL_S)


class _View:
    """A live table on a terminal, plain lines elsewhere."""

    def __init__(self, config: ServingConfig, *, live: bool) -> None:
        from serving.cli.render import Progress

        self._progress = Progress()
        self._live: Any = None
        self._status: dict[str, Any] | None = None
        if live:
            from rich.live import Live

            from serving.cli.render import console

            self._live = Live(console=console(), refresh_per_second=4)
            self._live.start()

    def say(self, sentence: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(sentence)
        else:
            sys.stdout.write(f"{sentence}\n")
            sys.stdout.flush()

    def update(self, status: dict[str, Any]) -> None:
        """The latest status."""
        self._status = status
        if self._live is None:
            self._progress(status)
        else:
            from serving.cli.render import status_view

            self._live.update(status_view(status))

    def ready(self) -> None:
        """Say so, with the URLs."""
        urls = self._status["urls"] if self._status else {}
        self.say("ready: " + "  ".join(f"{name} {url}" for name, url in urls.items()))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None
