"""What applications ask of GPUs, and what these have for them, in the terms of `place`.

What a replica needs is, in this order: the model's `gpu_memory_bytes`; what a replica of the same
bundle was measured to take, at its `max_size`, with the safety margin; an estimate from the size of
the bundle's files, with the safety margin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from serving.control.gpus import Standing
from serving.control.leases import Lease
from serving.control.records import Record
from serving.control.state import State
from serving.core.gpus import Health
from serving.core.memory_profile import (
    MemoryProfile,
    estimated_need,
    format_need,
    with_margin,
)
from serving.core.placement import Demand, Device
from serving.core.plan import AppSpec
from serving.core.replica import ReplicaSpec
from serving.core.seats import Seat, ray_share
from serving.store.memory_profiles import ProfileRow


@dataclass(frozen=True, slots=True)
class Claim:
    """An application that is to run. Claims of one `group` keep apart; "" has no group."""

    app: AppSpec
    replicas: int
    group: str = ""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes a replica, what they are for, and whether nobody has measured them."""

    bytes: int
    basis: str
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    """`ceiling` is what fitted into leases of up to `lease_bytes`: of larger ones it tells nothing.

    0 bytes where the lease is not known.
    """

    profile: MemoryProfile
    ceiling: int | None
    lease_bytes: int

    def after(self, profile: MemoryProfile, ceiling: int | None, lease_bytes: int) -> _Known:
        """With the newest profile, and the lowest ceiling of those seen with the largest lease.

        The first lease is an estimate: what ran out of it may well fit into one that was measured.
        """
        if lease_bytes > self.lease_bytes:
            return _Known(profile, ceiling, lease_bytes)
        if lease_bytes == self.lease_bytes and ceiling is not None:
            return replace(self, profile=profile, ceiling=min(ceiling, self.ceiling or ceiling))
        return replace(self, profile=profile)


@dataclass
class Needs:
    """Tells what a replica needs.

    `artifact_bytes` gives the size of a bundle's files by its digest, None where they are not here.
    """

    margin: float
    artifact_bytes: Callable[[str], int | None]
    _known: dict[str, dict[tuple[str, str], _Known]] = field(default_factory=dict)

    def learn(
        self, digest: str, profile: MemoryProfile, ceiling: int | None = None, lease_bytes: int = 0
    ) -> bool:
        """Go by what a replica measured with a lease of `lease_bytes`; whether anything is new.

        Of one type of device the newest profile counts, and the ceiling of the largest lease.
        """
        known = self._known.setdefault(digest, {})
        key = profile.device_type, profile.runtime
        before = known.get(key)
        if before is None:
            known[key] = _Known(profile, ceiling, lease_bytes)
        else:
            known[key] = before.after(profile, ceiling, lease_bytes)
        return known[key] != before

    def rows(self, digest: str) -> list[ProfileRow]:
        """What is known of a bundle, for the store."""
        return [
            ProfileRow(digest, kind, runtime, k.profile.to_dict(), k.ceiling, k.lease_bytes)
            for (kind, runtime), k in self._known.get(digest, {}).items()
        ]

    def ceilings(self, digest: str) -> dict[str, int]:
        """The most rows that a bundle was seen to fit, by type of device; where that is known."""
        found: dict[str, int] = {}
        for (kind, _), known in self._known.get(digest, {}).items():
            if known.ceiling is not None:
                found[kind] = min(found.get(kind, known.ceiling), known.ceiling)
        return found

    def ceiling(self, digest: str, device_type: str, lease_bytes: int) -> int | None:
        """The most rows that fit into a lease of `lease_bytes`; None where that is not known."""
        found = [
            known.ceiling
            for (kind, _), known in self._known.get(digest, {}).items()
            if kind == device_type and known.ceiling and lease_bytes <= known.lease_bytes
        ]
        return min(found, default=None)

    def of(self, replica: ReplicaSpec, device_types: Iterable[str]) -> Need:
        """What a replica needs on the worst of `device_types`."""
        if replica.gpu_memory_bytes is not None:
            return Need(replica.gpu_memory_bytes, "as gpu_memory_bytes says")
        basis, types = f"for max_size {replica.max_size}", frozenset(device_types)
        known = [k.profile for k in self._known.get(replica.digest, {}).values()]
        # What was measured on another type is nearer to the truth than the size of a file.
        profiles = [p for p in known if p.device_type in types] or known
        if profiles:
            return Need(max(p.need(replica.max_size, self.margin) for p in profiles), basis)
        size = self.artifact_bytes(replica.digest)
        need = with_margin(estimated_need(size or 0), self.margin)
        of = "nothing: its files are not here" if size is None else f"{format_need(size)} of files"
        return Need(need, f"{basis}, estimated from {of}", estimated=True)


def wants_gpu(replica: ReplicaSpec, *, there_are_any: bool) -> bool:
    """Whether a replica is to run on a GPU: `auto` does where there are GPUs."""
    providers = replica.onnx.get("providers")
    if replica.device == "cpu" or (providers and set(providers) == {"cpu"}):
        return False
    return replica.device == "cuda" or there_are_any


def demand_of(claim: Claim, need: Need, extra: int = 0) -> Demand:
    """A claim as the demand that `place` understands, with `extra` replicas."""
    replica = claim.app.replica
    return Demand(
        app=claim.app.name,
        model=replica.model,
        version=replica.version,
        replicas=claim.replicas + extra,
        bytes=need.bytes,
        group=claim.group,
        basis=need.basis,
    )


def seat_on(device: Device, number: int, need: Need, ray_gpus: float | None, on_node: int) -> Seat:
    """The seat of a replica that is planned for `device`, one of `on_node` devices of its node.

    `ray_gpus` is what Ray counts there. What nobody has measured takes next to nothing of it: its
    lease shrinks when it was, and Ray would go on counting the estimate.
    """
    if need.estimated:
        return Seat(number, device.node)
    share = ray_share(need.bytes, device.memory_bytes, ray_gpus, on_node)
    return Seat(number, device.node, share)


def claims(state: State, records: Sequence[Record]) -> list[list[Claim]]:
    """Who is to run, in the order in which they choose: what answers, what is to, rollouts.

    An application that was given up has no claim, unless it was more replicas that were.
    """
    live = [r for r in records if r.live and not r.released]
    grouped = {r.rollout.model for r in live}
    coming = {s.app.name: s.app for r in live for s in r.served.versions.values()}
    routed = state.routed.apps()
    seen = state.given_up.keys() - routed.keys()
    waves = []
    for apps in (routed, state.desired.apps(), coming):
        new = {n: a for n, a in apps.items() if n not in seen}
        seen |= new.keys()
        waves.append([claim_of(app, state.wanted(app), grouped) for app in new.values()])
    return waves


def claim_of(app: AppSpec, replicas: int, rolling_out: Iterable[str]) -> Claim:
    """A claim to `replicas`; the arms of a rollout, which some models have, are one group."""
    model = app.replica.model
    return Claim(app, replicas, f"rollout of {model}" if model in set(rolling_out) else "")


def devices(standings: Sequence[Standing], leases: Sequence[Lease]) -> list[Device]:
    """The GPUs, with slices in place of divided ones.

    One that reports no memory of its own has none to place anything by: it gets nothing.
    """
    found = []
    for s in standings:
        if s.gpu.divided:
            continue
        own = [lease for lease in leases if lease.terms.uuid == s.gpu.uuid]
        found.append(
            Device(
                uuid=s.gpu.uuid,
                node=s.gpu.node,
                type=s.gpu.name,
                memory_bytes=s.gpu.memory_bytes or 0,
                used_by_others=used_by_others(s, own),
                cordoned=s.cordon is not None or s.condition.health is Health.FAILED,
                # Of one that is silent, or in doubt, nobody knows that it is well.
                throttled=s.condition.health is not Health.OK,
                mig=s.gpu.mig_parent is not None,
            )
        )
    return found


def used_by_others(standing: Standing, own: Sequence[Lease]) -> int:
    """Bytes of a GPU that are neither free nor for its leases; what nobody measured is 0.

    Process by process where NVML names them. Where it does not, or knows replicas that have loaded
    by other numbers (in another PID namespace), what is used beyond the leases is others'.
    """
    sample = standing.sample
    if sample is None:
        return 0
    reserved = int(sample.memory_reserved or 0)
    if sample.processes is not None:
        seen = {p.pid for p in sample.processes}
        loaded = {int(r.info["pid"]) for r in standing.replicas}
        ours = {lease.pid for lease in own}
        theirs = [p.memory_bytes for p in sample.processes if p.pid not in ours]
        if (not loaded or loaded & seen) and None not in theirs:
            return reserved + sum(b for b in theirs if b is not None)
    used = int(sample.memory_used or 0)
    return reserved + max(0, used - sum(lease.terms.bytes for lease in own))
