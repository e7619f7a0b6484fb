"""From a configuration to the layout it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from serving.artifacts import ONNX_PLATFORM
from serving.config import ServingConfig
from serving.control.state import Resolved
from serving.core.plan import AppSpec, Layout, ServedModel, ServedVersion
from serving.core.replica import ReplicaSpec
from serving.core.routing import Arm
from serving.core.types import Batch
from serving.errors import ConflictError

Pins = Mapping[tuple[str, str], Resolved]

# Their URLs may hold a password, and keys' hashes are nobody else's business: not shown.
_SECRET: Final = frozenset({"store", "registry", "tenants"})


def references(config: ServingConfig) -> list[tuple[str, str]]:
    """Every (model, reference) of the configuration."""
    return [
        (name, ref)
        for name, model in config.models.items()
        for ref in (model.version, *model.also_serve)
    ]


def build_layout(config: ServingConfig, pins: Pins, *, listen_tcp: bool) -> Layout:
    """The layout that `config` asks for, its references replaced by `pins`."""
    models = {}
    for name, model in config.models.items():
        found = [pins[name, ref] for ref in (model.version, *model.also_serve)]
        versions = {
            p.version: served_version(config, name, p, listen_tcp=listen_tcp) for p in found
        }
        models[name] = ServedModel(found[0].version, versions)
    return Layout(models)


def served_version(
    config: ServingConfig, name: str, pin: Resolved, *, listen_tcp: bool
) -> ServedVersion:
    """A version of a model of `config`, with that model's settings."""
    model = config.models[name]
    max_size = model.batching.max_size
    if pin.signature.batch is Batch.NONE:
        max_size = 1
    elif pin.signature.batch is Batch.FIXED:
        max_size = min(max_size, pin.signature.fixed_rows)
    buckets = model.batching.buckets
    scaling = model.scaling.spec if model.scaling is not None else None
    # A version that may sleep is awake first: so it is seen to load before it is routed.
    count = model.replicas if scaling is None else max(1, scaling.least)
    is_onnx = pin.platform == ONNX_PLATFORM
    replica = ReplicaSpec(
        model=name,
        version=pin.version,
        digest=pin.digest,
        home=str(config.home_dir),
        run_dir="",
        device=model.device,
        max_size=max_size,
        buckets=buckets,
        # The other runtime's settings stay out, so that changing them replaces nothing.
        onnx=model.onnx.model_dump(mode="json") if is_onnx else {},
        torch={} if is_onnx else model.torch.model_dump(mode="json"),
        stall_timeout_s=model.stall_timeout_s,
        listen_tcp=listen_tcp,
        resources=model.resources,
        gpu_memory_bytes=model.gpu_memory_bytes,
    )
    arm = Arm(
        model=name,
        version=pin.version,
        digest=pin.digest,
        platform=pin.platform,
        signature=pin.signature,
        max_size=max_size,
        max_delay_s=model.batching.max_delay_ms / 1e3,
        buckets=buckets or (),
        queue_max_rows=model.queue.max_rows,
        queue_max_wait_s=model.queue.max_wait_ms / 1e3,
        queue_hold_s=model.queue.hold_ms / 1e3,
        timeout_s=model.timeout_ms / 1e3,
        usd_per_hour=model.usd_per_hour,
        replicas=count,
        wake_queue=scaling.wake_queue if scaling is not None and scaling.sleeps else 0,
    )
    return ServedVersion(AppSpec(replica, count, model.ready_timeout_s, scaling), arm)


def check_fixed_settings(new: ServingConfig, running: ServingConfig) -> None:
    """Raise `ConflictError` where `new` changes what only a restart can: all but models."""
    new = _with_running_ports(new, running)
    changed = [
        key
        for key in ServingConfig.model_fields
        if key != "models" and getattr(new, key) != getattr(running, key)
    ]
    if changed:
        details = "; ".join(_difference(key, running, new) for key in changed)
        raise ConflictError(
            f"only models can change while it runs; for the rest, `serving down` and `serving up`: "
            f"{details}"
        )


def _with_running_ports(new: ServingConfig, running: ServingConfig) -> ServingConfig:
    """A port of 0 asks for any: the one that runs is one."""
    updates = {}
    for section in ("gateway", "control"):
        if getattr(new, section).port == 0:
            port = getattr(running, section).port
            updates[section] = getattr(new, section).model_copy(update={"port": port})
    return new.model_copy(update={"home": new.home_dir, **updates})


def _difference(key: str, running: ServingConfig, new: ServingConfig) -> str:
    if key in _SECRET:
        return f"{key} is another where it runs"
    return (
        f"{key} is {_plain(getattr(running, key))} where it runs, "
        f"{_plain(getattr(new, key))} in this configuration"
    )


def _plain(value: Any) -> str:
    dump = getattr(value, "model_dump", None)
    return str(dump(mode="json", exclude_defaults=True) if dump else value)
