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
SCALING_QUEUE_DELAY: Final = Metric(
    "serving_scaling_queue_delay_seconds",
    "gauge",
    "Of versions that are scaled: how long 95 % of requests wait of late; 0 without any.",
    _VERSION,
)
SCALING_BUSY: Final = Metric(
    "serving_scaling_busy_replicas",
    "gauge",
    "Of versions that are scaled: run time of all replicas over the time that passed.",
    _VERSION,
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

_GPU: Final = ("gpu", "host")
GPU_INFO: Final = Metric(
    "serving_gpu_info",
    "info",
    "A GPU, or a MIG slice of the one in `mig_parent`. `gpu` is the UUID, `index` that of NVML.",
    (*_GPU, "name", "index", "mig_parent"),
)
GPU_MEMORY_TOTAL: Final = Metric("serving_gpu_memory_total_bytes", "gauge", "Memory.", _GPU)
GPU_MEMORY_USED: Final = Metric(
    "serving_gpu_memory_used_bytes",
    "gauge",
    "Memory that processes use; with what the driver reserves where it tells only the sum.",
    _GPU,
)
GPU_MEMORY_RESERVED: Final = Metric(
    "serving_gpu_memory_reserved_bytes", "gauge", "Memory that driver and firmware keep.", _GPU
)
GPU_MEMORY_LEASED: Final = Metric(
    "serving_gpu_memory_leased_bytes", "gauge", "Memory that replicas were given.", _GPU
)
GPU_UTILIZATION: Final = Metric(
    "serving_gpu_utilization",
    "gauge",
    "The share of the last measurement period in which a kernel ran, 0 to 1. None under MIG.",
    _GPU,
)
GPU_POWER: Final = Metric("serving_gpu_power_watts", "gauge", "Power draw.", _GPU)
GPU_POWER_LIMIT: Final = Metric(
    "serving_gpu_power_limit_watts", "gauge", "Power draw that is allowed.", _GPU
)
GPU_ENERGY: Final = Metric(
    "serving_gpu_energy_joules", "counter", "Energy used since the driver was loaded.", _GPU
)
GPU_TEMPERATURE: Final = Metric(
    "serving_gpu_temperature_celsius", "gauge", "Temperature of the chip.", _GPU
)
GPU_THROTTLED: Final = Metric(
    "serving_gpu_throttled",
    "gauge",
    "1 for each reason that holds the clocks back.",
    (*_GPU, "reason"),
)
GPU_ECC: Final = Metric(
    "serving_gpu_ecc_uncorrected_errors",
    "counter",
    "Memory errors that ECC could not correct, since the driver was loaded.",
    _GPU,
)
GPU_REMAPPED: Final = Metric(
    "serving_gpu_remapped_rows", "gauge", "Memory rows that were replaced by spare ones.", _GPU
)
GPU_HEALTH: Final = Metric(
    "serving_gpu_health",
    "gauge",
    "1 for the health of each GPU: ok, throttled, unknown, degraded or failed.",
    (*_GPU, "health"),
)
GPU_CORDONED: Final = Metric(
    "serving_gpu_cordoned", "gauge", "1 if nothing new may start on the GPU, else 0.", _GPU
)
GPU_REPLICAS: Final = Metric("serving_gpu_replicas", "gauge", "Replicas that run on the GPU.", _GPU)
GPU_XIDS: Final = Metric(
    "serving_gpu_xid_errors",
    "counter",
    "Errors that the driver reported, by number, since the controller started.",
    ("gpu", "xid"),
)

_NV: Final = ("gpu_uuid",)
NV_UTILIZATION: Final = Metric(
    "nv_gpu_utilization", "gauge", "serving_gpu_utilization under Triton's name.", _NV
)
NV_POWER: Final = Metric(
    "nv_gpu_power_usage", "gauge", "serving_gpu_power_watts under Triton's name.", _NV
)
NV_POWER_LIMIT: Final = Metric(
    "nv_gpu_power_limit", "gauge", "serving_gpu_power_limit_watts under Triton's name.", _NV
)
NV_MEMORY_USED: Final = Metric(
    "nv_gpu_memory_used_bytes",
    "gauge",
    "serving_gpu_memory_used_bytes under Triton's name.",
    _NV,
)
NV_MEMORY_TOTAL: Final = Metric(
    "nv_gpu_memory_total_bytes",
    "gauge",
    "serving_gpu_memory_total_bytes under Triton's name.",
    _NV,
)
# A counter by what it counts, but its name lacks the ending that counters must have here.
NV_ENERGY: Final = Metric(
    "nv_energy_consumption",
    "gauge",
    "serving_gpu_energy_joules_total under Triton's name, which has no _total.",
    _NV,
)

_ACCOUNT: Final = (*_VERSION, "tenant", "device", "kind")
COST: Final = Metric(
    "serving_cost_usd",
    "counter",
    "What everything has cost by kind: direct, padding, failed, shadow, warmup, idle, unallocated. "
    "Only what has a price.",
    _ACCOUNT,
)
COST_SECONDS: Final = Metric(
    "serving_cost_device_seconds", "counter", "The device time behind each cost.", _ACCOUNT
)
COST_UNPRICED: Final = Metric(
    "serving_cost_unpriced_seconds",
    "counter",
    "Device time whose price is not known, and which is in no cost.",
    _ACCOUNT,
)
COST_REQUESTS: Final = Metric(
    "serving_cost_requests", "counter", "Requests that a cost was for.", _ACCOUNT
)
COST_ENERGY: Final = Metric(
    "serving_cost_energy_joules",
    "counter",
    "Energy by share of a GPU's time; an estimate. Absent where it is not measured.",
    _ACCOUNT,
)
COST_EMISSIONS: Final = Metric(
    "serving_cost_emissions_grams",
    "counter",
    "CO2 equivalent of that energy, by cost.grid_gco2e_per_kwh; an estimate.",
    _ACCOUNT,
)
COST_PRICE: Final = Metric(
    "serving_replica_price_usd_per_hour",
    "gauge",
    "What a replica costs an hour; absent where it is not known.",
    (*_VERSION, "replica"),
)

TENANT_BUDGET: Final = Metric(
    "serving_tenant_budget_usd",
    "gauge",
    "What a tenant may spend a UTC day; absent without a bound.",
    ("tenant",),
)
TENANT_SPENT: Final = Metric(
    "serving_tenant_spent_usd",
    "gauge",
    "Direct cost of a tenant since midnight UTC, of tenants with a budget.",
    ("tenant",),
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
    ROLLOUT_COST,
    ROLLBACK_SECONDS,
    FEEDBACK_PENDING,
    FEEDBACK_DROPPED,
    FEEDBACK_FORGOTTEN,
    GPU_INFO,
    GPU_MEMORY_TOTAL,
    GPU_MEMORY_USED,
    GPU_MEMORY_RESERVED,
    GPU_MEMORY_LEASED,
    GPU_UTILIZATION,
    GPU_POWER,
    GPU_POWER_LIMIT,
    GPU_ENERGY,
    GPU_TEMPERATURE,
    GPU_THROTTLED,
    GPU_ECC,
    GPU_REMAPPED,
    GPU_HEALTH,
    GPU_CORDONED,
    GPU_REPLICAS,
    GPU_XIDS,
    COST,
    COST_SECONDS,
    COST_UNPRICED,
    COST_REQUESTS,
    COST_ENERGY,
    COST_EMISSIONS,
    COST_PRICE,
    TENANT_BUDGET,
    TENANT_SPENT,
    NV_UTILIZATION,
    NV_POWER,
    NV_POWER_LIMIT,
    NV_MEMORY_USED,
    NV_MEMORY_TOTAL,
    NV_ENERGY,
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
