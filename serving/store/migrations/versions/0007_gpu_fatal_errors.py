"""Replicas that a GPU broke, so that a second one is known as such by another controller."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "gpu_fatal_errors",
        sa.Column("uuid", sa.Text, nullable=False),
        sa.Column("replica", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("uuid", "replica"),
    )
