"""Rollouts, on a connection and within a transaction of the store's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Select, func, select

from serving.store.schema import rollouts
from serving.store.statements import upsert


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """A rollout. `body` is its writer's; `finished_at` is None while ticks can still change it."""

    id: str
    model: str
    state: str
    body: Mapping[str, Any]
    created_at: float
    finished_at: float | None


def read(db: Connection, *, active: bool | None, model: str | None, limit: int) -> list[RolloutRow]:
    """At most `limit`, newest first; `active`: only those not finished, or only those.

    `model`: of this model only.
    """
    query = _select()
    if active is not None:
        query = query.where(rollouts.c.finished_at.is_(None) == active)
    if model is not None:
        query = query.where(rollouts.c.model == model)
    query = query.order_by(rollouts.c.created_at.desc(), rollouts.c.id.desc()).limit(limit)
    return [RolloutRow(**row) for row in db.execute(query).mappings()]


def find(db: Connection, rollout_id: str) -> RolloutRow | None:
    """The one of this id."""
    row = db.execute(_select().where(rollouts.c.id == rollout_id)).mappings().one_or_none()
    return None if row is None else RolloutRow(**row)


def count(db: Connection, model: str) -> int:
    """How many a model has had."""
    query = select(func.count()).where(rollouts.c.model == model)
    return db.execute(query).scalar_one()


def save(db: Connection, row: RolloutRow, *, at: float) -> None:
    """Add a rollout, or replace the one of its id."""
    upsert(db, rollouts, {**asdict(row), "updated_at": at})


def _select() -> Select[Any]:
    return select(*(rollouts.c[name] for name in RolloutRow.__dataclass_fields__))
