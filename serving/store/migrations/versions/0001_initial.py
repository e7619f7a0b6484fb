"""The first tables: pins, desired state, route table, counters, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "pins",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("ref", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("resolved_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("model", "ref"),
    )
    for name, body in (("desired", "config"), ("route_table", "body")):
        op.create_table(
            name,
            sa.Column(
                "id",
                sa.Integer,
                sa.CheckConstraint("id = 1"),
                primary_key=True,
                autoincrement=False,
            ),
            sa.Column("revision", sa.BigInteger, nullable=False),
            sa.Column(body, sa.JSON, nullable=False),
            sa.Column("updated_at", sa.Double, nullable=False),
        )
    op.create_table(
        "counters",
        sa.Column("instance", sa.Text, primary_key=True),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
