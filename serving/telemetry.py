"""Logging set-up and the names of every metric, in one place."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import Any, Final, Literal, TextIO


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family. Durations are seconds, sizes bytes or rows, as the name says."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()


_VERSION: Final = ("model", "version")

REQUESTS: Final = Metric(
    "serving_requests",
    "counter",
    "Inference requests by outcome: success, cancelled, shielded (another version answered), or an "
    "error's slug.",
    (*_VERSION, "outcome"),
)
UNROUTED: Final = Metric(
    "serving_unrouted_requests",
    "counter",
    "Requests that ended before a model was found for them, by error slug.",
    ("outcome",),
)
CONNECTIONS: Final = Metric(
    "serving_gateway_connections", "gauge", "Open client connections of a gateway.", ("gateway",)
)
LATENCY: Final = Metric(
    "serving_request_latency_seconds",
    "histogram",
    "Time from a request's last byte to its answer, whatever the outcome.",
    _VERSION,
)
GATEWAY: Final = Metric(
    "serving_request_gateway_seconds",
    "histogram",
    "Part of the latency of answered requests spent decoding, checking, encoding and in transit.",
    _VERSION,
)
QUEUE: Final = Metric(
    "serving_request_queue_seconds",
    "histogram",
    "Part of the latency of answered requests spent waiting for a replica, in gateway and replica.",
    _VERSION,
)
COMPUTE: Final = Metric(
    "serving_request_compute_seconds",
    "histogram",
    "Part of the latency of answered requests during which their batch ran on the model.",
    _VERSION,
)
BATCH_SIZE: Final = Metric(
    "serving_batch_rows", "histogram", "Rows per batch that a gateway sent to a replica.", _VERSION
)
QUEUE_DEPTH: Final = Metric(
    "serving_queue_depth", "gauge", "Requests waiting for a replica now.", _VERSION
)
IN_FLIGHT: Final = Metric(
    "serving_requests_in_flight", "gauge", "Requests at a replica now.", _VERSION
)
REPLICAS: Final = Metric(
    "serving_replicas",
    "gauge",
    "Replicas by state: wanted, starting, ready, draining, failed.",
    (*_VERSION, "state"),
)
REPLICA_RSS: Final = Metric(
    "serving_replica_resident_memory_bytes",
    "gauge",
    "Resident memory of a replica's process.",
    (*_VERSION, "replica"),
)
REPLICA_LOAD: Final = Metric(
    "serving_replica_load_seconds",
    "gauge",
    "What a replica took to load, check and warm its model.",
    (*_VERSION, "replica"),
)
MODEL_INFO: Final = Metric(
    "serving_model_info",
    "info",
    "The artifact behind a version: digest, platform, device, and whether it is the default.",
    (*_VERSION, "digest", "platform", "device", "default"),
)
BUILD_INFO: Final = Metric(
    "serving_build_info", "info", "Versions of this software.", ("version", "python", "ray")
)
GATEWAYS: Final = Metric("serving_gateways", "gauge", "Gateways that reported lately.")
GATEWAY_REVISION: Final = Metric(
    "serving_gateway_route_revision",
    "gauge",
    "Revision of the route table that a gateway has applied.",
    ("gateway",),
)
ROUTE_REVISION: Final = Metric(
    "serving_route_revision", "gauge", "Revision of the route table that the controller published."
)
CONVERGED: Final = Metric(
    "serving_converged", "gauge", "1 if what runs is what the last apply asked for, else 0."
)
CONTROLLER_START: Final = Metric(
    "serving_controller_start_time_seconds", "gauge", "When the controller started, Unix time."
)
CONTROLLER_RSS: Final = Metric(
    "serving_controller_resident_memory_bytes", "gauge", "Resident memory of the controller."
)
RECONCILE_ERRORS: Final = Metric(
    "serving_reconcile_errors",
    "counter",
    "Ticks of the controller that ended in an error and were repeated.",
)

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
    "shielded (answered by stable), overridden (by header) and diverted (canary not ready).",
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
FEEDBACK_PENDING: Final = Metric(
    "serving_feedback_pending", "gauge", "Labels that no gateway has joined to an answer yet."
)

METRICS: Final = (
    REQUESTS,
    UNROUTED,
    CONNECTIONS,
    LATENCY,
    GATEWAY,
    QUEUE,
    COMPUTE,
    BATCH_SIZE,
    QUEUE_DEPTH,
    IN_FLIGHT,
    REPLICAS,
    REPLICA_RSS,
    REPLICA_LOAD,
    MODEL_INFO,
    BUILD_INFO,
    GATEWAYS,
    GATEWAY_REVISION,
    ROUTE_REVISION,
    CONVERGED,
    CONTROLLER_START,
    CONTROLLER_RSS,
    RECONCILE_ERRORS,
    ROLLOUT_STATE,
    ROLLOUT_WEIGHT,
    ROLLOUT_EVIDENCE,
    ROLLOUT_THRESHOLD,
    ROLLOUT_VERDICT,
    ROLLOUT_REQUESTS,
    ROLLOUT_PAIRS,
    ROLLOUT_LABELS,
    ROLLOUT_ACCURACY,
    FEEDBACK_PENDING,
)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and `extra` fields."""

    _STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        body: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        body |= {k: v for k, v in vars(record).items() if k not in self._STANDARD}
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


def configure_logging(stream: TextIO | None = None) -> None:
    """Send the `serving` loggers to `stream`, by default stderr.

    SERVING_LOG chooses plain (default) or json, SERVING_LOG_LEVEL the level (default info).

    Other libraries' loggers are left as they are. Calling it again replaces the handler.
    """
    # Not sys.stderr: in a replica, Serve has put a logger of its own there, which drops ours.
    handler = logging.StreamHandler(stream or sys.__stderr__ or sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    as_json = os.environ.get("SERVING_LOG", "plain") == "json"
    handler.setFormatter(JsonFormatter() if as_json else plain)
    logger = logging.getLogger("serving")
    logger.handlers = [handler]
    logger.propagate = False
    level = os.environ.get("SERVING_LOG_LEVEL", "info").upper()
    logger.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
