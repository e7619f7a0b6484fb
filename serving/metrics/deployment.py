"""Metrics of what is served: requests, versions, replicas, gateways and the controller."""

from __future__ import annotations

from typing import Final

from serving.metrics.family import VERSION, Metric

REQUESTS: Final = Metric(
    "serving_requests",
    "counter",
    "Inference requests by outcome: success, cancelled, shielded (another version answered), or an "
    "error's slug.",
    (*VERSION, "outcome"),
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
    VERSION,
)
GATEWAY: Final = Metric(
    "serving_request_gateway_seconds",
    "histogram",
    "Part of the latency of answered requests spent decoding, checking, encoding and in transit.",
    VERSION,
)
QUEUE: Final = Metric(
    "serving_request_queue_seconds",
    "histogram",
    "Part of the latency of answered requests spent waiting for a replica, in gateway and replica.",
    VERSION,
)
COMPUTE: Final = Metric(
    "serving_request_compute_seconds",
    "histogram",
    "Part of the latency of answered requests during which their batch ran on the model.",
    VERSION,
)
BATCH_SIZE: Final = Metric(
    "serving_batch_rows", "histogram", "Rows per batch that a gateway sent to a replica.", VERSION
)
QUEUE_DEPTH: Final = Metric(
    "serving_queue_depth", "gauge", "Requests waiting for a replica now.", VERSION
)
IN_FLIGHT: Final = Metric(
    "serving_requests_in_flight", "gauge", "Requests at a replica now.", VERSION
)
REPLICAS: Final = Metric(
    "serving_replicas",
    "gauge",
    "Replicas by state: wanted, starting, ready, draining, failed.",
    (*VERSION, "state"),
)
SCALING_QUEUE_DELAY: Final = Metric(
    "serving_scaling_queue_delay_seconds",
    "gauge",
    "Of versions that are scaled: how long 95 % of requests wait of late; 0 without any.",
    VERSION,
)
SCALING_BUSY: Final = Metric(
    "serving_scaling_busy_replicas",
    "gauge",
    "Of versions that are scaled: run time of all replicas over the time that passed.",
    VERSION,
)
REPLICA_RSS: Final = Metric(
    "serving_replica_resident_memory_bytes",
    "gauge",
    "Resident memory of a replica's process.",
    (*VERSION, "replica"),
)
REPLICA_LOAD: Final = Metric(
    "serving_replica_load_seconds",
    "gauge",
    "What a replica took to load, check and warm its model.",
    (*VERSION, "replica"),
)
REPLICA_OOM: Final = Metric(
    "serving_replica_out_of_memory_batches",
    "counter",
    "Batches that ran out of memory since the replica was ready, whatever became of them.",
    (*VERSION, "replica"),
)
MODEL_INFO: Final = Metric(
    "serving_model_info",
    "info",
    "The artifact behind a version: digest, platform, device, and whether it is the default.",
    (*VERSION, "digest", "platform", "device", "default"),
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
    SCALING_QUEUE_DELAY,
    SCALING_BUSY,
    REPLICA_RSS,
    REPLICA_LOAD,
    REPLICA_OOM,
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
