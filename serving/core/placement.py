"""Which GPU each replica goes to, by the memory it takes: a pure decision.

What is decided, the more important first:

1. As many applications as possible have all their replicas placed. One that cannot be placed whole
   gets no new GPU, and a sentence with the numbers.
2. As few replicas as possible go to throttled GPUs.
3. Replicas of one group (the arms of a rollout; else the replicas of one application) share as few
   GPUs as possible: two on one GPU slow each other down, and fall together.
4. As few GPUs as possible are in use. Applications that have nothing to do with each other share.

What always holds: the leases on a GPU never exceed what its memory has left beside other
processes; a replica that has its GPU keeps it, even if that GPU is full, throttled or cordoned by
now; a cordoned GPU gets nothing new. A MIG slice is a device like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serving.core.memory_profile import format_free, format_need
from serving.core.packing import Bin, Group, pack


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a slice of one, that replicas can be placed on.

    `used_by_others` is memory that neither a lease nor anything of ours accounts for. One of which
    nobody knows how much memory it has, as where it shares the machine's, has 0 `memory_bytes`.
    """

    uuid: str
    node: str
    type: str
    memory_bytes: int
    used_by_others: int = 0
    cordoned: bool = False
    throttled: bool = False
    mig: bool = False


@dataclass(frozen=True, slots=True)
class Demand:
    """`replicas` of an application, each with a lease of `bytes`.

    Replicas of one `group` keep apart ("": the application's own). `kept` has the GPU of each
    replica that holds one. `device_types` limits where new ones may go. `basis` says in a refusal
    what the bytes are for, as in "for max_size 64".
    """

    app: str
    model: str
    version: str
    replicas: int
    bytes: int
    group: str = ""
    kept: tuple[str, ...] = ()
    device_types: frozenset[str] | None = None
    basis: str = ""

    @property
    def missing(self) -> int:
        """Replicas that have no GPU yet."""
        return max(0, self.replicas - len(self.kept))


@dataclass(frozen=True, slots=True)
class Placement:
    """`slots` has the GPU of each replica, kept ones first; `refused` says why an app got none."""

    slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def place(devices: Sequence[Device], demands: Sequence[Demand]) -> Placement:
    """Place every demand, or say why not. Names of apps and UUIDs must each be unique.

    Deterministic; neither the order of `devices` nor that of `demands` matters.
    """
    devices = sorted(devices, key=lambda d: d.uuid)
    demands = sorted(demands, key=lambda d: d.app)
    free = free_bytes(devices, demands)
    wanting = [d for d in demands if d.missing]
    packed = pack(*_as_bins(devices, demands, wanting, free))
    slots = {d.app: d.kept for d in demands}
    for number, chosen in packed.items():
        demand = wanting[number]
        new = [devices[b].uuid for b in chosen]
        slots[demand.app] = (*demand.kept, *new)
        for uuid in new:
            free[uuid] -= demand.bytes
    refused = {
        demand.app: refusal(demand, devices, free)
        for number, demand in enumerate(wanting)
        if number not in packed
    }
    return Placement(slots, refused)


def free_bytes(devices: Sequence[Device], demands: Sequence[Demand]) -> dict[str, int]:
    """What is left on each device beside other processes and kept replicas; below 0: too little."""
    free = {d.uuid: d.memory_bytes - d.used_by_others for d in devices}
    for demand in demands:
        for uuid in demand.kept:
            if uuid in free:
                free[uuid] -= demand.bytes
    return free


def _as_bins(
    devices: Sequence[Device],
    demands: Sequence[Demand],
    wanting: Sequence[Demand],
    free: Mapping[str, int],
) -> tuple[list[Bin], list[Group], dict[tuple[int, int], int]]:
    number = {device.uuid: b for b, device in enumerate(devices)}
    names = sorted({_team(d) for d in demands})
    team = {name: t for t, name in enumerate(names)}
    present = Counter(
        (number[uuid], team[_team(d)]) for d in demands for uuid in d.kept if uuid in number
    )
    used = {b for b, _ in present}
    bins = [Bin(max(0, free[d.uuid]), b in used, d.throttled) for b, d in enumerate(devices)]
    groups = [
        Group(
            demand.missing,
            demand.bytes,
            tuple(b for b, device in enumerate(devices) if _allows(demand, device)),
            team[_team(demand)],
        )
        for demand in wanting
    ]
    return bins, groups, dict(present)


def _team(demand: Demand) -> tuple[bool, str]:
    """A group, or the application where it has none; one cannot pass for the other."""
    return bool(demand.group), demand.group or demand.app


def _allows(demand: Demand, device: Device) -> bool:
    right_type = demand.device_types is None or device.type in demand.device_types
    return right_type and not device.cordoned


def refusal(demand: Demand, devices: Sequence[Device], free: Mapping[str, int]) -> str:
    """Why `demand` finds no room where `free` bytes are left, as a sentence's predicate."""
    needs = _needs(demand)
    if not devices:
        return f"{needs}; there is no GPU"
    right = [d for d in devices if demand.device_types is None or d.type in demand.device_types]
    if not right:
        have = ", ".join(sorted({d.type for d in devices}))
        return f"{needs}; there is none of that type: {have}"
    unknown = [d.uuid for d in right if not d.memory_bytes]
    right = [d for d in right if d.memory_bytes]
    if not right:
        few = (
            "reports no memory of its own" if len(unknown) == 1 else "report no memory of their own"
        )
        return f"{needs}; {', '.join(unknown)} {few} to place it by"
    open_ = [d for d in right if not d.cordoned]
    if not open_:
        return f"{needs}; every GPU for it is cordoned: {', '.join(d.uuid for d in right)}"
    largest = max(open_, key=lambda d: free[d.uuid])
    room = sum(max(0, free[d.uuid]) // demand.bytes for d in open_) if demand.bytes else 0
    some = f"there is room for {room}; " if room else ""
    closed = len(right) - len(open_)
    cordoned = f" ({closed} cordoned)" if closed else ""
    left = format_free(max(0, free[largest.uuid]))
    return f"{needs}; {some}the largest free is {left} on {largest.uuid}{cordoned}"


def _needs(demand: Demand) -> str:
    count = f"{demand.missing} × " if demand.missing > 1 else ""
    basis = f" {demand.basis}" if demand.basis else ""
    types = f" on {' or '.join(sorted(demand.device_types))}" if demand.device_types else ""
    return f"needs {count}{format_need(demand.bytes)}{basis}{types}"
