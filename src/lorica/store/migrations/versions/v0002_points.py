"""Loss curves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from lorica.store.tables import UtcTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table of points."""
    op.create_table(
        "points",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("step", sa.BigInteger()),
        sa.Column("loss", sa.Double()),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("grad_norm", sa.Double()),
        sa.Column("lr", sa.Double()),
        sa.Column("at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_points_run_id"),
        sa.PrimaryKeyConstraint("run_id", "seq", name="pk_points"),
    )
    op.create_index(
        "ix_points_passes",
        "points",
        ["run_id"],
        sqlite_where=sa.text("step IS NULL"),
        postgresql_where=sa.text("step IS NULL"),
    )
