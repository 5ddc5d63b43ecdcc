"""The tables of the first service."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from lorica.store.tables import JSON, UtcTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    for make in (_requests, _records, _runs):
        make()


def _requests() -> None:
    op.create_table(
        "requests",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger()),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary()),
        sa.Column("body_size", sa.BigInteger(), nullable=False),
        sa.Column("crc", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("created", UtcTime(), nullable=False),
        sa.Column("done_at", UtcTime()),
        sa.Column("result", sa.LargeBinary()),
        sa.Column("result_type", sa.Text()),
        sa.Column("error", JSON),
        sa.PrimaryKeyConstraint("id", name="pk_requests"),
        sa.UniqueConstraint("scope", "seq", name="uq_requests_scope_seq"),
    )
    op.create_index("ix_requests_done_at", "requests", ["done_at"])
    op.create_index(
        "ix_requests_held",
        "requests",
        ["body_size"],
        sqlite_where=sa.text("body_size > 0"),
        postgresql_where=sa.text("body_size > 0"),
    )


def _records() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("quotas", JSON),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "usage",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "day", "kind", name="pk_usage"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("artifact", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("created", UtcTime(), nullable=False),
        sa.Column("expires", UtcTime()),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("ephemeral", sa.Boolean(), nullable=False),
        sa.Column("user_metadata", JSON),
        sa.Column("info", JSON, nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_checkpoints_tenant"),
        sa.PrimaryKeyConstraint("path", name="pk_checkpoints"),
    )
    op.create_index("ix_checkpoints_expires", "checkpoints", ["expires"])
    op.create_index("ix_checkpoints_run_id", "checkpoints", ["run_id"])
    op.create_index("ix_checkpoints_tenant_created", "checkpoints", ["tenant", "created"])
    op.create_table(
        "keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("created", UtcTime(), nullable=False),
        sa.Column("revoked", UtcTime()),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_keys_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
    )
    op.create_index("ix_keys_tenant", "keys", ["tenant"])


def _runs() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("tags", JSON, nullable=False),
        sa.Column("user_metadata", JSON),
        sa.Column("sdk_version", sa.Text()),
        sa.Column("display_name", sa.Text()),
        sa.Column("created", UtcTime(), nullable=False),
        sa.Column("last_heartbeat", UtcTime(), nullable=False),
        sa.Column("finished", UtcTime()),
        sa.Column("reason", sa.Text()),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_sessions_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
    )
    op.create_index("ix_sessions_tenant_created", "sessions", ["tenant", "created"])
    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text()),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("rank", sa.Integer()),
        sa.Column("user_metadata", JSON),
        sa.Column("optimizer_config", JSON),
        sa.Column("created", UtcTime(), nullable=False),
        sa.Column("last_request", UtcTime(), nullable=False),
        sa.Column("snapshot_path", sa.Text()),
        sa.Column("snapshot_seq", sa.BigInteger(), nullable=False),
        sa.Column("corrupted", sa.Text()),
        sa.Column("closed", UtcTime()),
        sa.Column("info", JSON, nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_runs_session_id"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_runs_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_session_id", "runs", ["session_id"])
    op.create_index("ix_runs_tenant_created", "runs", ["tenant", "created"])
    op.create_table(
        "samplers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text()),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("model_path", sa.Text()),
        sa.Column("created", UtcTime(), nullable=False),
        sa.Column("info", JSON, nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_samplers_session_id"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_samplers_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_samplers"),
    )
    op.create_index("ix_samplers_session_id", "samplers", ["session_id"])
