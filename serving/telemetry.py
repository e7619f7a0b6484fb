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
    "Inference requests by outcome: success, cancelled, or an error's slug.",
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
