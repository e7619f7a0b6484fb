"""What an apply does about each model whose version it changes: pure decisions.

A model that runs gets another version by a rollout, unless its plan is `immediate`. What was taken
back before is not tried again: an apply repeats what a file says, and must not repeat a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from serving.control.records import Record
from serving.core.plan import Change, Layout, PlanRow, ServedModel, ServedVersion
from serving.core.rollout_spec import RolloutSpec
from serving.core.rollout_states import State
from serving.core.rollout_timing import span
from serving.core.rollout_types import Rollout
from serving.core.types import Signature, TensorSpec
from serving.errors import ConfigError, ConflictError

Kind = Literal["direct", "rollout", "goes_on", "held"]


@dataclass(frozen=True, slots=True)
class Situation:
    """One model before an apply.

    `current` is what it is to run, `routed` what gateways route. `running` are its rollouts that
    are not over, oldest first. `past` is the latest rollout to the version that is asked for.
    `rebuilt` is that one's stable version with today's settings. `resized`: the apply asks for
    another number of replicas than the last one.
    """

    current: ServedModel | None
    routed: ServedModel | None
    running: Sequence[Record] = ()
    past: Record | None = None
    rebuilt: ServedVersion | None = None
    resized: bool = False


@dataclass(frozen=True, slots=True)
class Intent:
    """What is done: `desired` is what the model is to run until a rollout says otherwise.

    `stable` and `canary` are the rollout's, where there is one. `ends` says why running rollouts
    are taken back ("" where they go on), `released` that they no longer lay the model out.
    `cleared` is the rollout whose version becomes the stable one although it was not rolled out.
    """

    kind: Kind
    desired: ServedModel
    stable: ServedVersion | None = None
    canary: ServedVersion | None = None
    reason: str = ""
    ends: str = ""
    released: bool = False
    cleared: Record | None = None

    @property
    def lets_go(self) -> bool:
        """Whether the version before a rollout that has succeeded is no longer kept."""
        return self.released or self.kind == "rollout"


def intend(asked: ServedModel, plan: RolloutSpec | None, seen: Situation) -> Intent:
    """What to do about a model; `plan` is None for `immediate`.

    Raises `ConflictError` where the new version cannot stand in for the old one, and `ConfigError`
    where the plan asks for what the model does not have.
    """
    intent, past = _intended(asked, plan, seen), seen.past
    if intent.kind == "direct" and past is not None and past.rollout.state is not State.SUCCEEDED:
        return replace(intent, cleared=past)
    return intent


def _intended(asked: ServedModel, plan: RolloutSpec | None, seen: Situation) -> Intent:
    target = asked.versions[asked.version]
    newest = seen.running[-1] if seen.running else None
    if newest is not None and _aims_at(newest, target) and not _may_retry(newest):
        return _same_target(asked, seen, newest, plan)
    base = _base(seen, target)
    if base is None:
        return Intent("direct", asked, ends=_replaced(newest, target), released=True)
    if base.arm.version == target.arm.version:
        return Intent("direct", asked, ends=_replaced(newest, target))
    if plan is None:
        return Intent("direct", asked, ends=_replaced(newest, target), released=True)
    past = seen.past
    if past is not None and _took_back(past):
        desired = _beside(asked, _sized(base, target, seen))
        return Intent("held", desired, reason=_why_held(past), ends=_replaced(newest, target))
    check_signature(asked.version, base, target)
    check_outputs(plan, base)
    reason = f"rollout from version {base.arm.version} by plan {plan.plan}"
    # It keeps its number: the new one comes with the new version.
    desired = _beside(asked, base)
    return Intent("rollout", desired, base, target, reason, ends=_replaced(newest, target))


def check_signature(version: str, stable: ServedVersion, canary: ServedVersion) -> None:
    """Raise `ConflictError` where the new version's inputs or outputs are not the old one's."""
    difference = _difference(stable.arm.signature, canary.arm.signature)
    if difference:
        raise ConflictError(
            f"model {canary.arm.model!r}: version {version} cannot share traffic with version "
            f"{stable.arm.version}: {difference}; to switch at once, set rollout: immediate"
        )


def check_outputs(plan: RolloutSpec, stable: ServedVersion) -> None:
    """Raise `ConfigError` where a plan names an output that the model does not have."""
    compared = plan.shadow.compare.output if plan.shadow else None
    labelled = plan.feedback.output if plan.feedback else None
    names = [tensor.name for tensor in stable.arm.signature.outputs]
    for key, output in (("shadow.compare.output", compared), ("feedback.output", labelled)):
        if output is not None and output not in names:
            raise ConfigError(
                f"plan {plan.plan} of model {stable.arm.model!r}: {key} is {output!r}; "
                f"the model's outputs: {', '.join(names)}"
            )


def plan_rows(
    rows: Sequence[PlanRow],
    asked: Layout,
    intents: Mapping[str, Intent],
    records: Sequence[Record],
    now: float,
) -> list[PlanRow]:
    """The rows of an apply's plan, with what rollouts make of them; `records` are the live ones."""
    found = {(row.model, row.version): row for row in rows}
    for model, intent in intents.items():
        version = asked.models[model].version
        if intent.kind in _CHANGES:
            digest = asked.models[model].versions[version].arm.digest
            row = PlanRow(_CHANGES[intent.kind], model, version, digest, False, intent.reason)
            found[model, version] = row
    for key, row in found.items():
        for record in (r for r in records if r.rollout.model == row.model):
            rollout, meant = record.rollout, intents.get(row.model)
            if not rollout.active:
                if rollout.stable == row.version and row.change is Change.STOP:
                    found[key] = _kept(row, rollout, meant, now)
            elif rollout.canary == row.version and row.change not in _CHANGES.values():
                found[key] = _of_running(row, record, meant)
    return sorted(found.values(), key=lambda row: (row.model, int(row.version)))


_CHANGES: Final[Mapping[Kind, Change]] = {"rollout": Change.ROLLOUT, "held": Change.HELD}


def _kept(row: PlanRow, rollout: Rollout, intent: Intent | None, now: float) -> PlanRow:
    """The version before a rollout that has succeeded: it stays unless the apply lets it go."""
    if intent is None or intent.lets_go or rollout.warm_until is None or rollout.warm_until <= now:
        return row
    reason = f"kept for another {span(rollout.warm_until - now)} for a rollback"
    return replace(row, change=Change.UNCHANGED, reason=reason)


def _of_running(row: PlanRow, record: Record, intent: Intent | None) -> PlanRow:
    if row.change is Change.STOP:
        return replace(row, reason=intent.ends if intent else "no longer asked for")
    if intent is not None and intent.kind == "goes_on" and intent.reason:
        return replace(row, reason="; ".join(filter(None, (row.reason, intent.reason))))
    going_on = f"rollout {record.rollout.id} is {record.rollout.state.value}"
    return replace(row, reason=row.reason or going_on)


def _same_target(
    asked: ServedModel, seen: Situation, newest: Record, plan: RolloutSpec | None
) -> Intent:
    """The file still says what is being rolled out: it goes on, with the file's settings."""
    assert seen.current is not None
    if plan is None:
        ends = f"rollout {newest.rollout.id} ends: the plan is immediate now"
        return Intent("direct", asked, ends=ends, released=True)
    stable = asked.versions.get(newest.rollout.stable) or seen.current.versions.get(
        newest.rollout.stable, newest.served.versions[newest.rollout.stable]
    )
    target = asked.versions[asked.version]
    stable = _sized(stable, target, seen)
    desired = _beside(asked, stable)
    if newest.taking_back:
        reason = f"is being taken back ({newest.rollout.reason})"
        return Intent("held", desired, reason=reason)
    # Behind another one that is being taken back it is not laid out yet.
    first = seen.running[0] is newest
    if first and newest.rollout.stage is not State.PENDING:
        desired = replace(desired, versions={**desired.versions, asked.version: target})
    return Intent("goes_on", desired, stable, target, _plan_kept(newest.rollout, plan))


def _plan_kept(rollout: Rollout, plan: RolloutSpec) -> str:
    """That a rollout is not judged by the file's plan, where that is another one; "" otherwise."""
    if rollout.spec == plan:
        return ""
    model = rollout.model
    return (
        f"rollout {rollout.id} keeps the plan that it began with; to change it: "
        f"serving rollout abort {model}, then serving rollout start {model} --to {rollout.canary}"
    )


def _beside(asked: ServedModel, stable: ServedVersion) -> ServedModel:
    """What the file serves besides, and the version that answers until the rollout is over."""
    version = stable.arm.version
    others = {v: s for v, s in asked.versions.items() if v != asked.version}
    return ServedModel(version, {version: stable, **others})


def _sized(stable: ServedVersion, target: ServedVersion, seen: Situation) -> ServedVersion:
    """The version that answers, with the number of replicas that the apply asks for anew.

    One that came along with another version, which may be taken back, is that version's alone.
    """
    return stable.sized_as(target) if seen.resized else stable


def _base(seen: Situation, target: ServedVersion) -> ServedVersion | None:
    """The version that answers now, or did before the deployment was started anew."""
    if seen.routed is not None:
        version = seen.routed.version
        wanted = seen.current.versions if seen.current is not None else {}
        return wanted.get(version) or seen.routed.versions[version]
    past = seen.past
    if past is None or past.cleared or past.rollout.state is State.SUCCEEDED:
        return None
    # The version before it may still be loading.
    loading = seen.current is None or seen.current.version == past.rollout.stable
    return seen.rebuilt if loading and _aims_at(past, target) else None


def _aims_at(record: Record, target: ServedVersion) -> bool:
    return record.targets(target.arm.version, target.arm.digest)


def _took_back(record: Record) -> bool:
    over = record.taking_back or record.rollout.state is State.ROLLED_BACK
    return over and not record.retry and not record.cleared


def _may_retry(record: Record) -> bool:
    return record.retry and record.taking_back


def _replaced(newest: Record | None, target: ServedVersion) -> str:
    if newest is None:
        return ""
    return f"rollout {newest.rollout.id} is superseded by version {target.arm.version}"


def _why_held(past: Record) -> str:
    rollout = past.rollout
    return (
        f"was taken back by rollout {rollout.id} ({rollout.reason}) and is not tried again; "
        f"to try it again: serving rollout start {rollout.model} --to {rollout.canary}"
    )


def _difference(old: Signature, new: Signature) -> str:
    for what, before, after in (
        ("input", old.inputs, new.inputs),
        ("output", old.outputs, new.outputs),
    ):
        if difference := _tensors(what, before, after):
            return difference
    if (old.batch, old.fixed_rows) != (new.batch, new.fixed_rows):
        return f"its batches are {_batch(new)}, not {_batch(old)}"
    return ""


def _tensors(what: str, before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> str:
    names, wanted = [t.name for t in after], [t.name for t in before]
    if names != wanted:
        return f"its {what}s are {', '.join(names)}, not {', '.join(wanted)}"
    for old, new in zip(before, after, strict=True):
        if old != new:
            return f"its {what} {new.name!r} is {_tensor(new)}, not {_tensor(old)}"
    return ""


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.datatype}{list(spec.shape)}"


def _batch(signature: Signature) -> str:
    rows = f" of {signature.fixed_rows} rows" if signature.fixed_rows else ""
    return f"{signature.batch.value}{rows}"
