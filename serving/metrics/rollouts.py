"""Metrics of rollouts, and of the labels that come after their answers."""

from __future__ import annotations

from typing import Final

from serving.metrics.family import Metric

_ROLLOUT: Final = ("model", "rollout")
ROLLOUT_STATE: Final = Metric(
    "serving_rollout_state",
    "gauge",
    "1 for the state that a rollout is in. Rollouts that are not over, and those that keep the "
    "previous version warm.",
    (*_ROLLOUT, "stable", "canary", "state"),
)
ROLLOUT_WEIGHT: Final = Metric(
    "serving_rollout_weight", "gauge", "The canary's share of requests, 0 to 1.", _ROLLOUT
)
ROLLOUT_EVIDENCE: Final = Metric(
    "serving_rollout_evidence",
    "gauge",
    "Evidence against the canary by trigger, as a power of ten.",
    (*_ROLLOUT, "trigger"),
)
ROLLOUT_THRESHOLD: Final = Metric(
    "serving_rollout_evidence_threshold",
    "gauge",
    "The evidence at which a trigger takes the canary back or pauses, as a power of ten.",
    (*_ROLLOUT, "trigger"),
)
ROLLOUT_VERDICT: Final = Metric(
    "serving_rollout_verdict",
    "gauge",
    "1 for the verdict of each trigger: pass, hold, unknown or fail.",
    (*_ROLLOUT, "trigger", "verdict"),
)
ROLLOUT_REQUESTS: Final = Metric(
    "serving_rollout_requests",
    "counter",
    "Analysed requests by arm and outcome: answered or failed. Beside them, under arm canary: "
    "shielded (answered by stable), overridden (by header) and diverted (the canary could not take "
    "it). Where units stick to their arm, units instead of requests.",
    (*_ROLLOUT, "arm", "outcome"),
)
ROLLOUT_PAIRS: Final = Metric(
    "serving_rollout_shadow_pairs",
    "counter",
    "Copies of requests by what came of them: agreed, disagreed or dropped.",
    (*_ROLLOUT, "outcome"),
)
ROLLOUT_LABELS: Final = Metric(
    "serving_rollout_labels",
    "counter",
    "Labels that were joined to an answer, by arm and whether the answer was right or wrong.",
    (*_ROLLOUT, "arm", "outcome"),
)
ROLLOUT_ACCURACY: Final = Metric(
    "serving_rollout_accuracy",
    "gauge",
    "The share of labelled answers that were right, by arm.",
    (*_ROLLOUT, "arm"),
)
ROLLOUT_COST: Final = Metric(
    "serving_rollout_usd_per_inference",
    "gauge",
    "Direct cost of an inference by arm; absent where a price is not known. A small share of "
    "traffic runs in small batches, and so costs more.",
    (*_ROLLOUT, "arm"),
)
ROLLBACK_SECONDS: Final = Metric(
    "serving_rollback_seconds",
    "gauge",
    "How long a model's last rollback took from its verdict until the last gateway had confirmed "
    "the routes without the version.",
    _ROLLOUT,
)
FEEDBACK_PENDING: Final = Metric(
    "serving_feedback_pending", "gauge", "Labels that no gateway has joined to an answer yet."
)
FEEDBACK_DROPPED: Final = Metric(
    "serving_feedback_dropped",
    "counter",
    "Labels that were dropped for later ones, being too many.",
)
FEEDBACK_FORGOTTEN: Final = Metric(
    "serving_feedback_forgotten",
    "counter",
    "Answers that gateways forgot before `feedback.window` was over, being more than "
    "`feedback.max_entries`: labels of such old ones are not joined.",
    _ROLLOUT,
)

METRICS: Final = (
    ROLLOUT_STATE,
    ROLLOUT_WEIGHT,
    ROLLOUT_EVIDENCE,
    ROLLOUT_THRESHOLD,
    ROLLOUT_VERDICT,
    ROLLOUT_REQUESTS,
    ROLLOUT_PAIRS,
    ROLLOUT_LABELS,
    ROLLOUT_ACCURACY,
    ROLLOUT_COST,
    ROLLBACK_SECONDS,
    FEEDBACK_PENDING,
    FEEDBACK_DROPPED,
    FEEDBACK_FORGOTTEN,
)
