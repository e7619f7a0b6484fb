"""The controller's state as Prometheus metrics, made when it is scraped."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from serving import __version__
from serving.control.controller import Controller
from serving.control.cost_metrics import budget_families
from serving.control.gpu_metrics import gpu_families
from serving.control.metric_families import family_of
from serving.control.rollout_metrics import rollout_families
from serving.control.totals import Histogram
from serving.core.plan import AppSpec
from serving.metrics import deployment as metrics
from serving.metrics import rollouts

_HISTOGRAMS: Final = {
    "latency": metrics.LATENCY,
    "gateway": metrics.GATEWAY,
    "queue": metrics.QUEUE,
    "compute": metrics.COMPUTE,
    "batch_size": metrics.BATCH_SIZE,
}


def exposition(controller: Controller, ray_version: str) -> bytes:
    """Every metric in the Prometheus text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(controller, ray_version))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, controller: Controller, ray_version: str) -> None:
        self._controller = controller
        self._ray_version = ray_version

    def collect(self) -> Iterator[Family]:
        yield from self._traffic()
        yield from self._replicas()
        yield from rollout_families(self._controller)
        yield from gpu_families(self._controller.gpus)
        yield from budget_families(self._controller.budget_rows())
        yield from self._controller.cost_metrics.families(
            self._controller.ledger.totals,
            self._controller.ledger.prices,
            self._controller.config.cost.grid_gco2e_per_kwh,
        )
        yield from self._deployment()

    def _traffic(self) -> Iterator[Family]:
        controller = self._controller
        live = controller.totals.live(
            controller.clock.monotonic(), controller.config.control.tick_s
        )
        arms = controller.totals.sum(live)
        requests, depth, in_flight = (
            family_of(m) for m in (metrics.REQUESTS, metrics.QUEUE_DEPTH, metrics.IN_FLIGHT)
        )
        histograms = {name: family_of(metric) for name, metric in _HISTOGRAMS.items()}
        for key, arm in sorted(arms.items()):
            for outcome, n in sorted(arm.requests.items()):
                requests.add_metric([*key, outcome], n)
            depth.add_metric(key, arm.queue_depth)
            in_flight.add_metric(key, arm.in_flight)
            for name, histogram in arm.histograms.items():
                histograms[name].add_metric(key, _buckets(histogram), sum_value=histogram.sum)
        unrouted = family_of(metrics.UNROUTED)
        for outcome, n in sorted(controller.totals.unrouted().items()):
            unrouted.add_metric([outcome], n)
        yield from (requests, unrouted, *histograms.values(), depth, in_flight)

    def _replicas(self) -> Iterator[Family]:
        controller = self._controller
        states, rss, load, oom = map(
            family_of,
            (metrics.REPLICAS, metrics.REPLICA_RSS, metrics.REPLICA_LOAD, metrics.REPLICA_OOM),
        )
        counts: Counter[tuple[str, str, str]] = Counter()
        desired, routed = controller.state.desired.apps(), controller.state.routed.apps()
        for name, app in {**routed, **desired}.items():
            key = (app.replica.model, app.replica.version)
            replicas = controller.fleet.of(name)
            found = Counter(r.state for r in replicas)
            wanted = controller.state.wanted(app)
            counts[*key, "wanted"] += wanted if name in desired else 0
            counts[*key, "starting"] += max(0, wanted - found["ready"])
            for state in ("ready", "draining", "failed"):
                counts[*key, state] += found[state]
            for r in replicas:
                labels = [*key, r.endpoint.replica]
                rss.add_metric(labels, float(r.info.get("rss_bytes") or 0))
                load.add_metric(labels, float(r.info.get("load_s") or 0))
                oom.add_metric(labels, float(r.info.get("oom_batches") or 0))
        for triple, n in sorted(counts.items()):
            states.add_metric(triple, n)
        yield from (states, rss, load, oom, self._models(), *self._scaling({**routed, **desired}))

    def _scaling(self, apps: Mapping[str, AppSpec]) -> tuple[Family, Family]:
        delay, busy = family_of(metrics.SCALING_QUEUE_DELAY), family_of(metrics.SCALING_BUSY)
        for name, app in sorted(apps.items()):
            tracked = self._controller.scaler.tracked(name)
            if tracked is None or tracked.seen is None:
                continue
            key = (app.replica.model, app.replica.version)
            delay.add_metric(key, tracked.seen.queue_delay_s or 0.0)
            busy.add_metric(key, tracked.seen.busy or 0.0)
        return delay, busy

    def _models(self) -> Family:
        controller = self._controller
        info: InfoMetricFamily = family_of(metrics.MODEL_INFO)
        # What is routed says what answers; what is only desired is on its way.
        models = {**controller.state.desired.models, **controller.state.routed.models}
        for name, model in sorted(models.items()):
            for version, served in sorted(model.versions.items()):
                replicas = controller.fleet.of(served.app.name)
                devices = {str(r.info["device"]) for r in replicas if r.info.get("device")}
                facts = {
                    "digest": served.arm.digest,
                    "platform": served.arm.platform,
                    "device": ",".join(sorted(devices)),
                    "default": str(model.version == version).lower(),
                }
                info.add_metric([name, version], facts)
        return info

    def _deployment(self) -> Iterator[Family]:
        controller = self._controller
        live = controller.totals.live(
            controller.clock.monotonic(), controller.config.control.tick_s
        )
        revisions, connections = (
            family_of(m) for m in (metrics.GATEWAY_REVISION, metrics.CONNECTIONS)
        )
        for row in controller.totals.rows(live):
            revisions.add_metric([str(row["gateway"])], int(row["revision"]))
            connections.add_metric([str(row["gateway"])], int(row["connections"]))
        build = family_of(metrics.BUILD_INFO)
        build.add_metric(
            [],
            {
                "version": __version__,
                "python": platform.python_version(),
                "ray": self._ray_version,
            },
        )
        values = {
            metrics.GATEWAYS: len(live),
            metrics.ROUTE_REVISION: controller.board.revision,
            metrics.CONVERGED: float(controller.reconciler.outcome == "converged"),
            metrics.CONTROLLER_START: controller.started_at,
            metrics.CONTROLLER_RSS: psutil.Process().memory_info().rss,
            metrics.RECONCILE_ERRORS: controller.problems.count,
            rollouts.FEEDBACK_PENDING: len(controller.feedback),
            rollouts.FEEDBACK_DROPPED: controller.feedback.dropped,
        }
        yield from (revisions, connections, build)
        for metric, value in values.items():
            family = family_of(metric)
            family.add_metric([], value)
            yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    total, rows = 0, []
    for bound, n in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += n
        rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(total)))
    return rows
