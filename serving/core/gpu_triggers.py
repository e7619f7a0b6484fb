"""Hard triggers on GPUs: out of memory, what broke a GPU, and how much memory is left.

They bet nothing and have no share of α. What points at the version takes it back; what points at a
GPU is shown, and its replicas move.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from serving.core.rollout_counts import ArmName
from serving.core.rollout_facts import Incident, IncidentKind
from serving.core.rollout_spec import Trigger
from serving.core.rollout_types import Outcome, Rollout, Snapshot, Verdict
from serving.core.verdicts import ENDS, hold, percent, times, verdict

_NO_GPU: Final = "no replica of the canary is on a GPU: passes"
_PROGRAMS: Final = frozenset({IncidentKind.FATAL, IncidentKind.APPLICATION})


def oom(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Runs of the canary's that did not fit into memory, where stable's did."""
    since = snapshot.now - trigger.window_s

    def runs(arm: ArmName) -> int:
        return sum(
            i.count
            for i in snapshot.incidents
            if i.kind is IncidentKind.OOM and i.arm == arm and since < i.at <= snapshot.now
        )

    canary, stable = runs("canary"), runs("stable")
    outcome = Outcome.FAIL if canary >= trigger.failures else Outcome.PASS
    ends = ENDS[outcome]
    if outcome is Outcome.FAIL and stable >= trigger.failures:
        outcome, ends = Outcome.HOLD, f"stable's did {times(stable)}, so it is not the version"
    known = f" (runs have at most {_rows(snapshot)} rows since)" if snapshot.ceilings else ""
    sentence = (
        f"runs of the canary did not fit into memory {times(canary)} in the last "
        f"{trigger.window_s:g} s{known}, {trigger.failures} are too many: {ends}"
    )
    return verdict(trigger, outcome, sentence)


def _rows(snapshot: Snapshot) -> int:
    return min(snapshot.ceilings.values())


def gpu_health(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Errors of the canary's GPUs: of a program, or of the GPU itself.

    An XID error of a program blames the version where nobody else was on the GPU. On a GPU that it
    shares, and for a fatal CUDA error, any one may have had bad luck; not on several. What happened
    on a GPU whose hardware failed says nothing of the version, unless it is the hardware of several
    under the canary, and of none under stable alone.
    """
    incidents = [i for i in snapshot.incidents if i.arm == "canary"]
    hardware = [i for i in incidents if i.kind is IncidentKind.HARDWARE]
    under_stable = {
        i.gpu for i in snapshot.incidents if i.arm == "stable" and i.kind is IncidentKind.HARDWARE
    }
    broken = {i.gpu for i in hardware}
    if len(broken - under_stable) >= trigger.failures and under_stable <= broken:
        what = f"{_listed(hardware)}: the hardware of {len(broken)} GPUs under the canary"
        return verdict(trigger, Outcome.FAIL, f"{what}, {trigger.failures} are too many: fails")
    broken |= {g.gpu for g in snapshot.gpus if g.ill}
    its_own = [i for i in incidents if i.kind in _PROGRAMS and i.gpu not in broken]
    proven = [i for i in its_own if i.kind is IncidentKind.APPLICATION and i.alone]
    if proven:
        what = f"{_listed(proven)}, where only the canary ran"
        return verdict(trigger, Outcome.FAIL, f"{what}: fails")
    gpus = {i.gpu for i in its_own}
    if len(gpus) >= trigger.failures:
        what = f"{_listed(its_own)}: on {len(gpus)} GPUs, {trigger.failures} are too many"
        return verdict(trigger, Outcome.FAIL, f"{what}: fails")
    since = snapshot.now - trigger.window_s
    faults = [f"{g.gpu}: {g.ill}" for g in snapshot.gpus if g.ill]
    faults += [
        f"{i.gpu}: {i.what}" for i in incidents if i.kind is IncidentKind.HARDWARE and i.at > since
    ]
    reasons = [f"{fault}, which is the GPU's fault" for fault in dict.fromkeys(faults)]
    if its_own:
        reasons.append(
            f"{_listed(its_own)}: on one GPU it may be the GPU, {trigger.failures} needed"
        )
    reasons += [f"{g.gpu} is not measured" for g in snapshot.gpus if not g.measured]
    if reasons:
        return hold(trigger, f"{'; '.join(dict.fromkeys(reasons))}: not decided")
    if not snapshot.gpus:
        return verdict(trigger, Outcome.PASS, _NO_GPU)
    names = ", ".join(sorted({g.gpu for g in snapshot.gpus}))
    return verdict(trigger, Outcome.PASS, f"no error on {names}: passes")


def _listed(incidents: Iterable[Incident]) -> str:
    return "; ".join(dict.fromkeys(f"{i.what} on {i.gpu or 'its GPU'}" for i in incidents))


def gpu_memory_headroom(trigger: Trigger, rollout: Rollout, snapshot: Snapshot) -> Verdict:
    """Free memory of the canary's GPUs and leases, the least of all replicas."""
    if not snapshot.gpus:
        return verdict(trigger, Outcome.PASS, _NO_GPU)
    known = [(g.free, g) for g in snapshot.gpus if g.free is not None]
    if len(known) < len(snapshot.gpus):
        unknown = next(g for g in snapshot.gpus if g.free is None)
        return hold(
            trigger, f"the memory of replica {unknown.replica} on {unknown.gpu} is not known: holds"
        )
    free, least = min(known, key=lambda found: found[0])
    outcome = Outcome.FAIL if free < trigger.threshold else Outcome.PASS
    sentence = (
        f"replica {least.replica} has {percent(free)} of {least.of} free, "
        f"at least {percent(trigger.threshold)} asked for: {ENDS[outcome]}"
    )
    return verdict(trigger, outcome, sentence)
