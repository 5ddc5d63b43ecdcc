"""What an operator looks at: records of one tenant, or of all, and sums over them.

In: a tenant, or None for all. Out: pages of records, counts. Changes nothing. Refuses to know who may ask for all.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import sqlalchemy as sa

from lorica.store import rows
from lorica.store.checkpoints import Checkpoint
from lorica.store.keys import Quotas
from lorica.store.rows import Page
from lorica.store.runs import Run
from lorica.store.tables import checkpoints, keys, now, requests, runs, tenants, usage


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant and what it has; `tokens` by kind since the day that was asked about."""

    name: str
    quotas: Quotas
    keys: int
    runs: int
    checkpoints: int
    storage_bytes: int
    tokens: dict[str, int]


def runs_of(connection: sa.Connection, tenant: str | None, limit: int, offset: int = 0) -> Page[Run]:
    """Those with the newest request first: what is at work is at the top."""
    where = sa.true() if tenant is None else runs.c.tenant == tenant
    select = sa.select(runs).where(where).order_by(runs.c.last_request.desc(), runs.c.id).limit(limit).offset(offset)
    total = connection.scalar(sa.select(sa.func.count()).select_from(runs).where(where))
    return Page([Run(**row._mapping) for row in connection.execute(select)], int(total or 0))


def run_of(connection: sa.Connection, run_id: str, tenant: str | None) -> Run | None:
    mine = sa.true() if tenant is None else runs.c.tenant == tenant
    return rows.one(connection, runs, (runs.c.id == run_id) & mine, Run)


def checkpoints_of(connection: sa.Connection, tenant: str | None, limit: int, offset: int = 0) -> Page[Checkpoint]:
    """Newest first, without expired ones and those that were never named."""
    mine = sa.true() if tenant is None else checkpoints.c.tenant == tenant
    alive = checkpoints.c.expires.is_(None) | (checkpoints.c.expires > now())
    return rows.page(connection, checkpoints, mine & alive & ~checkpoints.c.ephemeral, Checkpoint, limit, offset)


def tenants_of(connection: sa.Connection, tenant: str | None, since: dt.date) -> list[Tenant]:
    """In alphabetical order."""
    where = sa.true() if tenant is None else tenants.c.name == tenant
    open_keys = _counts(connection, keys.c.tenant, keys.c.revoked.is_(None))
    own_runs = _counts(connection, runs.c.tenant, sa.true())
    own_checkpoints = _counts(connection, checkpoints.c.tenant, sa.true())
    bytes_ = sa.select(checkpoints.c.tenant, sa.func.sum(checkpoints.c.size)).group_by(checkpoints.c.tenant)
    storage = {str(name): int(size) for name, size in connection.execute(bytes_)}
    tokens = _tokens(connection, since)
    return [
        Tenant(
            row.name,
            Quotas.parse(row.quotas or {}),
            open_keys.get(row.name, 0),
            own_runs.get(row.name, 0),
            own_checkpoints.get(row.name, 0),
            storage.get(row.name, 0),
            tokens.get(row.name, {}),
        )
        for row in connection.execute(sa.select(tenants).where(where).order_by(tenants.c.name))
    ]


def held(connection: sa.Connection) -> tuple[int, int]:
    """Requests whose bodies the journal still holds, and their bytes."""
    size = requests.c.body_size
    select = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(size), 0)).where(size > 0)
    count, total = connection.execute(select).one()
    return int(count), int(total)


def _counts(connection: sa.Connection, column: sa.Column[str], where: sa.ColumnElement[bool]) -> dict[str, int]:
    select = sa.select(column, sa.func.count()).where(where).group_by(column)
    return {str(name): int(count) for name, count in connection.execute(select)}


def _tokens(connection: sa.Connection, since: dt.date) -> dict[str, dict[str, int]]:
    total = sa.func.sum(usage.c.tokens)
    select = sa.select(usage.c.tenant, usage.c.kind, total).where(usage.c.day >= since)
    found: dict[str, dict[str, int]] = {}
    for tenant, kind, tokens in connection.execute(select.group_by(usage.c.tenant, usage.c.kind)):
        found.setdefault(str(tenant), {})[str(kind)] = int(tokens)
    return found
