"""The settings of a rollout plan, as pydantic models: what may be written, and within which bounds.

They carry no defaults of the plan itself: a plan is merged over the one that it builds on first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serving.core import rollout_spec as spec

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def _seconds(value: object) -> object:
    """Seconds from a number or from "90s", "2m", "1h30m"."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise PydanticCustomError("duration", _NO_DURATION)
    if not isinstance(value, str):
        return value
    parts = _DURATION.findall(value)
    if not parts or "".join(n + unit for n, unit in parts) != value:
        raise PydanticCustomError("duration", _NO_DURATION)
    return sum(float(n) * _UNITS[unit] for n, unit in parts)


_NO_DURATION: Final = 'is no duration; allowed: seconds, or a text like "15s", "2m", "1h30m"'


def _positive(seconds: float) -> float:
    if seconds > 0:
        return seconds
    raise PydanticCustomError(
        "duration", 'is too short; allowed: more than 0 s, as in "500ms", "15s", "2m"'
    )


def _off(value: object) -> object:
    """YAML reads `off` as false: what can be left out can be turned off."""
    return None if value is False else value


def _unit(value: str) -> str:
    if value == "request" or re.fullmatch(r"(header|cookie|parameter):[A-Za-z0-9_.-]+", value):
        return value
    raise PydanticCustomError(
        "unit", "is no unit; allowed: request, header:NAME, cookie:NAME, parameter:NAME"
    )


def _url(value: str) -> str:
    if re.fullmatch(r"https?://[^\s/?#@]+([/?#]\S*)?", value):
        return value
    raise PydanticCustomError(
        "url", "is no URL; allowed: http://… or https://…, without a user name"
    )


def _url_or_none(value: str) -> str:
    return _url(value) if value else value


def _variable(value: str) -> str:
    if not value or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        return value
    raise PydanticCustomError("variable", "is no name of an environment variable")


def _header(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
        return value.lower()
    raise PydanticCustomError("header", "is no name of a header")


def _metric(value: str) -> str:
    if not value or value in spec.METRIC_NAMES or re.fullmatch(r"\w+(\.\w+)*:\w+", value):
        return value
    raise PydanticCustomError("metric_name", "is no metric; {allowed}", {"allowed": _METRICS})


_METRICS: Final = f"allowed: {', '.join(spec.METRIC_NAMES)}, or module:function"

_SECONDS: Final = BeforeValidator(_seconds, json_schema_input_type=float | str)
Duration = Annotated[float, _SECONDS, Field(ge=0)]
Span = Annotated[float, _SECONDS, AfterValidator(_positive)]
"""A duration that would make no sense as 0: an interval, a window, a timeout."""
Url = Annotated[str, AfterValidator(_url)]
Unit = Annotated[str, AfterValidator(_unit)]
Header = Annotated[str, AfterValidator(_header)]
Variable = Annotated[str, AfterValidator(_variable)]
Share = Annotated[float, Field(gt=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class OverrideSettings(_Frozen):
    """`assignment.overrides`: a header's value that chooses the arm."""

    header: Header
    value: str
    to: spec.AssignedArm = "canary"


class AssignmentSettings(_Frozen):
    """`assignment`: what the split hashes."""

    unit: Unit
    overrides: tuple[OverrideSettings, ...]


class CompareSettings(_Frozen):
    """`shadow.compare`: when two answers differ."""

    kind: spec.CompareKind
    output: str | None
    rtol: float = Field(ge=0)
    atol: float = Field(ge=0)
    metric: Annotated[str, AfterValidator(_metric)]
    threshold: float

    @model_validator(mode="after")
    def _metric_named(self) -> CompareSettings:
        if (self.kind == "metric") != bool(self.metric):
            raise PydanticCustomError(
                "metric",
                "kind: metric and metric: NAME belong together; {allowed}",
                {"allowed": _METRICS},
            )
        return self


class ShadowSettings(_Frozen):
    """`shadow`: copied traffic before the first step."""

    percent: float = Field(gt=0, le=100)
    min_pairs: int = Field(ge=1)
    max_duration: Duration
    compare: CompareSettings


class GateSettings(_Frozen):
    """`steps.N.gate`: who must say yes after the hold."""

    type: spec.GateType = "manual"
    timeout: Span = spec.Gate().timeout_s
    on_timeout: spec.TimeoutAction = spec.Gate().on_timeout
    url: Annotated[str, AfterValidator(_url_or_none)] = ""
    secret_env: Variable = ""

    @model_validator(mode="after")
    def _url_for_webhook(self) -> GateSettings:
        if (self.type == "webhook") != bool(self.url):
            raise PydanticCustomError("gate", "type: webhook and url belong together")
        return self


class StepSettings(_Frozen):
    """`steps.N`: a weight, and how long it is held."""

    weight: float = Field(ge=0, lt=100)
    hold: Duration
    require_pass: tuple[str, ...] = ()
    gate: Annotated[GateSettings | None, BeforeValidator(_off)] = None


class BakeSettings(_Frozen):
    """`bake`: how long the new version is watched at full weight."""

    duration: Duration


class InsufficientDataSettings(_Frozen):
    """`analysis.on_insufficient_data`: what follows when evidence stays away."""

    after: Duration
    action: spec.TimeoutAction


class ProviderErrorsSettings(_Frozen):
    """`analysis.on_provider_error`: what follows when a provider is silent."""

    count: int = Field(ge=1)
    action: spec.TriggerAction


class TriggerSettings(_Frozen):
    """What every trigger has."""

    kind: spec.TriggerKind
    action: spec.TriggerAction


class BetSettings(TriggerSettings):
    """A trigger that has a share of the error budget."""

    weight: float = Field(gt=0, le=1)


class TwoArmsSettings(BetSettings):
    """errors, latency, drift and labels: tolerated is r0 times stable's rate plus delta."""

    r0: PositiveFloat
    delta: float = Field(ge=0, lt=1)


class LatencySettings(TwoArmsSettings):
    """latency: likewise of slow answers, where less than the floor makes no answer slow."""

    floor: Duration


class DisagreementSettings(BetSettings):
    """disagreement: tolerated is a share of pairs."""

    q0: Share


class CostSettings(BetSettings):
    """cost: tolerated is so much more per inference, as a share."""

    tolerance: float = Field(ge=0, le=10)


class WindowSettings(TriggerSettings):
    """crash_loop, oom and gpu_health: so many within the window."""

    failures: int = Field(ge=1)
    window: Span


class BreakerSettings(TriggerSettings):
    """breaker: so many openings."""

    failures: int = Field(ge=1)


class HeadroomSettings(TriggerSettings):
    """gpu_memory_headroom: the least free share of memory."""

    threshold: Share


class SloBurnSettings(TriggerSettings):
    """slo_burn: so many times the errors that the objective allows."""

    objective: Share = spec.Trigger("", "slo_burn").objective
    threshold: PositiveFloat
    window: Span
    failures: int = Field(ge=1)


class ProviderSettings(TriggerSettings):
    """webhook, and what promql has in common with it: asked at an interval."""

    url: Url
    interval: Span = spec.Trigger("", "promql").interval_s
    timeout: Span = spec.Trigger("", "promql").timeout_s
    failures: int = Field(ge=1)
    secret_env: Variable = ""


class PromQlSettings(ProviderSettings):
    """promql: bad while the query's value is beyond the threshold."""

    query: str = Field(min_length=1)
    operator: Literal[">", ">=", "<", "<="] = ">"
    threshold: float


TRIGGER_SETTINGS: Final[Mapping[spec.TriggerKind, type[TriggerSettings]]] = {
    "errors": TwoArmsSettings,
    "latency": LatencySettings,
    "disagreement": DisagreementSettings,
    "drift": TwoArmsSettings,
    "labels": TwoArmsSettings,
    "cost": CostSettings,
    "crash_loop": WindowSettings,
    "oom": WindowSettings,
    "gpu_health": WindowSettings,
    "gpu_memory_headroom": HeadroomSettings,
    "breaker": BreakerSettings,
    "slo_burn": SloBurnSettings,
    "promql": PromQlSettings,
    "webhook": ProviderSettings,
}


class AnalysisSettings(_Frozen):
    """`analysis`: the error budget. A trigger is validated by `TRIGGER_SETTINGS`."""

    alpha: Share
    beta: Share
    tick: Annotated[Duration, Field(ge=0.1, le=60)]
    min_units: int = Field(ge=1)
    min_events: int = Field(ge=1)
    on_insufficient_data: InsufficientDataSettings
    on_provider_error: ProviderErrorsSettings
    dry_run: bool
    triggers: dict[str, Any]


class WebhookSettings(_Frozen):
    """`webhooks.N`: asked or told at an event."""

    event: spec.WebhookEvent
    url: Url
    timeout: Span = spec.Webhook("event", "").timeout_s
    failures: int = Field(spec.Webhook("event", "").failures, ge=1)
    secret_env: Variable = ""


class FeedbackSettings(_Frozen):
    """`feedback`: labels that arrive after the answer."""

    window: Span = spec.Feedback().window_s
    output: str | None = None
    max_entries: int = Field(default=spec.Feedback().max_entries, ge=1, le=10_000_000)


class PlanSettings(_Frozen):
    """A whole plan, every setting filled in."""

    name: str = Field(min_length=1)
    assignment: AssignmentSettings
    shadow: Annotated[ShadowSettings | None, BeforeValidator(_off)]
    steps: tuple[StepSettings, ...]
    bake: BakeSettings
    keep_previous: Duration
    shield: bool
    breaker_failures: int = Field(ge=1)
    ready_timeout: Span
    analysis: AnalysisSettings
    webhooks: tuple[WebhookSettings, ...]
    feedback: Annotated[FeedbackSettings | None, BeforeValidator(_off)]
