"""What one model replica is told to load and how to serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """The settings of one replica of a model version: plain JSON that can travel to any node.

    `home` is the node's state directory (the artifact cache lies in it), `run_dir` the directory of
    unix sockets. `buckets` are the row counts that a batch is padded up to (None: the engine's
    default). `onnx` and `torch` hold the fields of `OnnxConfig` and `TorchConfig`. `listen_tcp`
    adds a TCP socket with mutual TLS on `node_host`, for gateways on other nodes. `app` is the
    Serve application, announced as it is given. `resources` are the Ray resources that choose the
    node.
    """

    model: str
    version: str
    digest: str
    home: str
    run_dir: str
    device: str = "auto"
    max_size: int = 64
    buckets: tuple[int, ...] | None = None
    onnx: Mapping[str, Any] = field(default_factory=dict)
    torch: Mapping[str, Any] = field(default_factory=dict)
    stall_timeout_s: float = 30.0
    listen_tcp: bool = False
    node_host: str = ""
    app: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON form that `from_dict` reads."""
        raw = asdict(self)
        raw["buckets"] = None if self.buckets is None else list(self.buckets)
        raw["onnx"], raw["torch"] = dict(self.onnx), dict(self.torch)
        raw["resources"] = dict(self.resources)
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ReplicaSpec:
        """Read `to_dict`'s form. Raises `TypeError` on an unknown or missing field."""
        buckets = raw.get("buckets")
        return cls(**{**raw, "buckets": None if buckets is None else tuple(buckets)})
