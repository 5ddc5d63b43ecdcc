"""Sampling: sessions over a base model, a checkpoint or a stack of them, and requests for samples.

In: JSON. Out: samplers and futures. Another tenant's path is answered as a missing one; too much at once is 429, which
the SDK sends again. Refuses to know how tokens are drawn.
"""

from __future__ import annotations

import itertools
from typing import Any

from fastapi import APIRouter, Request

from lorica.core.errors import DataError
from lorica.server import naming, work
from lorica.server.bodies import CreateSamplingSessionBody, JoinBody, SampleBody
from lorica.server.errors import ApiError, not_found
from lorica.server.routes.models import backbone_of
from lorica.server.routes.sessions import own_session
from lorica.server.state import CallerDep, Server, ServerDep
from lorica.server.wire import sampling
from lorica.store import sessions
from lorica.store.sessions import Sampler

router = APIRouter(prefix="/api/v1", tags=["sampling"])

_clones = itertools.count(1)


async def own_sampler(server: Server, sampler_id: str, tenant: str) -> Sampler:
    """A tenant's sampler. Raises ApiError 404."""
    known = server.samplers.get(sampler_id)
    if known is None:
        known = await server.database.aread(lambda c: sessions.get_sampler(c, sampler_id, tenant))
    if known is None or known.tenant != tenant:
        raise not_found("sampling session", sampler_id)
    server.samplers[sampler_id] = known
    if len(server.samplers) > 10_000:
        server.samplers.pop(next(iter(server.samplers)))
    return known


async def sampler_over(
    server: Server, tenant: str, sampler_id: str, session_id: str | None, base_model: str | None, model_path: str | None
) -> Sampler:
    """A sampler over a base model, or over a path; `path,path` is a stack, innermost first. Raises LoricaError."""
    if not model_path:
        if not base_model:
            raise DataError("A sampling session needs a base_model or a model_path.")
        backbone_of(server, base_model)
        return Sampler(sampler_id, tenant, session_id, base_model, None, info={"artifacts": []})
    found = [await server.dispatcher.rt.work.checkpoint(path, tenant) for path in model_path.split(",")]
    bases = {str(checkpoint.info.get("base_model")) for checkpoint in found}
    base = base_model or bases.pop()
    for checkpoint in found:
        work.check_loadable(checkpoint, base, optimizer=False)
    backbone_of(server, base)
    info = {"artifacts": [checkpoint.artifact for checkpoint in found]}
    return Sampler(sampler_id, tenant, session_id, base, model_path, info=info)


@router.post("/create_sampling_session")
async def create(body: CreateSamplingSessionBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """A sampling session; the same one for the same number in its session."""
    await own_session(server, body.session_id, caller.tenant)
    sampler_id = naming.sampler_id(body.session_id, body.sampling_session_seq_id)
    sampler = await sampler_over(server, caller.tenant, sampler_id, body.session_id, body.base_model, body.model_path)
    if not await server.database.write(lambda c: sessions.add_sampler(c, sampler)):
        earlier = await own_sampler(server, sampler_id, caller.tenant)
        if (earlier.base_model, earlier.model_path) != (sampler.base_model, sampler.model_path):
            raise DataError(f"Sampling session {sampler_id} exists already, over other weights.")
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


@router.post("/join_sampling_session")
async def join(body: JoinBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """A number for a copy of a sampling client."""
    await own_sampler(server, body.sampling_session_id, caller.tenant)
    # numbers of an earlier process are smaller than this one's start in seconds
    return {"client_counter": (int(server.started) % 900_000) * 1000 + next(_clones)}


@router.get("/samplers/{sampler_id}")
async def sampler_info(sampler_id: str, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """What a sampling session samples from."""
    sampler = await own_sampler(server, sampler_id, caller.tenant)
    return {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.model_path}


@router.post("/asample")
async def asample(body: SampleBody, request: Request, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """A request for samples. What it cannot have fails its future."""
    sampler = await _sampler_of(body, server, caller.tenant)
    backbone = backbone_of(server, sampler.base_model)
    limits = server.settings.limits
    try:
        sampling.check(body, backbone.info.get("context"))
        if body.num_samples > limits.num_samples:
            raise DataError(f"num_samples is {body.num_samples}; at most {limits.num_samples} are drawn at once.")
        if max(body.topk_prompt_logprobs, body.topk_sample_logprobs) > limits.topk:
            raise DataError(f"Top-k tables are at most {limits.topk} wide.")
    except DataError as error:
        future = server.dispatcher.refuse(caller.tenant, sampler.id, error.message)
        return _promise(future, body)
    if body.seq_id is not None and body.seq_id >= 2**62:
        raise ApiError(422, "validation", f"seq_id {body.seq_id} is too large.")
    tokens = len(sampling.prompt_tokens(body)) + body.num_samples * (body.sampling_params.max_tokens or 0)
    future = await server.dispatcher.sample(
        sampler,
        backbone,
        body.seq_id if body.sampling_session_id else None,
        body,
        tokens=tokens,
        count=body.num_samples,
    )
    return _promise(future, body)


async def _sampler_of(body: SampleBody, server: Server, tenant: str) -> Sampler:
    """The sampling session of a request; one for this request alone where it names a model instead."""
    if body.sampling_session_id is not None:
        return await own_sampler(server, body.sampling_session_id, tenant)
    name = body.model_path or body.base_model or ""
    sampler_id = f"direct:{tenant}:{name.removeprefix('tinker://').replace('/', '_')}"[:280]
    sampler = await sampler_over(server, tenant, sampler_id, None, body.base_model, body.model_path)
    await server.database.write(lambda c: sessions.add_sampler(c, sampler))
    return sampler


def _promise(future: str, body: SampleBody) -> dict[str, Any]:
    return {"request_id": future, "sample_sequence_ids": naming.sequence_ids(future, body.num_samples)}
