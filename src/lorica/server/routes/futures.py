"""Futures: results are waited for here, up to half a minute a call, without asking again and again.

In: ids of requests. Out: the result as it was stored, or that it is not there yet and why. Refuses to know what a
result says.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from lorica.server.bodies import CancelBody, RetrieveBody, RetrieveManyBody
from lorica.server.errors import ApiError
from lorica.server.futures import JSON, Result, dump
from lorica.server.routes.sampling import own_sampler
from lorica.server.state import CallerDep, ServerDep

router = APIRouter(prefix="/api/v1", tags=["futures"])

INLINE = 4 * 2**20
"""Bytes up to which a result is sent without announcing its size first."""


@router.post("/retrieve_future")
async def retrieve_future(body: RetrieveBody, server: ServerDep, caller: CallerDep) -> Response:
    """A request's result, or `try_again` with the state of the queue."""
    dispatcher = server.dispatcher
    try:
        result = await dispatcher.result(body.request_id, caller.tenant, server.settings.long_poll_seconds)
    except ApiError as error:
        if error.status == 404 and ":sample:" in body.request_id:
            # the SDK sends a sample again whose promise is gone
            raise ApiError(410, "gone", error.message) from None
        raise
    if result is None:
        state, reason = dispatcher.position(body.request_id)
        waiting = {
            "type": "try_again",
            "request_id": body.request_id,
            "queue_state": state,
            "queue_state_reason": reason,
        }
        return Response(dump(waiting), media_type=JSON)
    return answer(result, body.allow_metadata_only)


def answer(result: Result, metadata_only: bool) -> Response:
    """A result as the SDK reads it; a failure is an answer too, with status 200."""
    if result.failure is not None:
        told = {"error": result.failure.message, "category": result.failure.category, "code": result.failure.code}
        return Response(dump(told), media_type=JSON)
    if metadata_only and len(result.data) > INLINE:
        size = {"status": "complete_metadata", "response_payload_size": len(result.data)}
        return Response(dump(size), media_type=JSON)
    return Response(result.data, media_type=result.media)


@router.post("/retrieve_futures")
async def retrieve_futures(body: RetrieveManyBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Which requests of a sampling client are done since it last asked."""
    target = body.target
    await own_sampler(server, target.sampling_session_id, caller.tenant)
    for request_id in body.retrieved_request_ids:
        if server.dispatcher.rt.futures.known(request_id, caller.tenant):
            server.dispatcher.rt.futures.drop(request_id)
    seconds = server.settings.long_poll_seconds
    found, cursor = await server.dispatcher.samples.completions.after(
        target.sampling_session_id,
        target.cloned_sampler_id,
        body.prev_cursor,
        seconds if body.timeout is None else min(body.timeout, seconds),
    )
    return {"completions": found, "cursor": cursor}


@router.post("/cancel_future", status_code=204)
async def cancel_future(body: CancelBody, server: ServerDep, caller: CallerDep) -> Response:
    """Stop drawing samples that nobody waits for. A request that is done, or not the tenant's, stays as it is."""
    server.dispatcher.samples.cancel(body.request_id, caller.tenant)
    return Response(status_code=204)
