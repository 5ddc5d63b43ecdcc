"""Runs begin here: from nothing, or from a checkpoint; and say what they are.

In: `create_model`, `load_weights`, `get_info`. Out: futures, and what is known of a run. A base model that is not
served is refused by name. Refuses to know methods: what a run is made of is the engine's to judge.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from fastapi import APIRouter

from lorica.core.errors import DataError, LoricaError, did_you_mean
from lorica.server import naming, specs, work
from lorica.server.backbones import Backbone
from lorica.server.bodies import CreateModelBody, GetInfoBody, LoadWeightsBody
from lorica.server.errors import ApiError, busy, told_of
from lorica.server.routes.sessions import own_session
from lorica.server.state import CallerDep, Server, ServerDep
from lorica.store import runs
from lorica.store.checkpoints import Checkpoint
from lorica.store.runs import Run

router = APIRouter(prefix="/api/v1", tags=["training runs"])

SILENT = dt.timedelta(minutes=10)
"""A session that was not heard for so long counts as gone; the SDK is heard every ten seconds."""


def backbone_of(server: Server, name: str) -> Backbone:
    """The backbone that a base model's name stands for. Raises ApiError 404 naming what is served."""
    found = server.backbones.find(name)
    if found is None:
        served = [backbone.name for backbone in server.backbones.all()]
        raise ApiError(
            404,
            "missing",
            f"Base model {name!r} is not served here.{did_you_mean(name, served)}",
            hint=f"Served: {', '.join(served)}.",
        )
    return found


@router.post("/create_model")
async def create_model(body: CreateModelBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """A new run on a base model: LoRA, or any method that `user_metadata["method"]` names."""
    backbone = backbone_of(server, body.base_model)
    await own_session(server, body.session_id, caller.tenant)
    run_id = naming.run_id(body.session_id, body.model_seq_id)
    await check_room(server, caller.tenant, run_id)
    try:
        spec = specs.spec_of(body, str(backbone.info.get("family", "")), backbone.methods)
        patterns = spec["targets"].get("rank_pattern")
        for rank in (spec["config"].get("rank"), *(patterns.values() if isinstance(patterns, dict) else ())):
            check_rank(server, caller.tenant, rank)
    except LoricaError as error:
        return {"request_id": server.dispatcher.refuse(caller.tenant, run_id, told_of(error)), "model_id": run_id}
    run = Run(
        id=run_id,
        tenant=caller.tenant,
        session_id=body.session_id,
        base_model=body.base_model,
        spec=spec,
        user_metadata=body.user_metadata,
        optimizer_config=body.optimizer_config.model_dump(),
        info={"flags": specs.flags_of(body)},
    )
    future = await server.dispatcher.create(run, backbone, body.model_dump_json().encode())
    return {"request_id": future, "model_id": run_id}


def check_rank(server: Server, tenant: str, rank: Any) -> None:
    """Raises DataError for a rank above the tenant's limit, and for what is none: it could not be compared."""
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise DataError(f"Rank is {rank!r}: a whole number is right.")
    most = server.limiter.rank(tenant)
    if rank > most:
        raise DataError(f"Rank {rank} is above this key's limit of {most}.")


async def check_room(server: Server, tenant: str, run_id: str) -> None:
    """Raises ApiError 429 where a tenant has all the runs that it may have; a call that comes again has its place."""
    most = server.limiter.resident(tenant)
    if most == 0 or await server.database.aread(lambda c: runs.get_run(c, run_id, tenant)) is not None:
        return
    since = dt.datetime.now(dt.UTC) - SILENT
    if await server.database.aread(lambda c: runs.live_runs(c, tenant, since)) >= most:
        raise busy(
            f"This key has {most} runs of living sessions, the most that it may have; end one, or wait.",
            seconds=1,
            code="quota",
        )


async def create_from_checkpoint(body: LoadWeightsBody, server: Server, tenant: str) -> dict[str, Any]:
    """A new run that begins with a checkpoint's adapter, and with `optimizer` its optimiser too."""
    if body.session_id is None or body.model_seq_id is None:
        raise ApiError(422, "validation", "load_weights needs session_id and model_seq_id, or model_id and seq_id.")
    await own_session(server, body.session_id, tenant)
    run_id = naming.run_id(body.session_id, body.model_seq_id)
    await check_room(server, tenant, run_id)
    work.check_token(body.weights_access_token)
    found = await server.dispatcher.rt.work.checkpoint(body.path, tenant)
    base = body.base_model or str(found.info.get("base_model", ""))
    backbone = backbone_of(server, base)
    try:
        work.check_loadable(found, base, optimizer=body.optimizer)
        if body.optimizer_config is not None and body.optimizer_config.type not in specs.OPTIMIZERS:
            raise DataError(f"Optimizer {body.optimizer_config.type!r} is not supported here; 'adamw' is.")
        await server.places.read(found.artifact)
    except LoricaError as error:
        return {"request_id": server.dispatcher.refuse(tenant, run_id, told_of(error)), "model_id": run_id}
    run = Run(
        id=run_id,
        tenant=tenant,
        session_id=body.session_id,
        base_model=base,
        spec=_continued(found),
        user_metadata=body.user_metadata,
        optimizer_config={"type": "adamw"},
        info={
            "flags": found.info.get("flags"),
            "loaded_from": body.path,
            "load_optimizer": body.optimizer,
        },
    )
    future = await server.dispatcher.create(run, backbone, body.model_dump_json().encode())
    return {"request_id": future, "model_id": run_id}


def _continued(found: Checkpoint) -> dict[str, Any]:
    """The specification of a run that begins with a checkpoint; the adapter's folder decides."""
    spec = dict(found.info.get("spec") or {"method": "lora", "config": {}, "targets": {}, "seed": 0})
    opened = found.info.get("opened") or {}
    return {**spec, "config": opened.get("config", spec.get("config", {})), "parent": found.artifact}


@router.post("/get_info")
async def get_info(body: GetInfoBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """What a run is: its base, its method's rank, its tokenizer."""
    queue = await server.dispatcher.queue(body.model_id, caller.tenant)
    run, info = queue.run, queue.backbone.info
    opened = run.info.get("opened") or {}
    return {
        "type": "get_info",
        "model_id": run.id,
        "model_name": run.base_model,
        "model_data": {
            "arch": info.get("family"),
            "model_name": run.base_model,
            "tokenizer_id": info.get("tokenizer") or None,
        },
        "optimizer_config": run.optimizer_config or {"type": "adamw"},
        "is_lora": opened.get("rank") is not None,
        "lora_rank": opened.get("rank"),
        "method": opened.get("method"),
        "method_config": opened.get("config"),
        "targets": opened.get("targets"),
        "lora_alpha": (opened.get("config") or {}).get("alpha"),
        "trainable_parameters": opened.get("parameters"),
        "sites": opened.get("sites"),
    }
