"""A placement as `serving plan` and the admin API show it: a row a GPU, a row an application."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from serving.control.gpu_demands import Claim, Need
from serving.core.placement import Device, Placement


def gpu_row(
    device: Device, leased: int, planned: Iterable[tuple[int, Sequence[str]]]
) -> dict[str, Any]:
    """A GPU with `leased` bytes; `planned` are the bytes and GPUs of replicas that are to come."""
    to_come = sum(size * uuids.count(device.uuid) for size, uuids in planned)
    free = device.memory_bytes - device.used_by_others - leased - to_come
    return {
        "uuid": device.uuid,
        "node": device.node,
        "type": device.type,
        "memory_bytes": device.memory_bytes or None,
        "leased_bytes": leased,
        "planned_bytes": to_come,
        "others_bytes": device.used_by_others,
        "free_bytes": max(0, free),
        "cordoned": device.cordoned,
        "throttled": device.throttled,
        "mig": device.mig,
    }


def claim_row(
    claim: Claim, need: Need | None, placed: Placement, replicas: Sequence[str]
) -> dict[str, Any]:
    """An application, what it needs and where it goes; `replicas` have the first of its places."""
    app = claim.app
    slots = placed.slots.get(app.name, ())
    return {
        "app": app.name,
        "model": app.replica.model,
        "version": app.replica.version,
        "replicas": claim.replicas,
        "bytes": need.bytes if need else None,
        "basis": need.basis if need else "",
        "estimated": need.estimated if need else False,
        "slots": [
            {"uuid": gpu, "replica": replicas[i] if i < len(replicas) else None}
            for i, gpu in enumerate(slots)
        ],
        "refused": placed.refused.get(app.name),
    }


def sentence(row: Mapping[str, Any]) -> str:
    """A refusal with its subject."""
    return f"model {row['model']!r} version {row['version']} {row['refused']}"
