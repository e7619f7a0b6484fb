"""The controller's state as one JSON document, for the command line and the console."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import psutil

from serving import __version__
from serving.config import ServingConfig, reachable_url
from serving.control.controller import Controller
from serving.control.fleet import Replica
from serving.control.totals import ArmTotals, Totals
from serving.core.plan import AppSpec, Phase, ServedModel
from serving.core.rollout_types import Rollout


def status(controller: Controller) -> dict[str, Any]:
    """Everything that `serving status` shows."""
    state = controller.state
    now, tick_s = controller.clock.monotonic(), controller.config.control.tick_s
    live = controller.totals.live(now, tick_s)
    arms = controller.totals.sum(live)
    names = sorted({*state.desired.models, *state.routed.models})
    models = [_model(controller, name, arms) for name in names]
    errors = [
        {
            "app": name,
            "model": app.replica.model,
            "version": app.replica.version,
            "error": state.given_up[name],
        }
        for name, app in state.desired.apps().items()
        if name in state.given_up
    ]
    return {
        "apply": {
            "id": state.apply_id,
            "at": state.applied_at,
            "state": controller.reconciler.outcome,
        },
        "errors": errors,
        "models": models,
        "gateways": _gateways(controller.totals, live),
        "controller": {
            "version": __version__,
            "deployment": controller.deployment,
            "pid": os.getpid(),
            "started_at": controller.started_at,
            "rss_bytes": psutil.Process().memory_info().rss,
            "revision": controller.board.revision,
            "home": str(controller.config.home_dir),
            "last_error": controller.problems.last,
        },
        "urls": urls(controller.config),
    }


def urls(config: ServingConfig) -> dict[str, str]:
    """Where clients and operators of this machine find it."""
    admin = reachable_url(config.control.host, config.control.port)
    return {
        "inference": reachable_url(config.gateway.host, config.gateway.port),
        "admin": admin,
        "metrics": f"{admin}/metrics",
    }


def _gateways(totals: Totals, live: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "gateway": row["gateway"],
            "started_at": row["started_at"],
            "revision": row["revision"],
            "node": row["node"],
            "pid": row["pid"],
            "connections": row["connections"],
        }
        for row in totals.rows(live)
    ]


def _model(
    controller: Controller, name: str, arms: Mapping[tuple[str, str], ArmTotals]
) -> dict[str, Any]:
    state = controller.state
    wanted, routed = state.desired.models.get(name), state.routed.models.get(name)
    default = routed.version if routed else wanted.version if wanted else None
    versions = {*(wanted.versions if wanted else ()), *(routed.versions if routed else ())}
    running = controller.rollouts.of(name)
    return {
        "name": name,
        "version": default,
        "wanted_version": wanted.version if wanted else None,
        "rollout": _rollout(running[0].rollout) if running else None,
        "versions": [
            _version(controller, version, wanted, routed, arms.get((name, version), ArmTotals()))
            for version in sorted(versions, key=int)
        ],
    }


def _rollout(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.id,
        "state": rollout.state.value,
        "step": rollout.step,
        "steps": len(rollout.spec.steps),
        "weight": rollout.weight,
        "stable": rollout.stable,
        "canary": rollout.canary,
        "reason": rollout.reason,
    }


def _version(
    controller: Controller,
    version: str,
    wanted: ServedModel | None,
    routed: ServedModel | None,
    totals: ArmTotals,
) -> dict[str, Any]:
    new = wanted.versions.get(version) if wanted else None
    old = routed.versions.get(version) if routed else None
    served = old or new
    assert served is not None
    target = new or served
    replicas = controller.fleet.of(served.app.name)
    ready = sum(r.state == "ready" for r in replicas)
    latency, batch = totals.histograms.get("latency"), totals.histograms.get("batch_size")
    quantiles = {
        name: latency.quantile(q) if latency else None
        for name, q in (("p50_s", 0.5), ("p90_s", 0.9), ("p99_s", 0.99))
    }
    return {
        "version": version,
        "digest": served.arm.digest,
        "platform": served.arm.platform,
        "device": ", ".join(
            sorted({str(r.info["device"]) for r in replicas if r.info.get("device")})
        ),
        "state": _state(
            controller, served.app, target.app, routed=old is not None, wanted=new is not None
        ),
        "app": served.app.name,
        "replicas": [_replica(controller, r) for r in replicas],
        "ready": ready,
        "wanted": controller.state.wanted(served.app),
        "scaling": _scaling(controller, served.app),
        "requests": totals.total,
        "outcomes": totals.requests,
        "errors": totals.errors,
        "in_flight": totals.in_flight,
        "queue_depth": totals.queue_depth,
        "mean_batch": batch.sum / batch.count if batch and batch.count else None,
        **quantiles,
        "last_error": _last_error(controller, target.app),
    }


def _state(
    controller: Controller, app: AppSpec, target: AppSpec, *, routed: bool, wanted: bool
) -> str:
    ready = len(controller.fleet.endpoints(app.name))
    if not routed:
        return "failed" if target.name in controller.state.given_up else "starting"
    if not wanted:
        return "leaving"
    if target.name != app.name and target.name not in controller.state.given_up:
        return "replacing"
    count = controller.state.wanted(app)
    if ready >= count:
        return "ready" if count else "asleep"
    if not ready and app.scaling is not None and app.scaling.sleeps:
        return "waking"
    return "degraded" if ready else "unavailable"


def _scaling(controller: Controller, app: AppSpec) -> dict[str, Any] | None:
    """Of a version whose replicas follow its load: within which bounds, and why so many."""
    if app.scaling is None:
        return None
    tracked = controller.scaler.tracked(app.name)
    seen = tracked.seen if tracked is not None else None
    return {
        "min": app.scaling.least,
        "max": app.scaling.most,
        "reason": tracked.reason if tracked is not None else "",
        "queue_delay_s": seen.queue_delay_s if seen is not None else None,
        "busy": seen.busy if seen is not None else None,
    }


def _last_error(controller: Controller, app: AppSpec) -> str:
    found = controller.state.given_up.get(app.name) or controller.fleet.error(app.name)
    seen = controller.reconciler.apps.get(app.name)
    if not found and seen is not None and seen.phase in (Phase.FAILED, Phase.RUNNING):
        found = seen.message
    if not found and (why := controller.placer.stays.get(app.name)):
        found = f"it stays on a cordoned GPU: {why}"
    return found


def _replica(controller: Controller, replica: Replica) -> dict[str, Any]:
    keys = ("replica", "node", "pid", "device", "state", "error", "rss_bytes", "load_s")
    age = controller.clock.monotonic() - replica.heard_at
    return {**{k: replica.info.get(k) for k in keys}, "heard_s": round(age, 3)}
