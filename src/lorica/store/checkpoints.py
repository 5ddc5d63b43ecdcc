"""Checkpoints: names for artifacts, with an owner, a size, an expiry and a door for others.

In: paths `tinker://<run>/<kind>/<name>`. Out: records that the tenant may see: its own, and published ones by their
path. What has expired is absent. Refuses to know what is in an artifact.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from lorica.core.errors import DataError
from lorica.store import rows
from lorica.store.rows import Page
from lorica.store.tables import checkpoints, now

Kind = Literal["training", "sampler", "external"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`artifact` is its place among the artifacts; an ephemeral one was never named by its user."""

    path: str
    run_id: str
    tenant: str
    kind: Kind
    name: str
    artifact: str
    size: int
    created: dt.datetime = field(default_factory=now)
    expires: dt.datetime | None = None
    public: bool = False
    ephemeral: bool = False
    user_metadata: dict[str, Any] | None = None
    info: dict[str, Any] = field(default_factory=dict)


def add_checkpoint(connection: sa.Connection, checkpoint: Checkpoint, *, overwrite: bool = False) -> Checkpoint | None:
    """Add a checkpoint. The one that it replaced, whose artifact may be deleted after the commit.

    Raises DataError where the path is taken and neither `overwrite` nor an expiry frees it.
    """
    mine = checkpoints.c.path == checkpoint.path
    earlier = rows.one(connection, checkpoints, mine, Checkpoint)
    if earlier is not None:
        expired = earlier.expires is not None and earlier.expires <= now()
        if not expired and not (overwrite and earlier.tenant == checkpoint.tenant):
            raise DataError(f"{checkpoint.path} exists already.", hint="Choose another name, or ask to overwrite it.")
        connection.execute(checkpoints.delete().where(mine))
    rows.insert(connection, checkpoints, checkpoint)
    return earlier


def get_checkpoint(connection: sa.Connection, path: str, tenant: str) -> Checkpoint | None:
    """A checkpoint of the tenant, or one that is published."""
    visible = (checkpoints.c.tenant == tenant) | checkpoints.c.public
    return rows.one(connection, checkpoints, (checkpoints.c.path == path) & visible & _alive(), Checkpoint)


def list_checkpoints(
    connection: sa.Connection,
    tenant: str,
    limit: int,
    offset: int = 0,
    *,
    run_id: str | None = None,
    kind: Kind | None = None,
    ephemeral: bool = False,
) -> Page[Checkpoint]:
    """The tenant's own, newest first; those that were never named only with `ephemeral`."""
    where = (checkpoints.c.tenant == tenant) & _alive()
    if run_id is not None:
        where &= checkpoints.c.run_id == run_id
    if kind is not None:
        where &= checkpoints.c.kind == kind
    if not ephemeral:
        where &= ~checkpoints.c.ephemeral
    return rows.page(connection, checkpoints, where, Checkpoint, limit, offset)


def delete_checkpoint(connection: sa.Connection, path: str, tenant: str) -> Checkpoint | None:
    """Remove one of the tenant's; what was removed, whose artifact may be deleted after the commit."""
    found = rows.one(connection, checkpoints, _own(path, tenant), Checkpoint)
    if found is not None:
        connection.execute(checkpoints.delete().where(_own(path, tenant)))
    return found


def set_expiry(connection: sa.Connection, path: str, tenant: str, expires: dt.datetime | None) -> bool:
    """False where the tenant has no such checkpoint."""
    return connection.execute(checkpoints.update().where(_own(path, tenant)).values(expires=expires)).rowcount == 1


def set_public(connection: sa.Connection, path: str, tenant: str, public: bool) -> bool:
    """Let every tenant read it, or no longer; False where the tenant has no such checkpoint."""
    return connection.execute(checkpoints.update().where(_own(path, tenant)).values(public=public)).rowcount == 1


def expired_checkpoints(connection: sa.Connection, at: dt.datetime) -> list[Checkpoint]:
    """Those of all tenants whose time had come at `at`; for whoever deletes them."""
    return rows.many(connection, checkpoints, checkpoints.c.expires <= at, Checkpoint)


def drop_expired(connection: sa.Connection, path: str, at: dt.datetime) -> bool:
    """Remove the record of one whose time had come at `at`; False where it was given more time meanwhile."""
    gone = (checkpoints.c.path == path) & (checkpoints.c.expires <= at)
    return connection.execute(checkpoints.delete().where(gone)).rowcount == 1


def storage_bytes(connection: sa.Connection, tenant: str) -> int:
    """What a tenant's checkpoints take."""
    total = sa.func.coalesce(sa.func.sum(checkpoints.c.size), 0)
    return int(connection.scalar(sa.select(total).where(checkpoints.c.tenant == tenant)) or 0)


def _own(path: str, tenant: str) -> sa.ColumnElement[bool]:
    return (checkpoints.c.path == path) & (checkpoints.c.tenant == tenant) & _alive()


def _alive() -> sa.ColumnElement[bool]:
    return checkpoints.c.expires.is_(None) | (checkpoints.c.expires > now())
