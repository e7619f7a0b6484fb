"""Rollout plans as people write them: YAML, or a mapping inside the configuration, to a spec.

A plan names the one that it builds on (`plan`, by default canary) and what differs: mappings are
merged key by key, lists replace. Triggers are a mapping of name to settings, so that one of them
can be changed, added, or taken out with `off`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field as DataclassField
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from serving.core import rollout_spec as spec
from serving.core.rollout_spec import KIND_DEFAULTS, PLAN_NAMES, RolloutSpec, default_plan
from serving.errors import ConfigError
from serving.rollout_settings import (
    TRIGGER_SETTINGS,
    PlanSettings,
    ShadowSettings,
    StepSettings,
)
from serving.validation_text import problem
from serving.yaml_files import read_yaml


def load_plan(path: Path) -> RolloutSpec:
    """Read a plan file. Raises `ConfigError` naming the file, the key and what is allowed."""
    return parse_plan(read_plan(path), source=str(path))


def read_plan(path: Path) -> dict[str, Any]:
    """A plan file as a mapping that `parse_plan` takes, named as the file unless it says.

    Raises `ConfigError` where it cannot be read or is no mapping.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{path}: expected a mapping at the top level, found {found}")
    return {"name": path.stem, **raw}


def parse_plan(
    raw: str | Mapping[str, Any], *, source: str, ready_timeout_s: float | None = None
) -> RolloutSpec:
    """A spec from the name of a plan or from a mapping of what differs from one.

    `ready_timeout_s` is the model's: what the plan has where it says nothing, and may not exceed.
    Raises `ConfigError`; `source` names where it came from.
    """
    named = raw if isinstance(raw, str) else raw.get("plan", PLAN_NAMES[0])
    base = default_plan(_base(named, source, "plan"))
    if ready_timeout_s is not None:
        base = replace(base, ready_timeout_s=ready_timeout_s)
    if isinstance(raw, str):
        return base
    changes = {key: value for key, value in raw.items() if key != "plan"}
    written = _merged(_as_written(base), changes)
    plan: PlanSettings = _validated(PlanSettings, written, source, ())
    # YAML reads `off` as false.
    triggers = tuple(
        _trigger(name, settings, source)
        for name, settings in plan.analysis.triggers.items()
        if settings is not None and settings is not False
    )
    return _checked(_spec(plan, triggers), source, ready_timeout_s)


def _base(name: object, source: str, where: str) -> str:
    if name not in PLAN_NAMES:
        allowed = ", ".join(PLAN_NAMES)
        raise ConfigError(f"{source}: {where}: {name!r} is no plan; allowed: {allowed}")
    return str(name)


def _as_written(value: Any) -> Any:
    """A spec as the mapping that a person would have written, with every default in it."""
    if isinstance(value, RolloutSpec):
        written = _settings(value)
        written["name"] = written.pop("plan")
        triggers = {t.name: _trigger_settings(t) for t in value.analysis.triggers}
        written["analysis"] = {**written["analysis"], "triggers": triggers}
        return written
    if is_dataclass(value):
        return _settings(value)
    return [_as_written(v) for v in value] if isinstance(value, tuple) else value


def _settings(value: Any) -> dict[str, Any]:
    return {_key(f.name): _as_written(getattr(value, f.name)) for f in fields(value)}


def _trigger_settings(trigger: spec.Trigger) -> dict[str, Any]:
    """Of a trigger's fields those that its kind knows."""
    known = TRIGGER_SETTINGS[trigger.kind].model_fields
    return {key: value for key, value in _settings(trigger).items() if key in known}


def _key(field: str) -> str:
    """Durations are written without their unit: it is part of the value."""
    return field.removesuffix("_s")


def _merged(base: Any, changes: Any, where: str = "") -> Any:
    if not isinstance(changes, Mapping):
        return changes
    if base is None:
        # Off in the base plan: turned on with its defaults.
        base = {"shadow": _as_written(spec.Shadow())}.get(where, {})
    if not isinstance(base, Mapping):
        return changes
    return {
        **base,
        **{key: _merged(base.get(key), value, str(key)) for key, value in changes.items()},
    }


def _trigger(name: str, settings: object, source: str) -> spec.Trigger:
    where = ("analysis", "triggers", name)
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{source}: {'.'.join(where)}: write its settings, or `off` without it")
    kind = settings.get("kind", name)
    if kind not in TRIGGER_SETTINGS:
        allowed = ", ".join(TRIGGER_SETTINGS)
        raise ConfigError(
            f"{source}: {'.'.join(where)}: {kind!r} is no kind of trigger; allowed: {allowed}"
        )
    known = spec.default_trigger(kind)
    defaults = {k: v for k, v in KIND_DEFAULTS[kind].items() if _key(k) not in settings}
    written = {**{_key(k): v for k, v in defaults.items()}, **settings, "kind": kind}
    found = _validated(TRIGGER_SETTINGS[kind], written, source, where)
    names = {f.name for f in fields(known)}
    values = {f: getattr(found, _key(f)) for f in names if hasattr(found, _key(f))}
    return spec.Trigger(**{**values, "name": name})


_ModelT = TypeVar("_ModelT", bound=BaseModel)


def _validated(model: type[_ModelT], raw: object, source: str, where: tuple[str, ...]) -> _ModelT:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = (_explain(model, where, e) for e in error.errors())
        raise ConfigError(f"{source}: {'; '.join(problems)}") from error


def _explain(model: type[BaseModel], prefix: tuple[str, ...], error: Any) -> str:
    where = ".".join(str(part) for part in (*prefix, *error["loc"])) or "(top level)"
    kind, found = error["type"], error["input"]
    if kind == "extra_forbidden":
        allowed = ", ".join(_allowed_keys(model, error["loc"][:-1]))
        return f"unknown key {where!r}; allowed here: {allowed}"
    if found is None:
        return f"{where!r} has nothing after it; write its settings"
    if kind == "missing":
        return f"{where}: {problem(error)}"
    if kind in ("model_type", "dict_type"):
        return f"{where}: {found!r} is no mapping of settings"
    if kind == "tuple_type":
        return f"{where}: {found!r} is no list"
    if kind in ("duration", "unit", "url", "variable", "header", "metric_name"):
        return f"{where}: {found!r} {error['msg']}"
    if isinstance(found, (Mapping, BaseModel)):
        return f"{where}: {problem(error)}"
    return f"{where}: {problem(error)} (found {found!r})"


def _allowed_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str):
            model = _inner(model.model_fields[part].annotation) or model
    return sorted({*model.model_fields, "plan"} if model is PlanSettings else model.model_fields)


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The settings inside an annotation: of `X | None`, of `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _inner(a)) is not None), None)


def _spec(plan: PlanSettings, triggers: tuple[spec.Trigger, ...]) -> RolloutSpec:
    analysis = plan.analysis
    return RolloutSpec(
        plan=plan.name,
        assignment=spec.Assignment(
            plan.assignment.unit,
            tuple(_plain(spec.Override, o) for o in plan.assignment.overrides),
        ),
        shadow=_shadow(plan.shadow),
        steps=tuple(_step(s) for s in plan.steps),
        bake=_plain(spec.Bake, plan.bake),
        keep_previous_s=plan.keep_previous,
        shield=plan.shield,
        breaker_failures=plan.breaker_failures,
        ready_timeout_s=plan.ready_timeout,
        analysis=_plain(
            spec.Analysis,
            analysis,
            on_insufficient_data=_plain(spec.InsufficientData, analysis.on_insufficient_data),
            on_provider_error=_plain(spec.ProviderErrors, analysis.on_provider_error),
            triggers=triggers,
        ),
        webhooks=tuple(_plain(spec.Webhook, w) for w in plan.webhooks),
        feedback=None if plan.feedback is None else _plain(spec.Feedback, plan.feedback),
    )


def _shadow(shadow: ShadowSettings | None) -> spec.Shadow | None:
    if shadow is None:
        return None
    return _plain(spec.Shadow, shadow, compare=_plain(spec.Compare, shadow.compare))


def _step(step: StepSettings) -> spec.Step:
    return _plain(spec.Step, step, gate=None if step.gate is None else _plain(spec.Gate, step.gate))


_SpecT = TypeVar("_SpecT")


def _plain(kind: type[_SpecT], settings: BaseModel, **built: Any) -> _SpecT:
    """A dataclass of the spec with the fields of a validated mapping."""
    values = {f.name: getattr(settings, _key(f.name)) for f in _fields(kind) if f.name not in built}
    return kind(**values, **built)


def _fields(kind: Any) -> tuple[DataclassField[Any], ...]:
    return fields(kind)


def _checked(plan: RolloutSpec, source: str, ready_timeout_s: float | None) -> RolloutSpec:
    """What no single setting shows. Raises `ConfigError`."""
    if ready_timeout_s is not None and plan.ready_timeout_s > ready_timeout_s:
        raise ConfigError(
            f"{source}: ready_timeout: {plan.ready_timeout_s:g} s is more than the model's "
            f"ready_timeout_s, after which a version is given up; allowed: at most "
            f"{ready_timeout_s:g} s"
        )
    names = ", ".join(t.name for t in plan.analysis.triggers) or "none"
    for i, step in enumerate(plan.steps):
        for name in step.require_pass:
            if plan.analysis.trigger(name) is None:
                raise ConfigError(
                    f"{source}: steps.{i}.require_pass: {name!r} is no trigger; allowed: {names}"
                )
    for i, (before, after) in enumerate(pairwise(plan.steps), start=1):
        if after.weight < before.weight:
            raise ConfigError(
                f"{source}: steps.{i}.weight: {after.weight:g} is less than the step before; "
                "weights may only grow"
            )
    shares = sum(t.weight for t in plan.analysis.triggers)
    if shares > 1 + 1e-9:
        raise ConfigError(
            f"{source}: analysis.triggers: the weights add up to {shares:g}; "
            "they share one error budget, so at most 1: "
            + ", ".join(f"{t.name} {t.weight:g}" for t in plan.analysis.triggers if t.weight)
        )
    return plan
