"""Weights: saved for training, for sampling and for other tools, loaded again, copied and described.

In: JSON. Out: futures, and what a checkpoint is. Another tenant's path is answered as a missing one. Refuses to know
what is in an artifact.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError

from lorica.core.errors import DataError
from lorica.server import naming, work
from lorica.server.bodies import CopyWeightsBody, LoadWeightsBody, WeightsInfoBody
from lorica.server.copies import copy
from lorica.server.errors import ApiError, explain_validation
from lorica.server.routes.models import create_from_checkpoint
from lorica.server.routes.sessions import own_session
from lorica.server.routes.training import accept, accept_json, addressed, plain_body
from lorica.server.state import CallerDep, ServerDep

router = APIRouter(prefix="/api/v1", tags=["weights"])


@router.post("/save_weights")
async def save_weights(request: Request, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Adapter and optimiser, so that training can go on from here."""
    return await accept_json(request, server, caller.tenant, work.SAVE)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """The adapter alone, to sample from: under a name, or for one sampling session."""
    return await accept_json(request, server, caller.tenant, work.SAVE_SAMPLER)


@router.post("/save_weights_external")
async def save_weights_external(request: Request, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """The adapter as PEFT and others load it."""
    return await accept_json(request, server, caller.tenant, work.SAVE_EXTERNAL)


@router.post("/load_weights")
async def load_weights(request: Request, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Load a checkpoint into a run, or begin a run with it."""
    body = await plain_body(request, server)
    try:
        fields = json.loads(body)
        in_place = isinstance(fields, dict) and fields.get("model_id") is not None
    except (ValueError, RecursionError):
        raise ApiError(422, "validation", "The body is not JSON.") from None
    if in_place:
        run_id, seq = addressed(body)
        return await accept(server, caller.tenant, run_id, seq, work.LOAD, body)
    try:
        asked = LoadWeightsBody.model_validate(fields)
    except ValidationError as error:
        raise ApiError(422, "validation", explain_validation(error.errors())) from None
    return await create_from_checkpoint(asked, server, caller.tenant)


@router.post("/weights_info")
async def weights_info(body: WeightsInfoBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """What one has to know of a checkpoint to go on from it."""
    found = await server.dispatcher.rt.work.checkpoint(body.tinker_path, caller.tenant)
    opened, flags = found.info.get("opened") or {}, found.info.get("flags") or {}
    return {
        "base_model": found.info.get("base_model", ""),
        "is_lora": opened.get("rank") is not None,
        "lora_rank": opened.get("rank"),
        "optimizer_config": {"type": "adamw"},
        "train_unembed": flags.get("train_unembed"),
        "train_mlp": flags.get("train_mlp"),
        "train_attn": flags.get("train_attn"),
        "method": opened.get("method"),
        "method_config": opened.get("config"),
        "targets": opened.get("targets"),
        "trainable_parameters": opened.get("parameters"),
        "lora_alpha": (opened.get("config") or {}).get("alpha"),
    }


@router.post("/copy_weights")
async def copy_weights(body: CopyWeightsBody, request: Request, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """A copy of a checkpoint that belongs to the caller. The same X-Idempotency-Key gives the same copy."""
    if body.session_id is None or body.model_seq_id is None:
        raise DataError("copy_weights needs session_id and model_seq_id here: this server has no projects.")
    work.check_token(body.weights_access_token)
    await own_session(server, body.session_id, caller.tenant)
    source = await server.dispatcher.rt.work.checkpoint(body.source_path, caller.tenant)
    run = naming.run_id(body.session_id, body.model_seq_id)
    path = await copy(server, source, run, caller.tenant, body.ttl_seconds, request.headers.get("x-idempotency-key"))
    return {"tinker_path": path}
