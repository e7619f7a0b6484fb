"""What running rollouts add to a layout and to the route table: pure functions of their records."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from typing import Any, Final

from serving.control.records import Record
from serving.core.plan import Layout, ServedModel
from serving.core.rollout_counts import LATENCY_BOUNDS
from serving.core.rollout_spec import RolloutSpec
from serving.core.rollout_states import State
from serving.core.rollout_types import Rollout
from serving.core.routing import ModelRoute, RouteTable, Split

_BEFORE_TRAFFIC: Final = frozenset({State.PENDING, State.PREPARING})


def default_version(rollout: Rollout) -> str:
    """The version that requests naming none get, but for the split."""
    return rollout.canary if rollout.state is State.SUCCEEDED else rollout.stable


def lay_out(layout: Layout, record: Record, also: Collection[str]) -> Layout:
    """A desired layout with the versions that the record's state asks for, and no others.

    `also` are versions of the model that are served whatever becomes of the rollout.
    """
    rollout = record.rollout
    model = layout.models.get(rollout.model)
    if model is None or record.released:
        return layout
    default = default_version(rollout)
    wanted = {default}
    if record.live and _runs_canary(record):
        wanted |= {rollout.stable, rollout.canary}
    versions = {v: s for v, s in model.versions.items() if v in wanted or v in also}
    versions |= {v: record.served.versions[v] for v in sorted(wanted - versions.keys(), key=int)}
    return _with_model(layout, rollout.model, ServedModel(default, versions))


def _runs_canary(record: Record) -> bool:
    if record.taking_back:
        # One that never had traffic may never have been allowed to begin.
        return record.rollout.had_traffic
    return record.rollout.stage is not State.PENDING


def switch(routed: Layout, record: Record) -> Layout:
    """A routed layout whose default version is the one that the record's state asks for.

    Both versions are routed and warm, so it takes one revision of the table.
    """
    rollout = record.rollout
    model = routed.models.get(rollout.model)
    default = default_version(rollout)
    if model is None or record.released or default not in model.versions:
        return routed
    if model.version not in (rollout.stable, rollout.canary):
        return routed
    return _with_model(routed, rollout.model, replace(model, version=default))


def _with_model(layout: Layout, name: str, model: ServedModel) -> Layout:
    if layout.models.get(name) == model:
        return layout
    return Layout({**layout.models, name: model})


def with_splits(table: RouteTable, records: Iterable[Record]) -> RouteTable:
    """The table with a split for every rollout that has traffic, or is being taken back."""
    models = dict(table.models)
    for record in records:
        route = models.get(record.rollout.model)
        if route is not None and _splits(record, route):
            models[route.name] = _with_split(route, record.rollout)
    return replace(table, models=models)


def _splits(record: Record, route: ModelRoute) -> bool:
    rollout = record.rollout
    return (
        rollout.active
        and rollout.stage not in _BEFORE_TRAFFIC
        and route.version == rollout.stable
        and rollout.canary in route.arms
    )


def _with_split(route: ModelRoute, rollout: Rollout) -> ModelRoute:
    # A request that finds no canary replica must not wait for one: stable takes it at once.
    canary = replace(route.arms[rollout.canary], role="canary", queue_hold_s=0.0)
    arms = {**route.arms, rollout.canary: canary}
    return replace(route, arms=arms, split=_split(rollout))


def _split(rollout: Rollout) -> Split:
    spec = rollout.spec
    overrides = tuple((o.header.lower(), o.value, o.to) for o in spec.assignment.overrides)
    kinds = {t.kind for t in spec.analysis.triggers}
    return Split(
        rollout=rollout.id,
        epoch=rollout.epoch,
        canary=rollout.canary,
        weight=rollout.weight,
        salt=rollout.salt,
        unit=spec.assignment.unit,
        # A version that is being taken back answers nobody.
        overrides=overrides if rollout.planned_weight or rollout.shadow else (),
        shield=spec.shield,
        breaker_failures=spec.breaker_failures,
        shadow=rollout.shadow,
        compare=_compare(spec),
        feedback=asdict(spec.feedback) if spec.feedback is not None else {},
        observe="drift" in kinds,
        latency_bound_s=_latency_bound_s(rollout),
    )


def _latency_bound_s(rollout: Rollout) -> float | None:
    bounds = rollout.current.latency_bounds
    if bounds is None:
        return None
    tail, _, alone = bounds
    baking = rollout.current.step == len(rollout.spec.steps)
    return LATENCY_BOUNDS[alone if baking else tail]


def _compare(spec: RolloutSpec) -> dict[str, Any]:
    return asdict(spec.shadow.compare) if spec.shadow is not None else {}
