"""Counters of tokens: by tenant, day and kind.

In: counts as they occur. Out: sums. Refuses to know prices and limits.
"""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa

from lorica.store.tables import now, usage


def add_usage(connection: sa.Connection, tenant: str, kind: str, tokens: int) -> None:
    """Count tokens on today's row (UTC). Writers are one, so read and write cannot interleave."""
    row = (usage.c.tenant == tenant) & (usage.c.day == now().date()) & (usage.c.kind == kind)
    if connection.execute(usage.update().where(row).values(tokens=usage.c.tokens + tokens)).rowcount == 0:
        values = {"tenant": tenant, "day": now().date(), "kind": kind, "tokens": tokens}
        connection.execute(usage.insert(), values)


def used(connection: sa.Connection, tenant: str, since: dt.date) -> dict[str, int]:
    """Tokens by kind from a day on."""
    total = sa.func.sum(usage.c.tokens)
    mine = (usage.c.tenant == tenant) & (usage.c.day >= since)
    select = sa.select(usage.c.kind, total).where(mine).group_by(usage.c.kind)
    return {str(kind): int(tokens) for kind, tokens in connection.execute(select)}
