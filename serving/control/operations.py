"""What an operator asks for: applies, rollouts and commands, each one transaction or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

from serving.config import ServingConfig, parse_config
from serving.control.going_back import refusal, switched
from serving.control.intents import (
    Intent,
    Situation,
    check_outputs,
    check_signature,
    intend,
    plan_rows,
)
from serving.control.layout import (
    Pins,
    build_layout,
    check_fixed_settings,
    references,
    served_version,
)
from serving.control.placer import Placer
from serving.control.reconcile import Blocking, Clock, Reconciler
from serving.control.records import Record
from serving.control.rollout_views import planned, shown
from serving.control.rollouts import Change, Rollouts
from serving.control.state import Resolved, Resolver
from serving.control.totals import ArmTotals
from serving.core.plan import Layout, PlanRow, ServedModel, ServedVersion, compare
from serving.core.rollout_spec import PLAN_NAMES, RolloutSpec
from serving.errors import ConflictError, NotFound, RegistryError
from serving.model_settings import ModelConfig
from serving.rollout_plans import parse_plan
from serving.store.audit import AuditEntry
from serving.store.pins import PinRow
from serving.store.sql import Store

NOBODY: Final = "unknown"
"""The actor of who does not say."""
_APPLIES: Final = 1000
"""So many are looked through for the one that switched a model's version."""


class Operations:
    """Turns what an operator asks for into commits. Lives on the controller's loop.

    One apply or start at a time: the next one sees this one's result.
    """

    def __init__(
        self,
        config: ServingConfig,
        reconciler: Reconciler,
        rollouts: Rollouts,
        placer: Placer,
        *,
        store: Store,
        in_store: Blocking,
        resolver: Resolver,
        in_registry: Blocking,
        clock: Clock,
        listen_tcp: bool,
    ) -> None:
        self._config = config
        self._reconciler = reconciler
        self._rollouts = rollouts
        self._placer = placer
        self._store, self._in_store = store, in_store
        self._resolver, self._in_registry = resolver, in_registry
        self._clock = clock
        self._listen_tcp = listen_tcp
        self._turn = asyncio.Lock()

    async def apply(
        self, raw: Mapping[str, Any], *, dry_run: bool, actor: str = NOBODY, reason: str = ""
    ) -> dict[str, Any]:
        """Resolve a configuration, and unless `dry_run` make it the one to converge to.

        Returns the plan. Raises `OperatorError`.
        """
        async with self._turn:
            config = parse_config(dict(raw), source="configuration")
            check_fixed_settings(config, self._config)
            pins = await self._in_registry(self._resolver.resolve, references(config))
            await self._check_pins(pins)
            asked = build_layout(config, pins, listen_tcp=self._listen_tcp)
            async with self._reconciler.lock:
                return await self._apply(config, pins, asked, dry_run, actor, reason)

    async def _apply(
        self,
        config: ServingConfig,
        pins: Pins,
        asked: Layout,
        dry_run: bool,
        actor: str,
        reason: str,
    ) -> dict[str, Any]:
        before = self._reconciler.state
        intents = {
            name: await self._intent(config, name, asked.models[name]) for name in asked.models
        }
        layout = Layout({name: intent.desired for name, intent in intents.items()})
        gone = before.desired.models.keys() - asked.models.keys()
        placement = self._placement(layout, intents, gone)
        if not dry_run:
            self._placer.check(placement)
        started = [] if dry_run else await self._begun(config, intents, actor, reason)
        plan = {
            "apply": before.apply_id if dry_run else before.apply_id + 1,
            "dry_run": dry_run,
            "changes": [asdict(row) for row in self._rows(asked, layout, intents)],
            "rollouts": [{"model": r.rollout.model, "id": r.rollout.id} for r in started],
        }
        if dry_run:
            return {**plan, "placement": placement}
        now = self._clock.unix()
        state = replace(
            before,
            config=config.model_dump(mode="json"),
            desired=layout,
            given_up={},
            apply_id=before.apply_id + 1,
            applied_at=now,
            also={name: _also(config.models[name], name, pins) for name in asked.models},
        )
        pinned = [PinRow(m, ref, pin.version, pin.digest, now) for (m, ref), pin in pins.items()]
        body = {**plan, "switched": switched(before.desired, layout), "reason": reason}
        audit = AuditEntry(now, actor, "apply", "configuration", body)
        change = Change(state, (audit,), pinned, ("apply", plan))
        await self._rollouts.apply(intents, gone, started, change, actor=actor)
        self._reconciler.fleet.forget_failed(self._reconciler.state.desired.apps())
        return plan

    async def start(
        self, model: str, to: str, plan: Any, *, actor: str = NOBODY, reason: str = ""
    ) -> dict[str, Any]:
        """Start a rollout to one version; `plan` is a name, a mapping or None for the model's own.

        Returns the rollout. Raises `OperatorError` or `NotFound`.
        """
        async with self._turn:
            config, target, pin = await self._target(model, to)
            spec = self._spec(model, config, plan)
            async with self._reconciler.lock:
                self._check_idle(model)
                stable = self._stable(model, target)
                check_outputs(spec, stable)
                self._check_room(model, target)
                record = await self._rollouts.begin(
                    model, stable, target, spec, actor=actor, reason=reason or f"to version {to}"
                )
                before = self._reconciler.state
                given_up = {n: e for n, e in before.given_up.items() if n != target.app.name}
                kept = await self._in_store(self._store.get_pins)
                pins = [p for p in kept if (p.model, p.ref) != (model, to)]
                pins.append(PinRow(model, to, pin.version, pin.digest, self._clock.unix()))
                change = Change(replace(before, given_up=given_up), pins=pins)
                await self._rollouts.start(record, change)
                self._reconciler.fleet.forget_failed([target.app.name])
                return self.shown(record)

    async def plan(self, model: str, to: str, plan: Any, rate: float) -> dict[str, Any]:
        """What `start` would do; nothing changes. `rate` is the model's requests a second now.

        Raises as `start` does.
        """
        config, target, _ = await self._target(model, to)
        spec = self._spec(model, config, plan)
        stable = self._stable(model, target)
        check_outputs(spec, stable)
        self._check_room(model, target)
        totals = self._reconciler.totals.sum().get((model, stable.arm.version), ArmTotals())
        return planned(
            model,
            stable.arm.version,
            target.arm.version,
            spec,
            requests_per_s=rate,
            answers=totals,
            replicas=target.app.count,
        )

    async def command(
        self, key: str, name: str, *, actor: str, reason: str, expected_state: str | None
    ) -> dict[str, Any]:
        """Tell a rollout, by its id or its model, what to do; the rollout after it.

        Raises `NotFound`, `ConflictError` or `StoreError`.
        """
        async with self._reconciler.lock:
            if name == "rollback":
                await self._check_way_back(key)
            record = await self._rollouts.command(
                key, name, actor=actor, reason=reason, expected_state=expected_state
            )
            return self.shown(record)

    def shown(self, record: Record) -> dict[str, Any]:
        """A rollout with what its arms counted, and what happens next."""
        observer = self._rollouts.observer
        return shown(record, observer.sight(record), observer)

    # What a model is to become.

    async def _intent(self, config: ServingConfig, name: str, asked: ServedModel) -> Intent:
        state, target = self._reconciler.state, asked.versions[asked.version]
        past = await self._rollouts.latest_to(name, asked.version, target.arm.digest)
        rebuilt = None
        if past is not None:
            arm = past.served.versions[past.rollout.stable].arm
            pin = Resolved(arm.version, arm.digest, arm.platform, arm.signature)
            rebuilt = served_version(config, name, pin, listen_tcp=self._listen_tcp)
        seen = Situation(
            state.desired.models.get(name),
            state.routed.models.get(name),
            self._rollouts.of(name),
            past,
            rebuilt,
            _resized(state.config, config.models[name], name),
        )
        return intend(asked, config.models[name].rollout_plan, seen)

    async def _begun(
        self, config: ServingConfig, intents: Mapping[str, Intent], actor: str, reason: str
    ) -> list[Record]:
        begun = []
        for name, intent in intents.items():
            spec = config.models[name].rollout_plan
            if intent.kind != "rollout" or spec is None:
                continue
            assert intent.stable is not None
            assert intent.canary is not None
            why = reason or "another version was applied"
            begun.append(
                await self._rollouts.begin(
                    name, intent.stable, intent.canary, spec, actor=actor, reason=why
                )
            )
        return begun

    def _placement(
        self, layout: Layout, intents: Mapping[str, Intent], gone: Iterable[str]
    ) -> dict[str, Any]:
        """Where what runs, what the layout adds and the canaries of new rollouts are to go."""
        canaries = {n: i.canary for n, i in intents.items() if i.kind == "rollout" and i.canary}
        new = [*layout.apps().values(), *(c.app for c in canaries.values())]
        return self._placer.preview(
            self._reconciler.state,
            self._rollouts.records,
            new,
            rolling_out=canaries.keys(),
            leaving=set(gone),
        )

    def _check_room(self, model: str, target: ServedVersion) -> None:
        """Raise `ConflictError` where the version does not fit beside what runs."""
        state, records = self._reconciler.state, self._rollouts.records
        placement = self._placer.preview(state, records, [target.app], rolling_out=[model])
        self._placer.check(placement)

    def _rows(self, asked: Layout, layout: Layout, intents: Mapping[str, Intent]) -> list[PlanRow]:
        state = self._reconciler.state
        rows = compare(layout, state.desired, state.routed, state.given_up)
        return plan_rows(rows, asked, intents, self._rollouts.records, self._clock.unix())

    async def _target(self, model: str, to: str) -> tuple[ModelConfig, ServedVersion, Resolved]:
        state = self._reconciler.state
        config = (
            parse_config(dict(state.config), source="what was applied") if state.config else None
        )
        if config is None or model not in config.models:
            served = ", ".join(sorted(config.models)) if config else ""
            raise NotFound(f"model {model!r} is not served; served: {served or 'none'}")
        pins = await self._in_registry(self._resolver.resolve, [(model, to)])
        await self._check_pins(pins)
        pin = pins[model, to]
        target = served_version(config, model, pin, listen_tcp=self._listen_tcp)
        return config.models[model], target, pin

    def _stable(self, model: str, target: ServedVersion) -> ServedVersion:
        """The version that a rollout would replace. Raises `ConflictError` where none can begin."""
        state, version = self._reconciler.state, target.arm.version
        routed = state.routed.models.get(model)
        if routed is None:
            raise ConflictError(f"model {model!r} does not answer yet: there is nothing to compare")
        if routed.version == version:
            raise ConflictError(f"model {model!r} answers with version {version} already")
        stable = routed.versions[routed.version]
        check_signature(version, stable, target)
        return stable

    async def _check_way_back(self, key: str) -> None:
        """Raise `ConflictError` where nothing is kept to go back to, `NotFound`, `StoreError`."""
        try:
            newest = await self._rollouts.find(key)
        except NotFound:
            if key not in self._reconciler.state.desired.models:
                raise
            newest = None
        if newest is not None and newest.live:
            # The way back is there: it must not wait for the audit log to be read.
            return
        name = newest.rollout.model if newest is not None else key
        model = self._reconciler.state.desired.models.get(name)
        if model is None:
            return
        read = partial(self._store.audit, limit=_APPLIES, subject="configuration")
        if why := refusal(name, model.version, newest, await self._in_store(read)):
            raise ConflictError(why)

    def _check_idle(self, model: str) -> None:
        if running := self._rollouts.of(model):
            other = running[-1].rollout
            raise ConflictError(
                f"rollout {other.id} of model {model!r} to version {other.canary} is "
                f"{other.state.value}; abort it first"
            )

    def _spec(self, name: str, model: ModelConfig, plan: Any) -> RolloutSpec:
        own = model.rollout_plan if plan is None else None
        named = PLAN_NAMES[0] if plan is None else plan
        return own or parse_plan(
            named, source=f"model {name!r}", ready_timeout_s=model.ready_timeout_s
        )

    async def _check_pins(self, pins: Pins) -> None:
        """A version number is never given twice: with another digest it is not the same version."""
        known = await self._in_store(self._store.digests)
        for (model, _), pin in pins.items():
            if (digest := known.get((model, pin.version), pin.digest)) != pin.digest:
                raise RegistryError(
                    f"model {model!r} version {pin.version} has digest {pin.digest} in the "
                    f"registry, but it was {digest} when it was first applied: it was replaced; "
                    "register the file as another version"
                )


def _resized(applied: Mapping[str, Any], model: ModelConfig, name: str) -> bool:
    """Whether another number of replicas is asked for than what was applied last."""
    before, after = applied.get("models", {}).get(name), model.model_dump(mode="json")
    return before is not None and any(before.get(k) != after[k] for k in ("replicas", "scaling"))


def _also(model: ModelConfig, name: str, pins: Pins) -> list[str]:
    return sorted({pins[name, ref].version for ref in model.also_serve}, key=int)
