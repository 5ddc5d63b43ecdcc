"""Which sessions a search finds, and how one is summed up.

In: a search and records. Out: yes or no, and the SDK's summary. Refuses to know the database.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from lorica.server.bodies import Body
from lorica.store.checkpoints import Checkpoint
from lorica.store.sessions import Session

ALIVE = dt.timedelta(minutes=2)
"""How long after its last heartbeat a session counts as active."""


class CursorBody(Body):
    last_created_at: AwareDatetime
    last_session_id: str


class OwnerBody(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: tuple[str, ...] = ()


class StatusBody(Body):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[str] | None = None


class SearchBody(Body):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    display_name: str | None = None
    owner: OwnerBody = OwnerBody()
    statuses: list[StatusBody] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: CursorBody | None = None


def status(session: Session) -> dict[str, Any] | None:
    """What the SDK calls the state of a session; None for one that fell silent."""
    if session.finished is not None:
        return {"type": "client_finished", "reason": {"type": (session.reason or "success").partition(":")[0]}}
    if dt.datetime.now(dt.UTC) - session.last_heartbeat < ALIVE:
        return {"type": "active"}
    return None


def matches(body: SearchBody, session: Session) -> bool:
    """Whether a session fits a search."""
    named = []
    if body.session_id is not None:
        named.append(session.id == body.session_id)
    if body.display_name is not None:
        name = (session.display_name or "").lower()
        named.append(all(word in name for word in body.display_name.lower().split()))
    if named and not any(named):
        return False
    metadata = session.user_metadata or {}
    if any(str(metadata.get(key)) != value for key, value in body.user_metadata.items()):
        return False
    return body.statuses is None or any(_has(wanted, session) for wanted in body.statuses)


def _has(wanted: StatusBody, session: Session) -> bool:
    found = status(session)
    if found is None or found["type"] != wanted.type:
        return False
    return wanted.reasons is None or found.get("reason", {}).get("type") in wanted.reasons


def summary(session: Session, kept: Sequence[Checkpoint]) -> dict[str, Any]:
    """A session in a list."""
    metadata = session.user_metadata
    return {
        "session_id": session.id,
        "created_at": session.created.isoformat(),
        "owner": session.tenant,
        "project_id": "",
        "status": status(session),
        "checkpoints_count": len(kept),
        "display_name": session.display_name,
        "user_metadata": None if metadata is None else {key: str(value) for key, value in metadata.items()},
        "checkpoint_storage_bytes": sum(checkpoint.size for checkpoint in kept),
    }
