"""The tables: what the service remembers, in SQLite and Postgres alike.

In: nothing. Out: SQLAlchemy tables and two column types. Times are UTC and aware; JSON null is SQL NULL. A migration
under `migrations/versions` accompanies every change here, and a test compares the two.
Refuses to know who asks.
"""

from __future__ import annotations

import datetime as dt
import secrets

import sqlalchemy as sa


class UtcTime(sa.TypeDecorator[dt.datetime]):
    """An aware time, kept as UTC. SQLite keeps no zone, so it is taken off and put back here."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"The time {value} has no zone; the store takes aware times only.")
        value = value.astimezone(dt.UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


JSON = sa.JSON(none_as_null=True)


def now() -> dt.datetime:
    """The time that records carry."""
    return dt.datetime.now(dt.UTC)


def new_id() -> str:
    """An id that nobody can guess."""
    return secrets.token_hex(12)


metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("quotas", JSON),  # fields of `keys.Quotas`
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("hash", sa.Text, nullable=False),  # sha256 of the secret, hex
    sa.Column("prefix", sa.Text, nullable=False),  # what a list may show
    sa.Column("tenant", sa.ForeignKey(tenants.c.name), nullable=False, index=True),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("revoked", UtcTime),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.ForeignKey(tenants.c.name), nullable=False),
    sa.Column("tags", JSON, nullable=False),
    sa.Column("user_metadata", JSON),
    sa.Column("sdk_version", sa.Text),
    sa.Column("display_name", sa.Text),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("last_heartbeat", UtcTime, nullable=False),
    sa.Column("finished", UtcTime),
    sa.Column("reason", sa.Text),
    sa.Index("ix_sessions_tenant_created", "tenant", "created"),
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.ForeignKey(tenants.c.name), nullable=False),
    sa.Column("session_id", sa.ForeignKey(sessions.c.id), index=True),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("spec", JSON, nullable=False),  # method, config, targets, seed, parent: see engine.commands.RunSpec
    sa.Column("rank", sa.Integer),
    sa.Column("user_metadata", JSON),
    sa.Column("optimizer_config", JSON),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("last_request", UtcTime, nullable=False),
    sa.Column("snapshot_path", sa.Text),
    sa.Column("snapshot_seq", sa.BigInteger, nullable=False),  # requests up to it are in the snapshot; 0 for none
    sa.Column("corrupted", sa.Text),  # a sentence: what was lost
    sa.Column("closed", UtcTime),
    sa.Column("info", JSON, nullable=False),
    sa.Index("ix_runs_tenant_created", "tenant", "created"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("path", sa.Text, primary_key=True),  # tinker://<run>/<weights|sampler_weights|external_weights>/<name>
    sa.Column("run_id", sa.Text, nullable=False, index=True),
    sa.Column("tenant", sa.ForeignKey(tenants.c.name), nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("artifact", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("expires", UtcTime, index=True),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("ephemeral", sa.Boolean, nullable=False),
    sa.Column("user_metadata", JSON),
    sa.Column("info", JSON, nullable=False),
    sa.Index("ix_checkpoints_tenant_created", "tenant", "created"),
)

samplers = sa.Table(
    "samplers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.ForeignKey(tenants.c.name), nullable=False),
    sa.Column("session_id", sa.ForeignKey(sessions.c.id), index=True),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("model_path", sa.Text),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("info", JSON, nullable=False),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("seq", sa.BigInteger),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary),
    sa.Column("body_size", sa.BigInteger, nullable=False),  # bytes that the journal still holds; 0 without a body
    sa.Column("crc", sa.BigInteger, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("created", UtcTime, nullable=False),
    sa.Column("done_at", UtcTime),
    sa.Column("result", sa.LargeBinary),
    sa.Column("result_type", sa.Text),
    sa.Column("error", JSON),  # fields of `journal.Failure`
    sa.UniqueConstraint("scope", "seq"),
)
sa.Index("ix_requests_done_at", requests.c.done_at)
_HELD = requests.c.body_size > 0
sa.Index("ix_requests_held", requests.c.body_size, sqlite_where=_HELD, postgresql_where=_HELD)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("tokens", sa.BigInteger, nullable=False),
)

points = sa.Table(
    "points",
    metadata,
    sa.Column("run_id", sa.ForeignKey(runs.c.id), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("step", sa.BigInteger),  # null: a pass that no optimiser step has used
    sa.Column("loss", sa.Double),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),  # of a pass; of the run so far where it is a step
    sa.Column("grad_norm", sa.Double),
    sa.Column("lr", sa.Double),
    sa.Column("at", UtcTime, nullable=False),
)
_PASSES = points.c.step.is_(None)
sa.Index("ix_points_passes", points.c.run_id, sqlite_where=_PASSES, postgresql_where=_PASSES)
