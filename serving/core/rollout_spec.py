"""A rollout plan: who gets the new version, how fast, and what takes it back.

Frozen dataclasses, defaults inside. `serving.rollout_plans` builds them from YAML and checks what a
person wrote; here every value is taken as valid. Durations are seconds (fields end in `_s`),
weights and percentages are percent as people write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

TriggerKind = Literal[
    "errors",
    "latency",
    "disagreement",
    "drift",
    "labels",
    "cost",
    "crash_loop",
    "oom",
    "gpu_health",
    "gpu_memory_headroom",
    "breaker",
    "slo_burn",
    "promql",
    "webhook",
]
TriggerAction = Literal["rollback", "pause"]
TimeoutAction = Literal["pause", "rollback", "proceed"]
CompareKind = Literal["argmax", "tolerance", "exact", "metric", "none"]
MetricName = Literal["max_abs", "max_rel", "cosine", "mse"]
GateType = Literal["manual", "webhook"]
WebhookEvent = Literal["pre-rollout", "pre-step", "post-rollout", "event"]
AssignedArm = Literal["canary", "stable"]

TRIGGER_KINDS: Final[tuple[TriggerKind, ...]] = get_args(TriggerKind)
METRIC_NAMES: Final[tuple[MetricName, ...]] = get_args(MetricName)
"""The built-in measures of how far one output is from another."""
FLOOR_S: Final = 0.0005
"""What a latency trigger takes for noise of the machine, where its plan does not say."""
PROVIDER_KINDS: Final = frozenset({"promql", "webhook"})
"""Triggers that ask somebody else, who may not answer."""
OPTIONAL_KINDS: Final = PROVIDER_KINDS | {"gpu_memory_headroom"}
"""Triggers that no plan has unless it says so."""
PLAN_NAMES: Final = ("canary", "blue-green", "shadow-only", "fast")


@dataclass(frozen=True, slots=True)
class Override:
    """A request whose header has this value goes to this arm and is not analysed."""

    header: str
    value: str
    to: AssignedArm = "canary"


def counted_by(unit: str) -> str:
    """What errors are counted by where the split hashes `unit`, in the plural.

    What keeps to its version across requests, by whatever name, is a user.
    """
    return "requests" if unit == "request" else "users"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the split hashes: "request", "header:NAME", "cookie:NAME" or "parameter:NAME"."""

    unit: str = "request"
    overrides: tuple[Override, ...] = ()

    @property
    def units(self) -> str:
        """What errors are counted by, in the plural."""
        return counted_by(self.unit)


@dataclass(frozen=True, slots=True)
class Compare:
    """How a shadow's answer is compared with the one that the client got.

    `output` is the tensor compared (None: the first). `rtol` and `atol` are for "tolerance";
    `metric` is one of `METRIC_NAMES` or "module:function" for "metric", a pair disagrees when it is
    more than `threshold`. "none" copies the traffic and compares nothing.
    """

    kind: CompareKind = "argmax"
    output: str | None = None
    rtol: float = 1e-3
    atol: float = 1e-5
    metric: str = ""
    threshold: float = 0.0


@dataclass(frozen=True, slots=True)
class Shadow:
    """Copies of requests that stable answers. Ends at `min_pairs` or after `max_duration_s`."""

    percent: float = 20.0
    min_pairs: int = 2000
    max_duration_s: float = 900.0
    compare: Compare = Compare()


@dataclass(frozen=True, slots=True)
class Gate:
    """What must say yes after a step's hold: a person, or the web service at `url`.

    `secret_env` names the environment variable with the key that signs what is sent; "" signs
    nothing.
    """

    type: GateType = "manual"
    timeout_s: float = 86_400.0
    on_timeout: TimeoutAction = "pause"
    url: str = ""
    secret_env: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """`weight` percent of traffic for at least `hold_s`; `require_pass` names triggers."""

    weight: float
    hold_s: float
    require_pass: tuple[str, ...] = ()
    gate: Gate | None = None


@dataclass(frozen=True, slots=True)
class Bake:
    """How long the new version is watched at full weight before the rollout has succeeded."""

    duration_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class InsufficientData:
    """What to do when a step waits this long for evidence that traffic does not give."""

    after_s: float = 1800.0
    action: TimeoutAction = "pause"


@dataclass(frozen=True, slots=True)
class ProviderErrors:
    """What to do when a provider failed to answer this many times in a row."""

    count: int = 5
    action: TriggerAction = "pause"


@dataclass(frozen=True, slots=True)
class Trigger:
    """One reason to take a version back.

    `weight` is its share of α; 0 for hard triggers, which count instead of betting. Per kind:

    - errors, latency, drift, labels: `r0` and `delta`, tolerated is p_canary ≤ r0·p_stable + delta;
    - latency: an answer is slow only if it takes `floor_s` longer than stable's usual ones. A
      process that gets two requests a second answers later than one that is always awake;
    - disagreement: tolerated is a share `q0` of pairs;
    - cost: tolerated is a share `tolerance` more per inference; judged at equal size only;
    - crash_loop: `failures` restarts within `window_s`;
    - oom: `failures` runs that did not fit into memory within `window_s`;
    - gpu_health: an XID error of the program, or errors on `failures` GPUs; for `window_s` it holds
      after a fault of a GPU itself;
    - gpu_memory_headroom: less than a share `threshold` of a GPU's or a lease's memory free;
    - breaker: `failures` openings of a gateway's local breaker;
    - slo_burn: errors at `threshold` times the rate that `objective` allows, over `window_s` and
      over a fifth of it, with at least `failures` failed requests;
    - promql: `query` at `url`, bad while its value is `operator` `threshold`; asked every
      `interval_s`, `failures` bad answers in a row;
    - webhook: bad while the web service at `url` answers "fail"; likewise.

    `secret_env` names the environment variable with the bearer token of a promql trigger, or with
    the key that signs what is sent to a webhook; "" for neither.
    """

    name: str
    kind: TriggerKind
    weight: float = 0.0
    action: TriggerAction = "rollback"
    r0: float = 1.0
    delta: float = 0.0
    q0: float = 0.02
    floor_s: float = FLOOR_S
    tolerance: float = 0.05
    query: str = ""
    url: str = ""
    operator: Literal[">", ">=", "<", "<="] = ">"
    threshold: float = 0.0
    interval_s: float = 15.0
    timeout_s: float = 5.0
    secret_env: str = ""
    window_s: float = 300.0
    failures: int = 3
    objective: float = 0.999


KIND_DEFAULTS: Final[Mapping[TriggerKind, Mapping[str, Any]]] = {
    "errors": {"weight": 0.30, "action": "rollback", "r0": 1.5, "delta": 0.001},
    "latency": {
        "weight": 0.25,
        "action": "rollback",
        "r0": 1.0,
        "delta": 0.01,
        "floor_s": FLOOR_S,
    },
    "disagreement": {"weight": 0.20, "action": "rollback", "q0": 0.02},
    "drift": {"weight": 0.05, "action": "pause", "r0": 1.25, "delta": 0.02},
    "labels": {"weight": 0.05, "action": "rollback", "r0": 1.0, "delta": 0.01},
    "cost": {"weight": 0.15, "action": "pause", "tolerance": 0.05},
    "crash_loop": {"action": "rollback", "failures": 2, "window_s": 300.0},
    "oom": {"action": "rollback", "failures": 2, "window_s": 60.0},
    "gpu_health": {"action": "rollback", "failures": 2, "window_s": 300.0},
    "gpu_memory_headroom": {"action": "pause", "threshold": 0.05},
    "breaker": {"action": "rollback", "failures": 1},
    "slo_burn": {"action": "rollback", "threshold": 14.4, "window_s": 300.0, "failures": 10},
    "promql": {"action": "pause", "failures": 3},
    "webhook": {"action": "pause", "failures": 3},
}
"""What a trigger of a kind has where its plan does not say."""


def default_trigger(kind: TriggerKind) -> Trigger:
    """The trigger of a kind with its defaults, named as its kind."""
    return Trigger(name=kind, kind=kind, **KIND_DEFAULTS[kind])


# A promql or webhook trigger needs a query or a URL, and how full a GPU may be differs.
DEFAULT_TRIGGERS: Final = tuple(
    default_trigger(kind) for kind in TRIGGER_KINDS if kind not in OPTIONAL_KINDS
)


@dataclass(frozen=True, slots=True)
class Analysis:
    """The error budget and the triggers that share it.

    `alpha` bounds the chance that a healthy version is taken back, `beta` that a bad one passes.
    A trigger says nothing before `min_units` canary units and `min_events` events. `dry_run`
    records verdicts and acts on none.
    """

    alpha: float = 0.01
    beta: float = 0.05
    tick_s: float = 1.0
    min_units: int = 50
    min_events: int = 3
    on_insufficient_data: InsufficientData = InsufficientData()
    on_provider_error: ProviderErrors = ProviderErrors()
    dry_run: bool = False
    triggers: tuple[Trigger, ...] = DEFAULT_TRIGGERS

    def trigger(self, name: str) -> Trigger | None:
        """The trigger of this name."""
        return next((t for t in self.triggers if t.name == name), None)


@dataclass(frozen=True, slots=True)
class Webhook:
    """A web service that is told, or asked.

    "pre-rollout" and "pre-step" are asked and must answer "ok" before the rollout goes on;
    `failures` times "fail" in a row take it back. "post-rollout" and "event" are told.
    `secret_env` names the environment variable with the key that signs what is sent.
    """

    event: WebhookEvent
    url: str
    timeout_s: float = 10.0
    failures: int = 3
    secret_env: str = ""


@dataclass(frozen=True, slots=True)
class Feedback:
    """How long an answer waits for its label, and the output that labels are compared with.

    `max_entries` is how many answers a gateway keeps; of more it forgets the oldest.
    """

    window_s: float = 3600.0
    output: str | None = None
    max_entries: int = 200_000


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """A whole plan. Stable keeps its capacity until the bake ends and for `keep_previous_s` after.

    `shield`: stable answers what the canary fails. `breaker_failures`: consecutive hard failures
    after which a gateway stops sending to the canary on its own. `ready_timeout_s`: how long the
    canary may take to become ready, or be without a ready replica, and a rollback to come to its
    end; by default the model's own.
    """

    plan: str = "canary"
    assignment: Assignment = Assignment()
    shadow: Shadow | None = None
    steps: tuple[Step, ...] = ()
    bake: Bake = Bake()
    keep_previous_s: float = 3600.0
    shield: bool = True
    breaker_failures: int = 8
    ready_timeout_s: float = 300.0
    analysis: Analysis = Analysis()
    webhooks: tuple[Webhook, ...] = ()
    feedback: Feedback | None = None

    def webhook(self, event: WebhookEvent) -> tuple[Webhook, ...]:
        """The webhooks of an event, in the order of the plan."""
        return tuple(w for w in self.webhooks if w.event == event)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the store and the wire."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RolloutSpec:
        """Read `to_dict`'s form, after JSON too."""
        return cls(
            **{
                **raw,
                "assignment": Assignment(
                    raw["assignment"]["unit"],
                    tuple(Override(**o) for o in raw["assignment"]["overrides"]),
                ),
                "shadow": _shadow(raw["shadow"]),
                "steps": tuple(_step(s) for s in raw["steps"]),
                "bake": Bake(**raw["bake"]),
                "analysis": _analysis(raw["analysis"]),
                "webhooks": tuple(Webhook(**w) for w in raw["webhooks"]),
                "feedback": Feedback(**raw["feedback"]) if raw["feedback"] else None,
            }
        )


def _shadow(raw: Mapping[str, Any] | None) -> Shadow | None:
    return Shadow(**{**raw, "compare": Compare(**raw["compare"])}) if raw else None


def _step(raw: Mapping[str, Any]) -> Step:
    gate = Gate(**raw["gate"]) if raw["gate"] else None
    return Step(**{**raw, "require_pass": tuple(raw["require_pass"]), "gate": gate})


def _analysis(raw: Mapping[str, Any]) -> Analysis:
    return Analysis(
        **{
            **raw,
            "on_insufficient_data": InsufficientData(**raw["on_insufficient_data"]),
            "on_provider_error": ProviderErrors(**raw["on_provider_error"]),
            "triggers": tuple(Trigger(**t) for t in raw["triggers"]),
        }
    )


def default_plan(name: str) -> RolloutSpec:
    """A plan of `PLAN_NAMES`, as configs/rollouts/NAME.yaml spells it out.

    Raises `KeyError` for any other name.
    """
    return _PLANS[name]


_PLANS: Final[Mapping[str, RolloutSpec]] = {
    "canary": RolloutSpec(
        plan="canary",
        shadow=Shadow(),
        steps=(
            Step(weight=1, hold_s=120),
            Step(weight=5, hold_s=300),
            Step(weight=25, hold_s=300),
            Step(weight=50, hold_s=300),
        ),
    ),
    "blue-green": RolloutSpec(plan="blue-green", shadow=Shadow()),
    "shadow-only": RolloutSpec(
        plan="shadow-only",
        shadow=Shadow(percent=100, max_duration_s=3600),
        # No client gets its answers: after the shadow a person promotes it or lets it go.
        steps=(Step(weight=0, hold_s=0, gate=Gate(on_timeout="rollback")),),
    ),
    "fast": RolloutSpec(
        plan="fast",
        shadow=Shadow(percent=50, min_pairs=200, max_duration_s=10),
        steps=(
            Step(weight=5, hold_s=5),
            Step(weight=25, hold_s=10),
            Step(weight=50, hold_s=10),
        ),
        bake=Bake(duration_s=10),
        keep_previous_s=600,
        analysis=Analysis(on_insufficient_data=InsufficientData(after_s=60)),
    ),
}
