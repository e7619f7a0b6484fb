"""What one model replica is told to load and how to serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class GpuLease:
    """The share of one GPU that a replica may use, as the controller grants it.

    `uuid` is the GPU's (or MIG device's), `bytes` the most that the replica's process may hold of
    its `total_bytes`, everything included. `ceiling` is the most rows a run that this version has
    been seen to fit on this type of device, None where nothing has run out of memory.
    """

    id: str
    uuid: str
    bytes: int
    total_bytes: int
    ceiling: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON form that `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GpuLease:
        """Read `to_dict`'s form. Raises `TypeError` on an unknown or missing field."""
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """The settings of one replica of a model version: plain JSON that can travel to any node.

    `home` is the node's state directory (the artifact cache lies in it), `run_dir` the directory of
    unix sockets. `buckets` are the row counts that a batch is padded up to (None: the engine's
    default). `onnx` and `torch` hold the fields of `OnnxConfig` and `TorchConfig`. `listen_tcp`
    adds a TCP socket with mutual TLS on `node_host`, for gateways on other nodes. `app` is the
    Serve application, announced as it is given. `resources` are the Ray resources that choose the
    node. `gpu_memory_bytes` is the GPU memory that a replica gets, None for what was measured.
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
    gpu_memory_bytes: int | None = None

    def cores(self, there: int) -> int:
        """The CPU cores that it is charged for: its runtime's threads; of 0, `there`, all of them.

        Those of ONNX Runtime are the threads inside of operators, and one more for each operator
        that may run beside the first.
        """
        inside = int(self.torch.get("threads", self.onnx.get("intra_op_threads", 1)))
        beside = int(self.onnx.get("inter_op_threads", 1)) - 1
        return (inside or there) + beside

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
