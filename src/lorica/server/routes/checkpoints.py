"""Checkpoints as records: listed, deleted, given a time to live, shown to others.

In: a run's id and a checkpoint's, whose two parts are `weights/NAME`. Out: records. Refuses to know what is in one.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from fastapi import APIRouter, Response

from lorica.server.bodies import TtlBody
from lorica.server.errors import not_found
from lorica.server.records import checkpoint_json
from lorica.server.routes.sessions import Limit, Offset
from lorica.server.state import CallerDep, ServerDep
from lorica.store import checkpoints, runs

router = APIRouter(prefix="/api/v1", tags=["checkpoints"])

ONE = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


def path_of(run_id: str, kind: str, name: str) -> str:
    return f"tinker://{run_id}/{kind}/{name}"


@router.get("/checkpoints")
async def listing(server: ServerDep, caller: CallerDep, limit: Limit = 100, offset: Offset = 0) -> dict[str, Any]:
    """All checkpoints of the tenant, newest first."""
    page = await server.database.aread(lambda c: checkpoints.list_checkpoints(c, caller.tenant, limit, offset))
    return {
        "checkpoints": [checkpoint_json(checkpoint) for checkpoint in page.items],
        "cursor": {"offset": offset, "limit": limit, "total_count": page.total},
    }


@router.get("/training_runs/{run_id}/checkpoints")
async def of_run(run_id: str, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Checkpoints of one run, newest first."""
    page = await server.database.aread(lambda c: checkpoints.list_checkpoints(c, caller.tenant, 100_000, run_id=run_id))
    if not page.items and await server.database.aread(lambda c: runs.get_run(c, run_id, caller.tenant)) is None:
        raise not_found("training run", run_id)
    return {"checkpoints": [checkpoint_json(checkpoint) for checkpoint in page.items], "cursor": None}


@router.delete(ONE, status_code=204)
async def delete(run_id: str, kind: str, name: str, server: ServerDep, caller: CallerDep) -> Response:
    """Remove a checkpoint and what it holds."""
    path = path_of(run_id, kind, name)
    gone = await server.database.write(lambda c: checkpoints.delete_checkpoint(c, path, caller.tenant))
    if gone is None:
        raise not_found("checkpoint", path)
    await server.dispatcher.retire(gone.artifact)
    return Response(status_code=204)


@router.put(ONE + "/ttl", status_code=204)
async def ttl(run_id: str, kind: str, name: str, body: TtlBody, server: ServerDep, caller: CallerDep) -> Response:
    """When it shall go, counted from now; null is never."""
    path = path_of(run_id, kind, name)
    at = None if body.ttl_seconds is None else dt.datetime.now(dt.UTC) + dt.timedelta(seconds=body.ttl_seconds)
    if not await server.database.write(lambda c: checkpoints.set_expiry(c, path, caller.tenant, at)):
        raise not_found("checkpoint", path)
    return Response(status_code=204)


@router.post(ONE + "/publish", status_code=204)
async def publish(run_id: str, kind: str, name: str, server: ServerDep, caller: CallerDep) -> Response:
    """Let every tenant who knows its path read it."""
    return await _public(path_of(run_id, kind, name), True, server, caller)


@router.delete(ONE + "/publish", status_code=204)
async def unpublish(run_id: str, kind: str, name: str, server: ServerDep, caller: CallerDep) -> Response:
    """Let others read it no longer."""
    return await _public(path_of(run_id, kind, name), False, server, caller)


async def _public(path: str, public: bool, server: ServerDep, caller: CallerDep) -> Response:
    if not await server.database.write(lambda c: checkpoints.set_public(c, path, caller.tenant, public)):
        raise not_found("checkpoint", path)
    return Response(status_code=204)
