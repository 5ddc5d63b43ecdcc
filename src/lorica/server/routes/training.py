"""The two calls that training is made of: `forward_backward` and `optim_step`.

In: protobuf and JSON. Out: futures. A request that has a place in its run's order is never refused by a status: it is
accepted, and its future fails, because the SDK would stand still otherwise. Refuses to know losses and optimisers.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import zstandard
from fastapi import APIRouter, Request

from lorica.core.errors import DataError
from lorica.server import work
from lorica.server.errors import ApiError
from lorica.server.state import CallerDep, Server, ServerDep
from lorica.server.wire import train

router = APIRouter(prefix="/api/v1", tags=["training"])

_LARGE = 2**20
"""Bytes from which a body is read in a thread, so that the server answers others meanwhile."""


@router.post("/forward_backward")
async def forward_backward(request: Request, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """The loss of some data and its gradient, which is added to what the run holds; or the loss alone."""
    body = await plain_body(request, server)
    try:
        message = train.parse(body) if len(body) < _LARGE else await asyncio.to_thread(train.parse, body)
    except DataError as error:
        raise ApiError(400, "data", error.message, headers={"x-should-retry": "false"}) from None
    head = await asyncio.to_thread(train.head, message) if len(body) > _LARGE else train.head(message)
    return await accept(
        server, caller.tenant, head.model_id, head.seq_id, work.FORWARD_BACKWARD, body, tokens=head.tokens
    )


@router.post("/optim_step")
async def optim_step(request: Request, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """One step of the optimiser on the gradient that was added up."""
    return await accept_json(request, server, caller.tenant, work.OPTIM_STEP)


async def accept(
    server: Server, tenant: str, run_id: str, seq: int | None, kind: str, body: bytes, *, tokens: int = 0
) -> dict[str, Any]:
    """Take a request into its run's order. A run that is not the tenant's fails the future, as a missing one does."""
    try:
        future = await server.dispatcher.submit(tenant, run_id, seq, kind, body, tokens)
    except ApiError as error:
        if error.status != 404:
            raise
        future = server.dispatcher.refuse(tenant, run_id or "none", error.message, error.code)
    return {"request_id": future, "model_id": run_id}


async def accept_json(request: Request, server: Server, tenant: str, kind: str) -> dict[str, Any]:
    """The same for a JSON body: only its run and its place are looked at here, the rest when its turn comes."""
    body = await plain_body(request, server)
    run_id, seq = addressed(body)
    return await accept(server, tenant, run_id, seq, kind, body)


def addressed(body: bytes) -> tuple[str, int | None]:
    """Run and place of a JSON request. Raises ApiError 422."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(422, "validation", "The body is not JSON.") from None
    run_id = fields.get("model_id") if isinstance(fields, dict) else None
    seq = fields.get("seq_id") if isinstance(fields, dict) else None
    if not isinstance(run_id, str) or not run_id or len(run_id) > 300:
        raise ApiError(422, "validation", "model_id: a run's id is right.")
    if seq is not None and (isinstance(seq, bool) or not isinstance(seq, int) or not 0 <= seq < 2**63):
        raise ApiError(422, "validation", f"seq_id: a number from 1 is right (given: {str(seq)[:80]!r}).")
    return run_id, seq


async def plain_body(request: Request, server: Server) -> bytes:
    """The body, unpacked, within the limit. Raises ApiError 413, 415."""
    most = server.settings.limits.body_bytes
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, "too_large", f"The body is larger than {most:,} bytes.")
        parts.append(part)
    body = b"".join(parts)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "zstd":
        return await asyncio.to_thread(unpacked, body, most)
    if encoding != "identity":
        raise ApiError(415, "encoding", f"Content-Encoding {encoding!r} is not read here; zstd is.")
    return body


def unpacked(body: bytes, most: int) -> bytes:
    """What zstd packed; never more than `most` bytes."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            plain = reader.read(most + 1)
    except zstandard.ZstdError:
        raise ApiError(400, "data", "The body says that it is zstd, and is not.") from None
    if len(plain) > most:
        raise ApiError(413, "too_large", f"The body is larger than {most:,} bytes.")
    return bytes(plain)
