"""What the SDK asks before anything else: flags, capabilities, and where its telemetry goes.

In: the SDK's version and its events. Out: the flags at their defaults, the models that are served. Refuses to keep
telemetry.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lorica.server.bodies import ClientConfigBody
from lorica.server.state import CallerDep, ServerDep

router = APIRouter(prefix="/api/v1", tags=["client"])


@router.post("/client/config")
async def client_config(body: ClientConfigBody, caller: CallerDep) -> dict[str, Any]:
    """Feature flags: every one at the SDK's default. Those named here are of SDKs before 0.25, which then send training
    calls as later ones do.
    """
    return {"proto_write_fwdbwd": True, "fwd_via_fwdbwd": True}


@router.post("/client/dynamic_config")
async def dynamic_config(body: ClientConfigBody, caller: CallerDep) -> dict[str, Any]:
    """Flags that a client asks for again: abandoned samples are cancelled."""
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


@router.get("/get_server_capabilities")
async def capabilities(server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """The models that are served."""
    return {
        "supported_models": [
            {
                "model_name": backbone.name,
                "max_context_length": backbone.info.get("context"),
                "trainable": True,
                "sampleable": True,
            }
            for backbone in server.backbones.all()
        ]
    }


@router.post("/telemetry")
async def telemetry(caller: CallerDep) -> dict[str, str]:
    """Events of the SDK, which this server does not keep."""
    return {"status": "accepted"}
