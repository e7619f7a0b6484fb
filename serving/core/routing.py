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
    """One version that may answer, with its limits. Durations are seconds."""

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


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """A served model: `version` answers requests that name none; `arms` maps version to arm."""

    name: str
    version: str
    arms: Mapping[str, Arm]


@dataclass(frozen=True, slots=True)
class RouteTable:
    """All served models at one revision. Revisions only grow."""

    revision: int = 0
    models: Mapping[str, ModelRoute] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the wire and the store."""
        return {
            "revision": self.revision,
            "models": [
                {
                    "name": m.name,
                    "version": m.version,
                    "arms": [_arm_to_dict(a) for a in m.arms.values()],
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
            models[m["name"]] = ModelRoute(m["name"], m["version"], arms)
        return cls(int(raw["revision"]), models)


def _arm_to_dict(arm: Arm) -> dict[str, Any]:
    raw = {name: getattr(arm, name) for name in Arm.__dataclass_fields__}
    raw["signature"] = arm.signature.to_dict()
    raw["buckets"] = list(arm.buckets)
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
