"""The digests of versions, kept for ever."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table, from what is pinned now."""
    op.create_table(
        "versions",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("first_applied_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("model", "version"),
    )
    op.execute(
        "INSERT INTO versions (model, version, digest, first_applied_at) "
        "SELECT model, version, MIN(digest), MIN(resolved_at) FROM pins GROUP BY model, version"
    )
