"""Whether the server lives, and whether it can work.

In: nothing. Out: `ok`, or 503 with what is missing. Asked without a key. Refuses to know tenants.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from lorica.server.state import ServerDep

router = APIRouter(tags=["health"])


@router.get("/health")
@router.get("/api/v1/healthz")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/ready", response_model=None)
async def ready(server: ServerDep) -> JSONResponse:
    """Every backbone is loaded, and nothing is being stopped."""
    models = {backbone.name: backbone.ready.is_set() for backbone in server.backbones.all()}
    good = all(models.values()) and not server.dispatcher.draining
    told: dict[str, Any] = {"status": "ready" if good else "starting", "models": models}
    if server.dispatcher.draining:
        told["status"] = "stopping"
    return JSONResponse(told, 200 if good else 503)
