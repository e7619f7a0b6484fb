"""The rollouts that are not over as Prometheus metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from prometheus_client.metrics_core import Metric as Family

from serving.control.controller import Controller
from serving.control.metric_families import family_of
from serving.control.records import Record
from serving.control.rollout_views import arms_summary, shadow_summary
from serving.core.rollout_counts import ARMS
from serving.core.rollout_types import Rollout
from serving.metrics import rollouts as metrics

_LN_10: Final = math.log(10)
_METRICS: Final = (
    metrics.ROLLOUT_STATE,
    metrics.ROLLOUT_WEIGHT,
    metrics.ROLLOUT_EVIDENCE,
    metrics.ROLLOUT_THRESHOLD,
    metrics.ROLLOUT_VERDICT,
    metrics.ROLLOUT_REQUESTS,
    metrics.ROLLOUT_PAIRS,
    metrics.ROLLOUT_LABELS,
    metrics.ROLLOUT_ACCURACY,
    metrics.ROLLOUT_COST,
    metrics.FEEDBACK_FORGOTTEN,
    metrics.ROLLBACK_SECONDS,
)


def rollout_families(controller: Controller) -> Iterator[Family]:
    """Every family of rollouts, with a sample for each that is not over, and the last rollbacks."""
    families = {metric.name: family_of(metric) for metric in _METRICS}
    for record in controller.rollouts.records:
        rollout = record.rollout
        key = (rollout.model, rollout.id)
        _add_state(families, key, rollout)
        _add_verdicts(families, key, rollout)
        _add_counts(families, key, controller, record)
    for model, (rollout_id, took_ms) in controller.rollouts.rollbacks.items():
        families[metrics.ROLLBACK_SECONDS.name].add_metric((model, rollout_id), took_ms / 1000)
    yield from families.values()


def _add_state(families: dict[str, Any], key: tuple[str, str], rollout: Rollout) -> None:
    labels = [*key, rollout.stable, rollout.canary, rollout.state.value]
    families[metrics.ROLLOUT_STATE.name].add_metric(labels, 1.0)
    families[metrics.ROLLOUT_WEIGHT.name].add_metric(key, rollout.weight)


def _add_verdicts(families: dict[str, Any], key: tuple[str, str], rollout: Rollout) -> None:
    evidence, threshold, verdict = (
        families[m.name]
        for m in (
            metrics.ROLLOUT_EVIDENCE,
            metrics.ROLLOUT_THRESHOLD,
            metrics.ROLLOUT_VERDICT,
        )
    )
    for found in rollout.verdicts:
        labels = [*key, found.trigger]
        verdict.add_metric([*labels, found.verdict.value], 1.0)
        if found.log_e is not None:
            evidence.add_metric(labels, found.log_e / _LN_10)
        if found.threshold is not None:
            threshold.add_metric(labels, found.threshold / _LN_10)


def _add_counts(
    families: dict[str, Any], key: tuple[str, str], controller: Controller, record: Record
) -> None:
    requests, pairs, labels, accuracy, cost = (
        families[m.name]
        for m in (
            metrics.ROLLOUT_REQUESTS,
            metrics.ROLLOUT_PAIRS,
            metrics.ROLLOUT_LABELS,
            metrics.ROLLOUT_ACCURACY,
            metrics.ROLLOUT_COST,
        )
    )
    trials, rollout_id = controller.totals.trials, record.rollout.id
    counts = trials.counts(rollout_id)
    summary = arms_summary(counts, controller.ledger.price) or record.arms
    for arm in ARMS if summary else ():
        counted = summary[arm]
        failed, known, wrong = counted["failed"], counted["labels"], counted["wrong"]
        requests.add_metric([*key, arm, "answered"], counted["requests"] - failed)
        requests.add_metric([*key, arm, "failed"], failed)
        labels.add_metric([*key, arm, "right"], known - wrong)
        labels.add_metric([*key, arm, "wrong"], wrong)
        # Absent in what an earlier version of the controller kept.
        if (usd := counted.get("usd_per_1000")) is not None:
            cost.add_metric([*key, arm], usd / 1000)
        if known:
            accuracy.add_metric([*key, arm], 1.0 - wrong / known)
    for outcome, n in trials.totals(rollout_id).items():
        requests.add_metric([*key, "canary", outcome], n)
    forgotten = trials.forgotten(rollout_id)
    families[metrics.FEEDBACK_FORGOTTEN.name].add_metric(key, forgotten)
    shadowed = shadow_summary(counts)
    agreed = shadowed["pairs"] - shadowed["disagreements"]
    for outcome, n in (
        ("agreed", agreed),
        ("disagreed", shadowed["disagreements"]),
        ("dropped", shadowed["dropped"]),
    ):
        pairs.add_metric([*key, outcome], n)
