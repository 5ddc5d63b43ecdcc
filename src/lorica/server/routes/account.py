"""The caller's own key, and what of the protocol belongs to the hosted service.

In: a key. Out: whose it is; its end. The rest is refused with a sentence that says so. Refuses to know other keys.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from lorica.server.errors import ApiError
from lorica.server.state import CallerDep, ServerDep
from lorica.store import keys

router = APIRouter(prefix="/api/v1", tags=["account"])


def _unsupported(sentence: str) -> ApiError:
    return ApiError(501, "unsupported", sentence, headers={"x-should-retry": "false"})


@router.get("/auth/apikey/me")
async def me(caller: CallerDep) -> dict[str, Any]:
    """Whose key this is."""
    return {"user_urn": f"urn:lorica:key:{caller.key_id}", "org_urn": f"urn:lorica:tenant:{caller.tenant}"}


@router.delete("/auth/apikey/me", status_code=204)
async def revoke(server: ServerDep, caller: CallerDep) -> Response:
    """Revoke the key that asks."""
    await server.database.write(lambda c: keys.revoke_key(c, caller.key_id))
    server.auth.forget()
    return Response(status_code=204)


@router.post("/auth/token")
async def token(caller: CallerDep) -> None:
    """Tokens belong to the hosted service."""
    raise _unsupported("This server knows API keys only; it gives out no tokens.")


@router.post("/create_custom_loss")
async def create_custom_loss(caller: CallerDep) -> None:
    """Custom losses run in the client."""
    raise _unsupported("Custom losses run in the client here: forward_backward_custom works without uploading them.")


@router.get("/audit")
async def audit(caller: CallerDep) -> None:
    """The hosted service's audit log."""
    raise _unsupported("This server keeps no audit log; its own log says who did what.")


@router.get("/billing/usage/events")
@router.get("/billing/usage/checkpoints/current")
async def billing(caller: CallerDep) -> None:
    """Nobody is billed."""
    raise _unsupported("This server bills nobody.")
