"""Sessions of clients, and the samplers that they hold.

In: ids that the server chose. Out: records of the tenant that asks; another's are absent.
Refuses to know what a heartbeat keeps alive.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from lorica.store import rows
from lorica.store.rows import Page
from lorica.store.tables import now, samplers, sessions


@dataclass(frozen=True, slots=True)
class Session:
    id: str
    tenant: str
    tags: list[str] = field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    sdk_version: str | None = None
    display_name: str | None = None
    created: dt.datetime = field(default_factory=now)
    last_heartbeat: dt.datetime = field(default_factory=now)
    finished: dt.datetime | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Sampler:
    """`model_path` is a checkpoint's path; None samples the base."""

    id: str
    tenant: str
    session_id: str | None
    base_model: str
    model_path: str | None = None
    created: dt.datetime = field(default_factory=now)
    info: dict[str, Any] = field(default_factory=dict)


def add_session(connection: sa.Connection, session: Session) -> None:
    """The tenant must exist."""
    rows.insert(connection, sessions, session)


def get_session(connection: sa.Connection, session_id: str, tenant: str) -> Session | None:
    return rows.one(connection, sessions, _own(session_id, tenant), Session)


def list_sessions(connection: sa.Connection, tenant: str, limit: int, offset: int = 0) -> Page[Session]:
    """Newest first."""
    return rows.page(connection, sessions, sessions.c.tenant == tenant, Session, limit, offset)


def beat(connection: sa.Connection, session_id: str, tenant: str) -> bool:
    """Note a heartbeat; False where there is no such session that is not finished."""
    alive = _own(session_id, tenant) & sessions.c.finished.is_(None)
    return connection.execute(sessions.update().where(alive).values(last_heartbeat=now())).rowcount == 1


def finish_session(connection: sa.Connection, session_id: str, tenant: str, reason: str) -> bool:
    """The first to finish a session wins; False for everyone later, and where there is none."""
    alive = _own(session_id, tenant) & sessions.c.finished.is_(None)
    return connection.execute(sessions.update().where(alive).values(finished=now(), reason=reason)).rowcount == 1


def silent_sessions(connection: sa.Connection, since: dt.datetime) -> list[Session]:
    """Sessions of all tenants, not finished, whose last heartbeat is older."""
    return rows.many(connection, sessions, sessions.c.finished.is_(None) & (sessions.c.last_heartbeat < since), Session)


def add_sampler(connection: sa.Connection, sampler: Sampler) -> bool:
    """False, and nothing changes, where the id is taken."""
    if connection.scalar(sa.select(samplers.c.id).where(samplers.c.id == sampler.id)) is not None:
        return False
    rows.insert(connection, samplers, sampler)
    return True


def get_sampler(connection: sa.Connection, sampler_id: str, tenant: str) -> Sampler | None:
    return rows.one(connection, samplers, (samplers.c.id == sampler_id) & (samplers.c.tenant == tenant), Sampler)


def session_samplers(connection: sa.Connection, session_id: str, tenant: str) -> list[Sampler]:
    """Oldest first."""
    own = (samplers.c.session_id == session_id) & (samplers.c.tenant == tenant)
    return rows.many(connection, samplers, own, Sampler)


def _own(session_id: str, tenant: str) -> sa.ColumnElement[bool]:
    return (sessions.c.id == session_id) & (sessions.c.tenant == tenant)
