"""`serving up`: start, follow until ready, stay until a signal, leave no process behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol

from serving import compose
from serving.cli import home, preflight, ray_dirs
from serving.cli.changes import notes
from serving.cli.client import Admin, failures
from serving.config import ServingConfig, load_config, reachable_url
from serving.control.layout import references
from serving.control.resolver import RegistryResolver
from serving.errors import ClusterError, ConflictError, OperatorError

_POLL_S: Final = 0.2
_LIVE_POLL_S: Final = 1.0
_AWAY_S: Final = 60.0


class _Stop(BaseException):
    """A signal asked us to end. Not an Exception: nothing on the way may take it for a failure."""


def run(file: Path | None, timeout_s: float) -> None:
    """Start serving. Raises `OperatorError`."""
    config = preflight.concrete(load_config(file))
    address = compose.external_cluster()
    if address is not None:
        _deploy_and_return(config, address, timeout_s)
        return
    with home.hold(config):
        preflight.check_ports(config)
        preflight.check_devices(config)
        _check_store(config)
        _check_versions(config)
        with ray_dirs.held() as ray_dir:
            view = _foreground(config, ray_dir, timeout_s)
        view.say("stopped")


def _check_store(config: ServingConfig) -> None:
    """Open and close the store before anything starts: where its errors are clearest."""
    from serving.store.sql import open_store

    open_store(config.store_url).close()


def _check_versions(config: ServingConfig) -> None:
    """Resolve every reference, as the first apply will again: a wrong one ends here, in seconds."""
    with ThreadPoolExecutor(1) as pool:
        resolver = RegistryResolver(config.registry_uri, config.home_dir)
        found = pool.submit(resolver.resolve, references(config))
        compose.load_ray()  # takes about as long
        found.result()


def _deploy_and_return(config: ServingConfig, address: str, timeout_s: float) -> None:
    compose.connect_ray(address)
    if compose.deployed_apps():
        raise ConflictError(
            f"it already runs on {address}; change it with `serving apply`, or remove it with "
            "`serving down`"
        )
    view = _View(live=False)
    deployment = compose.deploy(config, embedded=False)
    # By handle: the admin API may be on another node's loopback.
    controller = compose.ControllerHandle()
    _until_ready(config, deployment, controller, view, time.monotonic() + timeout_s)
    view.ready()


def _foreground(config: ServingConfig, ray_dir: Path, timeout_s: float) -> _View:
    view = _View(live=sys.stdout.isatty())
    admin = Admin(reachable_url(config.control.host, config.control.port))
    deadline = time.monotonic() + timeout_s
    with _signals(ray_dir) as signals:
        try:
            view.say("starting Ray")
            compose.start_ray(config, ray_dir)
            signals.install()  # Ray has put its own in place
            view.say(f"logs in {ray_dir}/session_latest/logs")
            view.say("starting controller and gateway")
            deployment = compose.deploy(config, embedded=True)
            _until_ready(config, deployment, admin, view, deadline)
            _wait(lambda: _gateway_answers(config), compose.GATEWAY_APP, deadline)
            view.ready()
            _stay(admin, view)
        except _Stop:
            view.say("stopping; press Ctrl-C again to end it at once")
        finally:
            signals.stopping()
            _stop(view)
    return view


class _Signals:
    """SIGINT, SIGTERM, SIGHUP: the first raises `_Stop`, the second kills every child."""

    def __init__(self, ray_dir: Path) -> None:
        self._ray_dir = ray_dir
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.getsignal(number) for number in numbers}
        self._stopping = False

    def install(self) -> None:
        """Take the signals."""
        for number in self._before:
            signal.signal(number, self._handle)

    def stopping(self) -> None:
        """From now on a signal ends everything at once: nothing may break off the clean-up."""
        self._stopping = True

    def restore(self) -> None:
        """Put back what was there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            compose.kill_children()
            shutil.rmtree(self._ray_dir, ignore_errors=True)
            sys.stderr.write("error: ended before everything was stopped\n")
            sys.stderr.flush()
            os._exit(128 + number)
        self._stopping = True
        raise _Stop


@contextlib.contextmanager
def _signals(ray_dir: Path) -> Iterator[_Signals]:
    signals = _Signals(ray_dir)
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


class _Controller(Protocol):
    """The controller, by HTTP or by handle. Its methods raise `OperatorError`."""

    def status(self) -> dict[str, Any]: ...

    def apply(self, config: dict[str, Any], *, dry_run: bool) -> dict[str, Any]: ...


def _until_ready(
    config: ServingConfig, deployment: str, controller: _Controller, view: _View, deadline: float
) -> None:
    """Wait for this deployment's controller, apply, wait for models and gateways."""
    _wait(lambda: is_own(config, deployment, controller), compose.CONTROLLER_APP, deadline)
    plan = controller.apply(config.model_dump(mode="json"), dry_run=False)
    for line in notes(plan):
        view.say(line)
    view.say("loading models")

    def ready() -> bool:
        try:
            status = controller.status()
        except ClusterError:
            return False  # it is being replaced, and resumes by itself
        view.update(status)
        if status["apply"]["state"] == "failed":
            raise ClusterError(failures(status))
        revisions = [g["revision"] for g in status["gateways"]]
        return (
            status["apply"]["state"] == "converged"
            and len(revisions) >= config.gateway.replicas
            and min(revisions) >= status["controller"]["revision"]
        )

    _wait(ready, compose.GATEWAY_APP, deadline)


def is_own(config: ServingConfig, deployment: str, controller: _Controller) -> bool:
    """Whether the deployment's controller answers. Raises `ConflictError` if another's does."""
    try:
        found = controller.status().get("controller", {})
    except OperatorError:
        return False
    if found.get("deployment") != deployment:
        raise ConflictError(
            f"port {config.control.port} on {config.control.host}, for the admin API, is held by "
            f"another deployment (process {found.get('pid', '?')}, home {found.get('home', '?')}). "
            "Stop that one, or set control.port"
        )
    return True


def _wait(condition: Callable[[], bool], app: str, deadline: float) -> None:
    """Until `condition` holds. Raises `ClusterError` if `app` cannot start, or at the deadline."""
    while not condition():
        status, message = compose.deployed_apps().get(app, ("NOT_STARTED", ""))
        if status == "DEPLOY_FAILED":
            raise ClusterError(f"the {app} does not start: {compose.reason(message)}")
        if time.monotonic() > deadline:
            raise ClusterError(f"not ready in time; the {app} is {status.lower()}")
        time.sleep(_POLL_S)


def _gateway_answers(config: ServingConfig) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = reachable_url(config.gateway.host, config.gateway.port)
    try:
        with opener.open(f"{url}/v2/health/ready", timeout=5.0) as reply:
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _stay(admin: Admin, view: _View) -> None:
    """Show what runs until a signal comes, or the controller has been away for a minute."""
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

    def __init__(self, *, live: bool) -> None:
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
