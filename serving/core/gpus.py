"""GPUs as data: what one is, what was measured on it, what its errors mean, how healthy it is.

A value that NVML does not give is None, never 0: under MIG a GPU has no utilisation, and a
dashboard that shows 0 % would say that it is idle.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any, Final

SLOWDOWNS: Final = frozenset(
    {
        "hw_slowdown",
        "sw_thermal_slowdown",
        "hw_thermal_slowdown",
        "hw_power_brake_slowdown",
        "board_limit",
    }
)
"""Throttle reasons of a GPU in trouble. A power cap alone is what full load looks like."""

APPLICATION_XIDS: Final[Mapping[int, str]] = {
    13: "graphics engine exception",
    31: "GPU memory page fault",
    43: "GPU stopped processing",
}
"""Errors that a program made; its GPU is as good as before."""

HARDWARE_XIDS: Final[Mapping[int, str]] = {
    48: "double-bit ECC error",
    64: "memory row not remapped",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    94: "contained ECC error",
    95: "uncontained ECC error",
    140: "unrecovered ECC error",
}
"""Errors of the GPU itself: nothing new is to start on it until a person has looked."""

FIRMWARE_XIDS: Final[Mapping[int, str]] = {119: "GSP RPC timeout", 120: "GSP error"}
"""Errors of the GPU's firmware. One may pass; one that comes again soon needs a reset."""

OTHER_XIDS: Final[Mapping[int, str]] = {
    **FIRMWARE_XIDS,
    63: "memory row remapped",
    154: "GPU recovery action changed",
}
"""Errors that say nothing by themselves. A row waits for a reset as long as `remap_pending`; what
makes the driver advise another recovery has a number of its own."""

_XIDS: Final[Mapping[int, str]] = {**APPLICATION_XIDS, **HARDWARE_XIDS, **OTHER_XIDS}
_RECUR_S: Final = 3600.0


class XidClass(enum.StrEnum):
    """Whose fault an XID error is."""

    APPLICATION = "application"
    HARDWARE = "hardware"
    OTHER = "other"


class Health(enum.StrEnum):
    """How well a GPU is, best first: of two, the later counts."""

    OK = "ok"
    THROTTLED = "throttled"
    UNKNOWN = "unknown"
    DEGRADED = "degraded"
    FAILED = "failed"


_HEALTH_ORDER: Final = tuple(Health)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG slice of one (`mig_parent` is then the UUID of the whole).

    `index` is NVML's, which is the order on the PCI bus. `divided`: in MIG mode, so that only its
    slices can be worked on. `memory_bytes` is None where it shares the machine's memory.
    """

    uuid: str
    node: str
    index: int
    name: str
    memory_bytes: int | None
    pci: str | None = None
    mig_parent: str | None = None
    divided: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Gpu:
        """Read `to_dict`'s form."""
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that has a context on a GPU. `memory_bytes` is None where NVML does not tell."""

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuSample:
    """What NVML said at one moment (`at`, Unix seconds); None is what it does not give.

    Memory in bytes: `memory_used` by processes, `memory_reserved` by driver and firmware.
    `utilization` from 0 to 1. `energy_j` and `ecc_uncorrected` count since the driver was loaded.
    `power_energy_j` is power times time since the agent started, where there is no `energy_j`.
    `throttle` names why the clocks are held back; () is not at all. `lost`: the GPU does not
    answer, so that everything is None.
    """

    at: float
    memory_used: float | None = None
    memory_reserved: float | None = None
    utilization: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    power_energy_j: float | None = None
    temperature_c: float | None = None
    throttle: tuple[str, ...] | None = None
    ecc_uncorrected: float | None = None
    remapped_rows: float | None = None
    remap_pending: bool | None = None
    remap_failure: bool | None = None
    processes: tuple[GpuProcess, ...] | None = None
    lost: bool = False

    @property
    def used_j(self) -> float | None:
        """A count of its energy: the GPU's own, or the agent's."""
        return self.power_energy_j if self.energy_j is None else self.energy_j

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = asdict(self)
        for name in ("throttle", "processes"):
            plain[name] = None if plain[name] is None else list(plain[name])
        return plain

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GpuSample:
        """Read `to_dict`'s form."""
        throttle, processes = raw["throttle"], raw["processes"]
        more = {
            "throttle": None if throttle is None else tuple(throttle),
            "processes": None if processes is None else tuple(GpuProcess(**p) for p in processes),
        }
        return cls(**{**raw, **more})


@dataclass(frozen=True, slots=True)
class XidEvent:
    """An error that the driver reported, with its number. `at` is Unix seconds."""

    uuid: str
    xid: int
    at: float

    @property
    def kind(self) -> XidClass:
        """Whose fault it is."""
        return xid_class(self.xid)

    @property
    def sentence(self) -> str:
        """It in words."""
        meaning = _XIDS.get(self.xid)
        return f"XID {self.xid} ({meaning})" if meaning else f"XID {self.xid}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> XidEvent:
        """Read `to_dict`'s form."""
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node's agent sends: each GPU with its last sample, and what happened.

    `xids` are the errors since the last report that arrived. `problem` says why there are no GPUs
    where there should be some, or why their samples are old.
    """

    node: str
    host: str
    driver: str | None = None
    gpus: tuple[tuple[Gpu, GpuSample], ...] = ()
    xids: tuple[XidEvent, ...] = ()
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "node": self.node,
            "host": self.host,
            "driver": self.driver,
            "gpus": [{"gpu": g.to_dict(), "sample": s.to_dict()} for g, s in self.gpus],
            "xids": [event.to_dict() for event in self.xids],
            "problem": self.problem,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> NodeReport:
        """Read `to_dict`'s form."""
        gpus = tuple(
            (Gpu.from_dict(row["gpu"]), GpuSample.from_dict(row["sample"])) for row in raw["gpus"]
        )
        xids = tuple(XidEvent.from_dict(event) for event in raw["xids"])
        return cls(**{**raw, "gpus": gpus, "xids": xids})


@dataclass(frozen=True, slots=True)
class Condition:
    """How well a GPU is, and why it is not ok."""

    health: Health = Health.OK
    reasons: tuple[str, ...] = ()

    def joined(self, other: Condition) -> Condition:
        """Both in one: the worse health, and the reasons of both."""
        reasons = tuple(dict.fromkeys((*self.reasons, *other.reasons)))
        return Condition(_worst((self.health, other.health)), reasons)


def xid_class(xid: int) -> XidClass:
    """Whose fault an XID error is, by its number."""
    if xid in APPLICATION_XIDS:
        return XidClass.APPLICATION
    return XidClass.HARDWARE if xid in HARDWARE_XIDS else XidClass.OTHER


def condition(
    sample: GpuSample | None, xids: Sequence[XidEvent] = (), silence: str = ""
) -> Condition:
    """How well a GPU is by its last sample and its latest XID errors, oldest first.

    `silence` says why there is no sample, where it is None.
    """
    found = [(Health.FAILED, e.sentence) for e in xids if e.kind is XidClass.HARDWARE]
    found += [(Health.FAILED, sentence) for sentence in _wedged(xids)]
    if sample is None:
        found.append((Health.UNKNOWN, silence or "no measurement"))
    else:
        found += _signs(sample)
    reasons = tuple(dict.fromkeys(reason for _, reason in found))
    return Condition(_worst(health for health, _ in found), reasons)


def _worst(found: Iterable[Health]) -> Health:
    return max(found, key=_HEALTH_ORDER.index, default=Health.OK)


def _signs(sample: GpuSample) -> Iterable[tuple[Health, str]]:
    if sample.lost:
        yield Health.FAILED, "it does not answer"
    if sample.remap_failure:
        yield Health.FAILED, "a memory row could not be remapped"
    if sample.ecc_uncorrected:
        yield Health.DEGRADED, f"{sample.ecc_uncorrected:.0f} uncorrected ECC errors"
    if sample.remap_pending:
        yield Health.DEGRADED, "a remapped memory row waits for a reset"
    slowed = sorted(SLOWDOWNS.intersection(sample.throttle or ()))
    if slowed:
        yield Health.THROTTLED, f"throttled: {', '.join(slowed)}"


def faults(
    before: GpuSample | None,
    after: GpuSample,
    xids: Sequence[XidEvent],
    earlier: Sequence[XidEvent] = (),
) -> tuple[str, ...]:
    """What happened to a GPU between two samples that makes it unfit, in words.

    `before` is None for the first sample: what was wrong before it is old, and shows as health.
    `earlier` are its XID errors before `xids`, oldest first.
    """
    found = [e.sentence for e in xids if e.kind is XidClass.HARDWARE]
    if any(e.xid in FIRMWARE_XIDS for e in xids):
        found += _wedged((*earlier, *xids))
    if before is None:
        return tuple(found)
    if after.remap_failure and not before.remap_failure:
        found.append("a memory row could not be remapped")
    if after.lost and not before.lost:
        found.append("it does not answer")
    old = before.ecc_uncorrected
    if old is not None and after.ecc_uncorrected is not None and after.ecc_uncorrected > old:
        found.append(f"uncorrected ECC errors rose from {old:.0f} to {after.ecc_uncorrected:.0f}")
    return tuple(found)


def _wedged(xids: Iterable[XidEvent]) -> list[str]:
    """In one sentence, that firmware errors have come again soon; nothing where they have not."""
    pairs = pairwise(e for e in xids if e.xid in FIRMWARE_XIDS)
    soon = (two for one, two in pairs if two.at - one.at <= _RECUR_S)
    return [f"{e.sentence}: its firmware failed twice within an hour" for e in islice(soon, 1)]


def visible(gpus: Sequence[Gpu], setting: str | None) -> list[Gpu]:
    """Those of a node's GPUs that CUDA_VISIBLE_DEVICES (`setting`) allows; None allows all.

    As CUDA reads it: a list of indices, or of UUIDs or what they begin with, that ends at the first
    entry which names nothing. An index is NVML's. A GPU brings its slices, and a slice its GPU.
    """
    if setting is None:
        return list(gpus)
    allowed: set[str] = set()
    for entry in (part.strip() for part in setting.split(",")):
        named = next((g for g in gpus if _names(entry, g)), None)
        if named is None:
            break
        family = {g.uuid for g in gpus if g.mig_parent == named.uuid}
        allowed |= {named.uuid, *family, *([named.mig_parent] if named.mig_parent else [])}
    return [g for g in gpus if g.uuid in allowed]


def _names(entry: str, gpu: Gpu) -> bool:
    if entry.isdecimal():
        return gpu.mig_parent is None and gpu.index == int(entry)
    return entry.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(entry)
