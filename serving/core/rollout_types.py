"""What a rollout is made of: what survives a restart, what a tick sees, and what triggers say.

Plain frozen data. `serving.core.rollout` decides over it, `serving.core.triggers` judges it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Literal

from serving.core.rollout_counts import Breakers, EpochCounts, Sample
from serving.core.rollout_facts import CanaryGpu, CostWindows, Incident
from serving.core.rollout_spec import RolloutSpec, Step, TriggerAction
from serving.core.rollout_states import TERMINAL, State


class Outcome(StrEnum):
    """What a trigger says, in the order of `worst`.

    HOLD: undecided, for lack of data too. UNKNOWN: its source of data does not answer.
    """

    PASS = "pass"
    HOLD = "hold"
    UNKNOWN = "unknown"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One trigger's verdict with the numbers behind it.

    `log_e` and `threshold` are natural logarithms (None where the trigger has no e-value: those are
    `hard`). `canary` and `baseline` are (units, events). `sentence` says it to a person.
    """

    trigger: str
    verdict: Outcome
    log_e: float | None
    threshold: float | None
    canary: tuple[float, float]
    baseline: tuple[float, float]
    sentence: str
    action: TriggerAction

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "trigger": self.trigger,
            "verdict": self.verdict.value,
            "log_e": self.log_e,
            "threshold": self.threshold,
            "canary": list(self.canary),
            "baseline": list(self.baseline),
            "sentence": self.sentence,
            "action": self.action,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Verdict:
        """Read `to_dict`'s form."""
        return cls(
            **{
                **raw,
                "verdict": Outcome(raw["verdict"]),
                "canary": tuple(raw["canary"]),
                "baseline": tuple(raw["baseline"]),
            }
        )


@dataclass(frozen=True, slots=True)
class ProviderState:
    """The last answers of something that is asked from outside: PromQL, a webhook, a gate.

    `fails` and `errors` count the latest answers in a row that were "fail" or "unknown" (either
    ends the other's row). `value` is what PromQL measured, `message` one line for a person.
    """

    outcome: Literal["ok", "fail", "unknown"]
    fails: int = 0
    errors: int = 0
    value: float | None = None
    message: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Epoch:
    """A period with one weight (0..1), one step, one frozen baseline.

    `step` is -1 before the first step and the number of steps after the last. `latency_bounds` are
    (tail, body, bake's) as indices into `rollout_counts.LATENCY_BOUNDS`; None: not frozen yet, so
    latency is not judged. `drift_bins` are the predictions that drift is judged on; None: likewise.
    `part` is which part of the bake it is, from 0.
    """

    epoch: int
    step: int
    weight: float
    latency_bounds: tuple[int, ...] | None = None
    drift_bins: tuple[str, ...] | None = None
    part: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "weight": self.weight,
            "latency_bounds": None if self.latency_bounds is None else list(self.latency_bounds),
            "drift_bins": None if self.drift_bins is None else list(self.drift_bins),
            "part": self.part,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Epoch:
        """Read `to_dict`'s form."""
        bounds, bins = raw["latency_bounds"], raw["drift_bins"]
        return cls(
            epoch=raw["epoch"],
            step=raw["step"],
            weight=raw["weight"],
            latency_bounds=None if bounds is None else tuple(bounds),
            drift_bins=None if bins is None else tuple(bins),
            part=raw["part"],
        )


@dataclass(frozen=True, slots=True)
class Approval:
    """A person's yes at the gate of a step. `at` is Unix seconds."""

    step: int
    actor: str
    reason: str
    at: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"step": self.step, "actor": self.actor, "reason": self.reason, "at": self.at}


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout: everything about it that survives a restart. Times are Unix seconds.

    `stable` and `canary` are versions. `reason` and `actor` belong to the last transition;
    once it is rolled back, to the one that took it back.
    `verdicts` are of the last tick, and stay as they were once the new version is being taken back.
    `changed_at` is when the last transition was.
    `entered_at` and `step_entered_at` are moved on by what does not count as holding: a pause, an
    arm that was away, a time in which nobody looked.
    `stable_lost_at` and `canary_lost_at` say since when an arm has had no ready replica,
    `still_since` since when clocks stand still by that; not in a pause, which stops them itself.
    `waiting_since`: when the step's hold was over but evidence was missing. `acknowledged` has
    (trigger, outcome) that a person resumed past: it does not pause again while it lasts.
    `elapsed_s` is how long a paused rollout had been in `resume_to`. `units_waived`: a person went
    on from a bake that lacked requests. `warm_until`: how long the old
    version is kept after success.
    """

    id: str
    model: str
    stable: str
    canary: str
    stable_digest: str
    canary_digest: str
    spec: RolloutSpec
    salt: str
    created_at: float
    changed_at: float
    entered_at: float
    step_entered_at: float
    epochs: tuple[Epoch, ...]
    state: State = State.PENDING
    resume_to: State | None = None
    step: int = -1
    reason: str = ""
    actor: str = ""
    finished_at: float | None = None
    verdicts: tuple[Verdict, ...] = ()
    approvals: tuple[Approval, ...] = ()
    acknowledged: tuple[tuple[str, str], ...] = ()
    restarts: tuple[float, ...] = ()
    stable_lost_at: float | None = None
    canary_lost_at: float | None = None
    still_since: float | None = None
    waiting_since: float | None = None
    elapsed_s: float = 0.0
    units_waived: bool = False
    warm_until: float | None = None

    @property
    def current(self) -> Epoch:
        """The running epoch."""
        return self.epochs[-1]

    @property
    def epoch(self) -> int:
        """The running epoch's number; they only grow."""
        return self.epochs[-1].epoch

    @property
    def active(self) -> bool:
        """Whether ticks can still change it."""
        return self.state not in TERMINAL

    @property
    def stage(self) -> State:
        """The state, or the one that a paused rollout goes back to."""
        return self.resume_to if self.resume_to is not None else self.state

    @property
    def current_step(self) -> Step | None:
        """The step of the plan that runs, if one does."""
        return self.spec.steps[self.step] if 0 <= self.step < len(self.spec.steps) else None

    @property
    def had_traffic(self) -> bool:
        """Whether the canary has answered anybody, or was to."""
        return any(e.weight > 0 for e in self.epochs)

    @property
    def planned_weight(self) -> float:
        """The canary's share (0..1) by the plan."""
        if self.stage in (State.PROMOTING, State.BAKING, State.SUCCEEDED):
            return 1.0
        step = self.current_step if self.stage in (State.OBSERVING, State.AWAITING_GATE) else None
        return step.weight / 100 if step else 0.0

    @property
    def weight(self) -> float:
        """The canary's share (0..1) that the route table must carry now.

        By the plan, unless an arm has no ready replica: then the other one answers. The canary
        never answers for a lost stable before the plan has given it traffic, nor once it is taken
        back.
        """
        planned = self.planned_weight
        if planned == 0.0 or self.canary_lost_at is not None:
            return 0.0
        return planned if self.stable_lost_at is None else 1.0

    @property
    def shadow(self) -> float:
        """The share (0..1) of stable-answered requests that is copied to the canary now."""
        step = self.current_step
        copies = self.stage is State.SHADOWING or (
            self.stage in (State.OBSERVING, State.AWAITING_GATE)
            and step is not None
            and step.weight == 0
        )
        if self.spec.shadow is None or not copies or self.canary_lost_at is not None:
            return 0.0
        return self.spec.shadow.percent / 100

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. `epoch`, `weight` and `shadow` are for readers."""
        raw: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **raw,
            "spec": self.spec.to_dict(),
            "epochs": [e.to_dict() for e in self.epochs],
            "state": self.state.value,
            "resume_to": self.resume_to.value if self.resume_to is not None else None,
            "verdicts": [v.to_dict() for v in self.verdicts],
            "approvals": [a.to_dict() for a in self.approvals],
            "acknowledged": [list(a) for a in self.acknowledged],
            "restarts": list(self.restarts),
            **{name: getattr(self, name) for name in _DERIVED},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Rollout:
        """Read `to_dict`'s form, as our own controller writes it: a malformed one is a bug."""
        kept = {name: value for name, value in raw.items() if name not in _DERIVED}
        # Rows of earlier versions only have the time that moves.
        kept.setdefault("changed_at", raw["entered_at"])
        return cls(
            **{
                **kept,
                "spec": RolloutSpec.from_dict(raw["spec"]),
                "epochs": tuple(Epoch.from_dict(e) for e in raw["epochs"]),
                "state": State(raw["state"]),
                "resume_to": State(raw["resume_to"]) if raw["resume_to"] else None,
                "verdicts": tuple(Verdict.from_dict(v) for v in raw["verdicts"]),
                "approvals": tuple(Approval(**a) for a in raw["approvals"]),
                "acknowledged": tuple((name, outcome) for name, outcome in raw["acknowledged"]),
                "restarts": tuple(raw["restarts"]),
            }
        )


_DERIVED: Final = ("epoch", "weight", "shadow")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The world at one tick. `now` is Unix seconds.

    `canary_failed` says why the canary can never start ("" where it still may). Not `current`:
    nobody looked for a while, and what was counted meanwhile may not be known yet. `counts` maps an
    epoch to its totals over all gateways. `providers` maps the name of a trigger, or the key of a
    `Hook`, to its last answers. `revision` is the route table's, `gateways_at` the lowest that a
    gateway is known to run (0 where that is not known of any). `restarts` are times at which a
    canary replica came back after it had died; `breakers` are the gateways' local ones; `history`
    has what both arms had failed at earlier ticks and at this one, oldest first, as far back as
    triggers look. `prices` are USD an hour by replica, where known, `costs` the windows in which
    costs compare. `gpus` are those of the canary's replicas, `incidents` what happened to both arms
    on theirs, and `ceilings` the most rows that runs of the canary's replicas have, where they
    learned it.
    """

    now: float
    canary_ready: int
    canary_wanted: int
    stable_ready: int
    revision: int
    gateways_at: int
    canary_failed: str = ""
    current: bool = True
    counts: Mapping[int, EpochCounts] = field(default_factory=dict)
    providers: Mapping[str, ProviderState] = field(default_factory=dict)
    restarts: tuple[float, ...] = ()
    breakers: Breakers = field(default_factory=Breakers)
    history: tuple[Sample, ...] = ()
    prices: Mapping[str, float | None] = field(default_factory=dict)
    costs: CostWindows = field(default_factory=CostWindows)
    gpus: tuple[CanaryGpu, ...] = ()
    incidents: tuple[Incident, ...] = ()
    ceilings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hook:
    """A web service that the rollout waits for; `key` is where `Snapshot.providers` answers."""

    key: str
    url: str
    timeout_s: float
    secret_env: str = ""
