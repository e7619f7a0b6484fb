"""Why a model cannot go back to the version before, once its rollout is over: a pure decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serving.control.records import Record
from serving.core.plan import Layout
from serving.core.rollout import title
from serving.core.rollout_states import State
from serving.store.audit import AuditRow


def switched(before: Layout, after: Layout) -> dict[str, dict[str, str | None]]:
    """The models whose version an apply changes itself, as {"from", "to"}; None: not served."""
    versions = {
        name: {"from": _version(before, name), "to": _version(after, name)}
        for name in sorted({*before.models, *after.models})
    }
    return {name: way for name, way in versions.items() if way["from"] != way["to"]}


def refusal(model: str, answering: str, newest: Record | None, applies: Sequence[AuditRow]) -> str:
    """Why a rollback is refused and what to do instead; "" where the rollout itself decides.

    `answering` is the version that the model is to run, `newest` its rollout, which is over,
    `applies` are the audit entries of applies, oldest first.
    """
    ended_at = (newest.rollout.finished_at or 0.0) if newest is not None else 0.0
    for apply in reversed(applies):
        way = apply.body.get("switched", {}).get(model)
        if apply.at >= ended_at and way is not None and None not in way.values():
            return _replaced(model, way, apply.body)
    if newest is not None and newest.rollout.state is State.ROLLED_BACK:
        return (
            f"{title(newest.rollout)} is rolled back already; there is nothing to go back from: "
            f"version {answering} answers"
        )
    return ""


def _replaced(model: str, way: Mapping[str, str], body: Mapping[str, Any]) -> str:
    former = way["from"]
    return (
        f"nothing of model {model!r} is kept to go back to since apply {body['apply']} switched it "
        f"from version {former} to {way['to']} at once; to go back, apply a file with version: "
        f'"{former}" and rollout: immediate, or with evidence: '
        f"serving rollout start {model} --to {former}"
    )


def _version(layout: Layout, name: str) -> str | None:
    model = layout.models.get(name)
    return model.version if model is not None else None
