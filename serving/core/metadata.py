"""The bodies of the protocol's health, metadata, configuration and repository index routes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from serving.core.inference import row_limit
from serving.core.routing import Arm
from serving.core.types import Batch, TensorSpec

# In the configuration a BYTES tensor is called a string; every other datatype keeps its name.
_CONFIG_NAMES: Final = {"BYTES": "STRING"}

ModelState = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One version in the repository index. `reason` says why it is not ready, or asleep."""

    name: str
    version: str
    state: ModelState
    reason: str = ""


def server_live(live: bool) -> dict[str, Any]:
    """Body of `GET /v2/health/live`."""
    return {"live": live}


def server_ready(ready: bool) -> dict[str, Any]:
    """Body of `GET /v2/health/ready`."""
    return {"ready": ready}


def model_ready(name: str, ready: bool) -> dict[str, Any]:
    """Body of `GET /v2/models/M[/versions/V]/ready`."""
    return {"name": name, "ready": ready}


def server_metadata(name: str, version: str, extensions: Sequence[str]) -> dict[str, Any]:
    """Body of `GET /v2`."""
    return {"name": name, "version": version, "extensions": list(extensions)}


def model_metadata(arm: Arm, versions: Sequence[str]) -> dict[str, Any]:
    """Body of `GET /v2/models/M[/versions/V]`. `versions` are all that are served."""
    return {
        "name": arm.model,
        "versions": list(versions),
        "platform": arm.platform,
        "inputs": [spec.to_dict() for spec in arm.signature.inputs],
        "outputs": [spec.to_dict() for spec in arm.signature.outputs],
    }


def model_config(arm: Arm) -> dict[str, Any]:
    """Body of `GET /v2/models/M[/versions/V]/config`.

    Dimensions leave out the batch dimension, which `max_batch_size` > 0 implies.
    """
    signature = arm.signature
    batched = signature.batch is not Batch.NONE
    config: dict[str, Any] = {
        "name": arm.model,
        "platform": arm.platform,
        "backend": arm.platform.partition("_")[0],
        "max_batch_size": row_limit(signature, arm.max_size),
        "input": [_config_tensor(spec, batched) for spec in signature.inputs],
        "output": [_config_tensor(spec, batched) for spec in signature.outputs],
        "instance_group": [{"name": arm.model, "kind": "KIND_AUTO", "count": arm.replicas}],
    }
    if batched:
        config["dynamic_batching"] = {
            "preferred_batch_size": list(arm.buckets),
            "max_queue_delay_microseconds": round(arm.max_delay_s * 1e6),
        }
    return config


def _config_tensor(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    data_type = _CONFIG_NAMES.get(spec.datatype, spec.datatype)
    dims = spec.shape[1:] if batched else spec.shape
    return {"name": spec.name, "data_type": f"TYPE_{data_type}", "dims": list(dims)}


def repository_index(entries: Iterable[IndexEntry], ready_only: bool) -> list[dict[str, Any]]:
    """Body of `POST /v2/repository/index`; `ready_only` is the request's `ready`."""
    return [
        {"name": e.name, "version": e.version, "state": e.state, "reason": e.reason}
        for e in entries
        if not ready_only or e.state == "READY"
    ]
