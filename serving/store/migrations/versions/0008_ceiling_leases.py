"""Of a learned ceiling, how large the lease was: it does not hold for larger ones."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column; of ceilings from before nobody knows, so they hold for no lease."""
    column = sa.Column("lease_bytes", sa.BigInteger, nullable=False, server_default="0")
    op.add_column("memory_profiles", column)
