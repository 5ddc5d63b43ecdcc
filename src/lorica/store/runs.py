"""Training runs: what each started from, how far its snapshot is, and whether it still lives.

In: ids that the server chose. Out: records of the tenant that asks; another's are absent.
Refuses to know tensors and how a run is executed.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from lorica.store import journal, rows
from lorica.store.rows import Page
from lorica.store.tables import now, runs, sessions


@dataclass(frozen=True, slots=True)
class Run:
    """`spec` holds the fields of `engine.commands.RunSpec`; `corrupted` is a sentence about what was lost; requests up
    to `snapshot_seq` are in the snapshot.
    """

    id: str
    tenant: str
    session_id: str | None
    base_model: str
    spec: dict[str, Any]
    rank: int | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None
    created: dt.datetime = field(default_factory=now)
    last_request: dt.datetime = field(default_factory=now)
    snapshot_path: str | None = None
    snapshot_seq: int = 0
    corrupted: str | None = None
    closed: dt.datetime | None = None
    info: dict[str, Any] = field(default_factory=dict)


def add_run(connection: sa.Connection, run: Run) -> bool:
    """False, and nothing changes, where the id is taken."""
    if connection.scalar(sa.select(runs.c.id).where(runs.c.id == run.id)) is not None:
        return False
    rows.insert(connection, runs, run)
    return True


def get_run(connection: sa.Connection, run_id: str, tenant: str) -> Run | None:
    return rows.one(connection, runs, (runs.c.id == run_id) & (runs.c.tenant == tenant), Run)


def list_runs(connection: sa.Connection, tenant: str, limit: int, offset: int = 0) -> Page[Run]:
    """Newest first."""
    return rows.page(connection, runs, runs.c.tenant == tenant, Run, limit, offset)


def session_runs(connection: sa.Connection, session_id: str, tenant: str) -> list[Run]:
    """Oldest first."""
    return rows.many(connection, runs, (runs.c.session_id == session_id) & (runs.c.tenant == tenant), Run)


def living_runs(connection: sa.Connection) -> list[Run]:
    """Runs of all tenants that are not closed: what a start of the server makes known again."""
    return rows.many(connection, runs, runs.c.closed.is_(None), Run)


def live_runs(connection: sa.Connection, tenant: str, since: dt.datetime) -> int:
    """How many runs of a tenant may still be trained: not closed, of a session that was heard after `since`."""
    heard = sessions.c.finished.is_(None) & (sessions.c.last_heartbeat > since)
    of_them = (runs.c.tenant == tenant) & runs.c.closed.is_(None) & (runs.c.session_id == sessions.c.id) & heard
    return int(connection.scalar(sa.select(sa.func.count()).select_from(runs, sessions).where(of_them)) or 0)


def set_run(
    connection: sa.Connection,
    run_id: str,
    *,
    spec: dict[str, Any] | None = None,
    rank: int | None = None,
    optimizer_config: dict[str, Any] | None = None,
    info: dict[str, Any] | None = None,
) -> None:
    """Note what the engine told of a run; None leaves a field as it is."""
    told = {"spec": spec, "rank": rank, "optimizer_config": optimizer_config, "info": info}
    values = {name: value for name, value in told.items() if value is not None}
    if values:
        connection.execute(runs.update().where(runs.c.id == run_id).values(values))


def touch_run(connection: sa.Connection, run_id: str) -> None:
    """Note that a request came."""
    connection.execute(runs.update().where(runs.c.id == run_id).values(last_request=now()))


def set_snapshot(connection: sa.Connection, run_id: str, path: str, seq: int) -> str | None:
    """Requests up to `seq` are in the artifact `path`: their bodies leave the journal. The earlier snapshot's path,
    which may be deleted after the commit.
    """
    earlier = connection.scalar(sa.select(runs.c.snapshot_path).where(runs.c.id == run_id))
    connection.execute(runs.update().where(runs.c.id == run_id).values(snapshot_path=path, snapshot_seq=seq))
    journal.trim(connection, run_id, seq)
    return None if earlier is None or earlier == path else str(earlier)


def mark_corrupted(connection: sa.Connection, run_id: str, sentence: str) -> None:
    """Say what a run has lost; the first sentence stays."""
    unmarked = (runs.c.id == run_id) & runs.c.corrupted.is_(None)
    connection.execute(runs.update().where(unmarked).values(corrupted=sentence))


def close_run(connection: sa.Connection, run_id: str) -> bool:
    """The run will take no more requests; False where it took none already. Its snapshot stays."""
    living = (runs.c.id == run_id) & runs.c.closed.is_(None)
    return connection.execute(runs.update().where(living).values(closed=now())).rowcount == 1
