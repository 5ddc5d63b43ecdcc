"""Sessions: what one client program does, from its first request to its end.

In: requests of a tenant. Out: its own sessions; another's are absent. Refuses to know runs beyond their ids.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from lorica.server import naming
from lorica.server.bodies import CreateSessionBody, FinishBody, HeartbeatBody, ProjectBody
from lorica.server.errors import ApiError, not_found
from lorica.server.records import texts
from lorica.server.search import SearchBody, matches, summary
from lorica.server.state import CallerDep, Server, ServerDep
from lorica.store import checkpoints, runs, sessions
from lorica.store.sessions import Session

router = APIRouter(prefix="/api/v1", tags=["sessions"])

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**31)]


async def own_session(server: Server, session_id: str, tenant: str) -> Session:
    """A tenant's session. Raises ApiError 404."""
    found = await server.database.aread(lambda c: sessions.get_session(c, session_id, tenant))
    if found is None:
        raise not_found("session", session_id)
    return found


@router.post("/create_session")
async def create(body: CreateSessionBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """A new session."""
    session = Session(
        id=naming.session_id(),
        tenant=caller.tenant,
        tags=body.tags,
        user_metadata=body.user_metadata,
        sdk_version=body.sdk_version,
        display_name=body.display_name,
    )
    await server.database.write(lambda c: sessions.add_session(c, session))
    return {"type": "create_session", "session_id": session.id}


@router.post("/session_heartbeat")
async def heartbeat(body: HeartbeatBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """The client lives; 410 once its session is finished, which ends its heartbeat."""
    if not await server.database.write(lambda c: sessions.beat(c, body.session_id, caller.tenant)):
        await own_session(server, body.session_id, caller.tenant)
        raise ApiError(410, "finished", f"Session {body.session_id!r} is finished.")
    return {"type": "session_heartbeat"}


@router.post("/sessions/search")
async def search(body: SearchBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Sessions that fit all that is asked for, newest first."""
    page = await server.database.aread(lambda c: sessions.list_sessions(c, caller.tenant, 10_000))
    found = [session for session in page.items if matches(body, session)]
    if body.cursor is not None:
        mark = (body.cursor.last_created_at, body.cursor.last_session_id)
        found = [session for session in found if (session.created, session.id) < mark]
    taken = found[: body.limit]
    cursor = None
    if len(found) > len(taken):
        cursor = {"last_created_at": taken[-1].created.isoformat(), "last_session_id": taken[-1].id}
    listed = []
    for session in taken:
        own = await server.database.aread(partial(runs.session_runs, session_id=session.id, tenant=caller.tenant))
        kept = [
            checkpoint
            for run in own
            for checkpoint in (
                await server.database.aread(
                    partial(checkpoints.list_checkpoints, tenant=caller.tenant, limit=1000, run_id=run.id)
                )
            ).items
        ]
        listed.append(summary(session, kept))
    return {"sessions": listed, "next_cursor": cursor}


@router.get("/sessions")
async def listing(
    server: ServerDep, caller: CallerDep, limit: Limit = 20, offset: Offset = 0, access_scope: str = "owned"
) -> dict[str, Any]:
    """Ids of the tenant's sessions, newest first."""
    page = await server.database.aread(lambda c: sessions.list_sessions(c, caller.tenant, limit, offset))
    return {"sessions": [session.id for session in page.items]}


@router.get("/sessions/{session_id}")
async def one(session_id: str, server: ServerDep, caller: CallerDep, access_scope: str = "owned") -> dict[str, Any]:
    """A session's runs and samplers."""
    session = await own_session(server, session_id, caller.tenant)
    own = await server.database.aread(lambda c: runs.session_runs(c, session_id, caller.tenant))
    samplers = await server.database.aread(lambda c: sessions.session_samplers(c, session_id, caller.tenant))
    return {
        "training_run_ids": [run.id for run in own],
        "sampler_ids": [sampler.id for sampler in samplers],
        "user_metadata": None if session.user_metadata is None else texts(session.user_metadata),
        "display_name": session.display_name,
    }


@router.post("/sessions/{session_id}/finish", status_code=204)
async def finish(session_id: str, body: FinishBody, server: ServerDep, caller: CallerDep) -> Response:
    """The client is done; the first word counts."""
    reason = body.reason.type if body.detail is None else f"{body.reason.type}: {body.detail[:1000]}"
    if not await server.database.write(lambda c: sessions.finish_session(c, session_id, caller.tenant, reason)):
        await own_session(server, session_id, caller.tenant)
    return Response(status_code=204)


@router.put("/sessions/{session_id}/project")
async def project(session_id: str, body: ProjectBody, server: ServerDep, caller: CallerDep) -> None:
    """Projects belong to the hosted service."""
    await own_session(server, session_id, caller.tenant)
    raise ApiError(501, "unsupported", "This server has no projects; a key's tenant is what separates its work.",
                   headers={"x-should-retry": "false"})  # fmt: skip


@router.get("/sessions/{session_id}/trace_export")
async def trace(session_id: str, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Traces belong to the hosted service."""
    await own_session(server, session_id, caller.tenant)
    return {"status": "failed", "error": "This server keeps no traces; /metrics and its log say what it does."}
