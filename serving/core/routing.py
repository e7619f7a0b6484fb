"""The route table: what a gateway needs to answer for a model, as frozen data with a JSON form.

The controller builds it, gateways long-poll it. A table is replaced whole; nothing in it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.core.types import Signature


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One replica's frame socket.

    `node` is the Ray node id. A gateway on the same node uses `unix` (a path), any other `tcp`
    ("host:port", mutual TLS; empty where the replica listens on this node only).
    """

    replica: str
    node: str
    unix: str
    tcp: str = ""


@dataclass(frozen=True, slots=True)
class Arm:
    """One version that may answer, with its limits. Durations are seconds.

    `usd_per_hour` is the configured price of a replica, `prices` those by replica where it has
    none. With a `wake_queue` it may have no replica at all: so many requests wait for one.
    """

    model: str
    version: str
    digest: str
    platform: str
    signature: Signature
    endpoints: tuple[Endpoint, ...] = ()
    role: str = "stable"
    max_size: int = 64
    max_delay_s: float = 0.0
    buckets: tuple[int, ...] = ()
    queue_max_rows: int = 8192
    queue_max_wait_s: float = 2.0
    queue_hold_s: float = 15.0
    timeout_s: float = 30.0
    usd_per_hour: float | None = None
    replicas: int = 1
    wake_queue: int = 0
    prices: Mapping[str, float] = field(default_factory=dict)

    def price(self, replica: str) -> float | None:
        """What a replica costs, in USD an hour; None if its price is not known."""
        return self.prices.get(replica) if self.usd_per_hour is None else self.usd_per_hour


@dataclass(frozen=True, slots=True)
class Split:
    """How a rollout divides a model's requests between its stable version and `canary`.

    `weight` and `shadow` are shares (0..1): of requests that the canary answers, and of those that
    stable answered that are copied to it. An `epoch` is a period in which neither changes.
    `unit` is what sticks to an arm ("request", "header:NAME", "cookie:NAME", "parameter:NAME");
    `overrides` are (header, value, arm), header names in lower case. `compare` and `feedback` say
    how answers and labels are judged; `observe` asks for counts of what was predicted. An answer
    that takes longer than `latency_bound_s` is slow; None: that is not known yet.
    """

    rollout: str
    epoch: int
    canary: str
    weight: float
    salt: str
    unit: str = "request"
    overrides: tuple[tuple[str, str, str], ...] = ()
    shield: bool = True
    breaker_failures: int = 8
    shadow: float = 0.0
    compare: Mapping[str, Any] = field(default_factory=dict)
    feedback: Mapping[str, Any] = field(default_factory=dict)
    observe: bool = False
    latency_bound_s: float | None = None


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """A served model: `version` answers requests that name none; `arms` maps version to arm.

    With a `split`, `version` is the stable arm.
    """

    name: str
    version: str
    arms: Mapping[str, Arm]
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class RouteTable:
    """All served models at one revision. Revisions only grow.

    `complete` says that every version of a configuration has been routed since the deployment
    began: before that a gateway is not ready. What is applied later makes it no less ready.
    """

    revision: int = 0
    models: Mapping[str, ModelRoute] = field(default_factory=dict)
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the wire and the store."""
        return {
            "revision": self.revision,
            "complete": self.complete,
            "models": [
                {
                    "name": m.name,
                    "version": m.version,
                    "arms": [_arm_to_dict(a) for a in m.arms.values()],
                    "split": None if m.split is None else _split_to_dict(m.split),
                }
                for m in self.models.values()
            ],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RouteTable:
        """Read `to_dict`'s form, as our own controller writes it: a malformed table is a bug."""
        models = {}
        for m in raw["models"]:
            arms = {a["version"]: _arm_from_dict(a) for a in m["arms"]}
            # Nor does it know of splits.
            split = _split_from_dict(m["split"]) if m.get("split") else None
            models[m["name"]] = ModelRoute(m["name"], m["version"], arms, split)
        # A stored table of an earlier version does not say.
        return cls(int(raw["revision"]), models, bool(raw.get("complete", True)))


def _split_to_dict(split: Split) -> dict[str, Any]:
    raw = {name: getattr(split, name) for name in Split.__dataclass_fields__}
    return {**raw, "overrides": [list(o) for o in split.overrides]}


def _split_from_dict(raw: Mapping[str, Any]) -> Split:
    overrides = tuple((str(n), str(v), str(arm)) for n, v, arm in raw["overrides"])
    return Split(**{**raw, "overrides": overrides})


def _arm_to_dict(arm: Arm) -> dict[str, Any]:
    raw = {name: getattr(arm, name) for name in Arm.__dataclass_fields__}
    raw["signature"] = arm.signature.to_dict()
    raw["buckets"] = list(arm.buckets)
    raw["prices"] = dict(arm.prices)
    raw["endpoints"] = [
        {n: getattr(e, n) for n in Endpoint.__dataclass_fields__} for e in arm.endpoints
    ]
    return raw


def _arm_from_dict(raw: Mapping[str, Any]) -> Arm:
    return Arm(
        **{
            **raw,
            "signature": Signature.from_dict(raw["signature"]),
            "buckets": tuple(raw["buckets"]),
            "endpoints": tuple(Endpoint(**e) for e in raw["endpoints"]),
        }
    )
