"""Ray Serve as the place where model applications run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError

# What the dashboard's REST API for external scalers calls; a cluster of ours runs no dashboard.
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from serving.control.state import AppStatus
from serving.core.plan import APP_PREFIX, AppSpec, Phase
from serving.core.seats import Seat, app_of, seat_name
from serving.errors import ClusterError, first_line

HEALTH_CHECK_PERIOD_S: Final = 1.0
HEALTH_CHECK_TIMEOUT_S: Final = 5.0
DRAIN_S: Final = 20.0
SCALE_TIMEOUT_S: Final = 5.0

NODE_LABEL: Final = "ray.io/node-id"

# What Ray and Serve raise when they cannot; anything else is a bug of ours.
RAY_ERRORS: Final = (RayError, RayServeException, TimeoutError, RuntimeError)
# Serve and Ray check a deployment's options as they are given.
_BAD_OPTIONS: Final = (ValueError, TypeError, OverflowError)
_PHASES: Final = {
    "NOT_STARTED": Phase.STARTING,
    "DEPLOYING": Phase.STARTING,
    "RUNNING": Phase.RUNNING,
    "UNHEALTHY": Phase.RUNNING,
    "DEPLOY_FAILED": Phase.FAILED,
    "DELETING": Phase.DELETING,
}
_EXCEPTION_LINE: Final = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Exit)\w*): (.+)$", re.M)


class ServeCluster:
    """Model applications on the Serve instance that this process belongs to.

    `replica_class` is the dotted path "module:Class" of what an application runs, so that nothing
    here needs to import it. `env` is set in every replica (on a cluster that we did not start
    ourselves); an application's replicas put their sockets in the directory `run_prefix` + hash.
    """

    def __init__(self, replica_class: str, run_prefix: str, env: Mapping[str, str]) -> None:
        self._replica_class = replica_class
        self._run_prefix = run_prefix
        self._env = dict(env)

    def observe(self) -> dict[str, AppStatus]:
        """The model applications that exist. Raises `ClusterError`."""
        try:
            found = serve.status().applications
        except RAY_ERRORS as error:
            raise ClusterError(f"Ray Serve does not answer: {first_line(error)}") from error
        parts: dict[str, dict[str, AppStatus]] = {}
        for name, app in found.items():
            if name.startswith(APP_PREFIX):
                status = AppStatus(_PHASES[app.status], _message(app), app.last_deployed_time_s)
                parts.setdefault(app_of(name), {})[name] = status
        return {
            name: of[name] if name in of else of_seats(of) for name, of in sorted(parts.items())
        }

    def start(self, apps: Sequence[AppSpec], seats: Mapping[str, Sequence[Seat]]) -> dict[str, str]:
        """Start applications, or more seats of some, without waiting. Raises `ClusterError`.

        Gives the names of those whose options Serve does not take, with the reason; the others are
        started.
        """
        targets, refused = [], {}
        for app in apps:
            try:
                found = self._targets(app, seats.get(app.name))
            except _BAD_OPTIONS as error:
                refused[app.name] = f"Ray Serve does not take its options: {first_line(error)}"
            else:
                targets += found
        try:
            if targets:
                serve.run_many(
                    targets,
                    wait_for_ingress_deployment_creation=False,
                    wait_for_applications_running=False,
                )
        except RAY_ERRORS as error:
            names = ", ".join(target.name for target in targets)
            raise ClusterError(f"cannot start {names}: {first_line(error)}") from error
        return refused

    def scale(self, counts: Mapping[str, int]) -> None:
        """Give applications so many replicas each, without touching others of theirs.

        Serve stops a replica that is too many as it does at the end of an application: it drains.
        Raises `ClusterError`.
        """
        try:
            controller = _get_global_client()._controller
            calls = [
                controller.update_deployment_replicas.remote(
                    DeploymentID(name=self._deployment().name, app_name=app), count
                )
                for app, count in counts.items()
            ]
            ray.get(calls, timeout=SCALE_TIMEOUT_S)
        except RAY_ERRORS as error:
            told = ", ".join(f"{app} to {count}" for app, count in counts.items())
            raise ClusterError(f"cannot scale {told}: {first_line(error)}") from error

    def delete(self, names: Sequence[str]) -> None:
        """Delete applications or seats, without waiting for their end. Raises `ClusterError`."""
        try:
            found = serve.status().applications
            for name in found:
                if name in names or app_of(name) in names:
                    serve.delete(name, _blocking=False)
        except RAY_ERRORS as error:
            raise ClusterError(f"cannot delete {', '.join(names)}: {first_line(error)}") from error

    def _deployment(self) -> serve.Deployment:
        module, _, name = self._replica_class.partition(":")
        found = getattr(importlib.import_module(module), name)
        return found if isinstance(found, serve.Deployment) else serve.deployment(found)

    def _targets(self, app: AppSpec, seats: Sequence[Seat] | None) -> list[serve.RunTarget]:
        if seats is None:
            bound = self._bind(app, app.count, {})
            return [
                serve.RunTarget(
                    bound, name=app.name, route_prefix=None, external_scaler_enabled=True
                )
            ]
        return [
            serve.RunTarget(
                self._bind(app, 1, _at(seat)),
                name=seat_name(app.name, seat.number),
                route_prefix=None,
            )
            for seat in seats
        ]

    def _bind(self, app: AppSpec, replicas: int, place: Mapping[str, Any]) -> Any:
        spec = {
            **app.replica.to_dict(),
            "app": app.name,
            "run_dir": f"{self._run_prefix}{app.name[-8:]}",
        }
        options = replica_options(self._env, app.replica.resources)
        options["ray_actor_options"].update(place)
        deployment = self._deployment().options(
            **options, num_replicas=replicas, max_ongoing_requests=100
        )
        return deployment.bind(spec)


def _at(seat: Seat) -> dict[str, Any]:
    """What brings a replica to its seat. Where the node has died, Ray takes any other."""
    if not seat.node:
        return {"num_gpus": seat.num_gpus}
    return {
        "num_gpus": seat.num_gpus,
        "label_selector": {NODE_LABEL: seat.node},
        "fallback_strategy": [{"label_selector": {}}],
    }


def of_seats(seats: Mapping[str, AppStatus]) -> AppStatus:
    """What seats come to: an application has failed where none of its seats has not."""
    phases = {name: s.phase for name, s in seats.items()}
    order = (Phase.STARTING, Phase.RUNNING, Phase.FAILED, Phase.DELETING)
    phase = next(p for p in order if p in phases.values())
    there = [s for s in seats.values() if s.phase is not Phase.DELETING] or list(seats.values())
    message = next((s.message for s in there if s.message), "")
    return AppStatus(phase, message, min(s.since for s in there), phases)


def node_labels() -> dict[str, dict[str, str]]:
    """The labels of every node that is alive, by node id. Raises `ClusterError`."""
    try:
        return {n["NodeID"]: dict(n.get("Labels") or {}) for n in ray.nodes() if n["Alive"]}
    except RAY_ERRORS as error:
        raise ClusterError(f"Ray does not say what nodes there are: {first_line(error)}") from error


def replica_options(env: Mapping[str, str], resources: Mapping[str, float]) -> dict[str, Any]:
    """Deployment options that all our deployments share; `resources` are Ray's, a replica each.

    Replicas take no logical CPU: placement by memory is the controller's business. A wait loop of
    Serve's default 2 s would make every shutdown that long, although Serve sees none of our
    requests.
    """
    actor: dict[str, Any] = {"num_cpus": 0, "resources": dict(resources)}
    if env:
        actor["runtime_env"] = {"env_vars": dict(env)}
    return {
        "ray_actor_options": actor,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": DRAIN_S,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


def _message(app: Any) -> str:
    texts = [app.message, *(d.message for d in app.deployments.values())]
    return next((m for m in (reason(t) for t in texts if t) if m), "")


def reason(text: str) -> str:
    """The sentence in a Serve message: the last exception of a traceback, or the first line."""
    found = _EXCEPTION_LINE.findall(text)
    return f"{found[-1][0]}: {found[-1][1]}" if found else text.strip().splitlines()[0]
