"""Training runs as records.

In: ids. Out: the tenant's runs, newest first. Refuses to know how they are executed.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lorica.server.errors import not_found
from lorica.server.records import run_json
from lorica.server.routes.sessions import Limit, Offset
from lorica.server.state import CallerDep, Server, ServerDep
from lorica.store import checkpoints, runs
from lorica.store.runs import Run

router = APIRouter(prefix="/api/v1", tags=["training runs"])


async def _shown(server: Server, run: Run) -> dict[str, Any]:
    def last(c: Any) -> list[Any]:
        pages = [
            checkpoints.list_checkpoints(c, run.tenant, 1, run_id=run.id, kind="training"),
            checkpoints.list_checkpoints(c, run.tenant, 1, run_id=run.id, kind="sampler"),
        ]
        return [page.items[0] if page.items else None for page in pages]

    training, sampler = await server.database.aread(last)
    return run_json(run, training, sampler)


@router.get("/training_runs")
async def listing(
    server: ServerDep,
    caller: CallerDep,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: str = "owned",
    project_id: str | None = None,
) -> dict[str, Any]:
    """The tenant's runs."""
    page = await server.database.aread(lambda c: runs.list_runs(c, caller.tenant, limit, offset))
    return {
        "training_runs": [await _shown(server, run) for run in page.items],
        "cursor": {"offset": offset, "limit": limit, "total_count": page.total},
    }


@router.get("/training_runs/{run_id}")
async def one(run_id: str, server: ServerDep, caller: CallerDep, access_scope: str = "owned") -> dict[str, Any]:
    """One run."""
    run = await server.database.aread(lambda c: runs.get_run(c, run_id, caller.tenant))
    if run is None:
        raise not_found("training run", run_id)
    return await _shown(server, run)
