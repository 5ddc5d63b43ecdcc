"""The dashboard: a static page at `/`, and what it shows, as JSON and as a stream of changes.

In: an API key; an operator's sees all tenants, another its own. Out: records and numbers, which the page draws and does
not keep. Refuses to change anything.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from lorica.server import assets, shown
from lorica.server.errors import ApiError, not_found
from lorica.server.observer import point_json
from lorica.server.routes.sessions import Limit, Offset
from lorica.server.state import CallerDep, Server, ServerDep
from lorica.store import overview, points

router = APIRouter(tags=["dashboard"])

API = "/api/lorica/v1"
PAGE_HEADERS = {
    # the page needs nothing from elsewhere, and nothing may reach into it
    "content-security-policy": "default-src 'self'; style-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
Most = Annotated[int, Query(ge=2, le=20_000, description="points at most; a longer curve is thinned")]


def sees(server: Server, tenant: str) -> str | None:
    """Whose records a tenant may look at: its own, or all (None)."""
    return None if tenant in server.settings.operators else tenant


@router.get(API + "/overview")
async def get_overview(server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """The server, its engines and what waits, and who asks."""
    own = sees(server, caller.tenant)
    held = await server.database.aread(overview.held)
    return {
        "tenant": caller.tenant,
        "operator": own is None,
        "charts": assets.charts() is not None,
        **shown.server_json(server, held),
        "queue": shown.queue_json(server, own),
    }


@router.get(API + "/runs")
async def get_runs(server: ServerDep, caller: CallerDep, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
    """Runs, the last that was asked for something first, and where each stands."""
    own = sees(server, caller.tenant)
    page = await server.database.aread(lambda c: overview.runs_of(c, own, limit, offset))
    last = await server.database.aread(lambda c: points.last_points(c, [run.id for run in page.items]))
    found = [shown.run_json(server, run, last.get(run.id)) for run in page.items]
    return {"runs": found, "cursor": {"offset": offset, "limit": limit, "total_count": page.total}}


@router.get(API + "/runs/{run_id}")
async def get_run(run_id: str, server: ServerDep, caller: CallerDep, most: Most = 2000) -> dict[str, Any]:
    """One run and its curve: every `stride`-th step and the last one."""
    own = sees(server, caller.tenant)
    run = await server.database.aread(lambda c: overview.run_of(c, run_id, own))
    if run is None:
        raise not_found("run", run_id)
    curve, stride = await server.database.aread(lambda c: points.curve(c, run_id, most))
    told = [point_json(point) for point in curve]
    return {
        **shown.run_json(server, run, curve[-1] if curve else None),
        "stride": stride,
        "curve": {key: [one[key] for one in told] for key in ("step", "loss", "tokens", "grad_norm", "lr", "at")},
    }


@router.get(API + "/checkpoints")
async def get_checkpoints(
    server: ServerDep, caller: CallerDep, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """Checkpoints that were named, newest first."""
    own = sees(server, caller.tenant)
    page = await server.database.aread(lambda c: overview.checkpoints_of(c, own, limit, offset))
    found = [shown.checkpoint_json(checkpoint) for checkpoint in page.items]
    return {"checkpoints": found, "cursor": {"offset": offset, "limit": limit, "total_count": page.total}}


@router.get(API + "/tenants")
async def get_tenants(server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Tenants, their quotas and what they used today (UTC)."""
    own, today = sees(server, caller.tenant), dt.datetime.now(dt.UTC).date()
    found = await server.database.aread(lambda c: overview.tenants_of(c, own, today))
    return {"day": today.isoformat(), "tenants": [shown.tenant_json(server, tenant) for tenant in found]}


@router.get(
    API + "/events",
    response_class=EventSourceResponse,
    responses={200: {"description": "Server-sent events", "content": {"text/event-stream": {}}}},
)
async def get_events(server: ServerDep, caller: CallerDep) -> EventSourceResponse:
    """Changes as they happen: `point`, `stats`, `engine`, `runs`, `checkpoints`; `reload` where some were missed."""
    own = sees(server, caller.tenant)

    async def lines() -> AsyncIterator[ServerSentEvent]:
        async for change in server.observer.changes.follow(caller.tenant, everything=own is None):
            yield ServerSentEvent(json.dumps(change.data, allow_nan=False), event=change.kind)

    return EventSourceResponse(lines(), ping=15)


@router.get("/", response_class=FileResponse, include_in_schema=False)
async def index() -> Response:
    """The page."""
    return FileResponse(assets.STATIC / "index.html", headers=PAGE_HEADERS)


@router.get("/static/{name:path}", response_class=FileResponse, include_in_schema=False)
async def static(name: str) -> Response:
    """A file of the page, or of the library that draws its charts."""
    path = assets.find(name)
    if path is None:
        raise ApiError(404, "missing", f"There is no file {name[:200]!r}.")
    return FileResponse(path, headers=PAGE_HEADERS)
