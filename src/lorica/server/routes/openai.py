"""The OpenAI protocol: models, completions and conversations, whole or as they come.

In: JSON with `Authorization: Bearer tml-…`. Out: JSON, or server-sent events that end with `[DONE]`. Errors have
OpenAI's shape. A client that leaves stops its samples. Refuses to know how text is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from sse_starlette import EventSourceResponse

from lorica.server.auth import Caller
from lorica.server.errors import ApiError
from lorica.server.futures import Result
from lorica.server.openai import jobs, models
from lorica.server.openai.answers import Answers, Chats, Completions
from lorica.server.openai.bodies import ChatRequest, CompletionRequest
from lorica.server.openai.draws import together
from lorica.server.openai.errors import OpenAIRoute, explain
from lorica.server.openai.jobs import Job
from lorica.server.state import CallerDep, Server, ServerDep

CLIENT_LEFT = 499
T = TypeVar("T")

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": f"{text}, as `{{error: {{message, type, param, code}}}}`"}
    for status, text in (
        (400, "The request is wrong"),
        (401, "No valid key"),
        (404, "No such model"),
        (429, "Too much at once"),
        (500, "The server is wrong"),
        (503, "The server is stopping"),
    )
}
_STREAMS: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {"description": "An answer, or with `stream` its chunks", "content": {"text/event-stream": {}}},
}

router = APIRouter(prefix="/v1", tags=["openai"], route_class=OpenAIRoute)


@router.get("/models", responses=_ERRORS)
async def list_models(server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Base models and the caller's adapters: whatever `model` may be."""
    return {"object": "list", "data": await models.listed(server, caller.tenant)}


@router.get("/models/{name:path}", responses=_ERRORS)
async def get_model(name: str, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """One model."""
    found = await models.find(server, name, caller.tenant)
    return models.shown(found)


@router.post("/completions", responses=_STREAMS, response_model=None)
async def completions(
    body: CompletionRequest, request: Request, server: ServerDep, caller: CallerDep
) -> Response | dict[str, Any]:
    """Text that goes on from a prompt."""
    model = await models.find(server, body.model, caller.tenant)
    job = await jobs.completion(body, model, caller.tenant, server.settings.limits)
    return await _answer(Completions(job), body, request, server, caller)


@router.post("/chat/completions", responses=_STREAMS, response_model=None)
async def chat_completions(
    body: ChatRequest, request: Request, server: ServerDep, caller: CallerDep
) -> Response | dict[str, Any]:
    """The assistant's next turn of a conversation."""
    model = await models.find(server, body.model, caller.tenant)
    job = await jobs.chat(body, model, caller.tenant, server.settings.limits)
    return await _answer(Chats(job), body, request, server, caller)


async def _answer(
    answers: Answers, body: CompletionRequest | ChatRequest, request: Request, server: Server, caller: Caller
) -> Response | dict[str, Any]:
    if server.dispatcher.draining:
        raise ApiError(503, "stopping", "The server is stopping; send it again.", headers={"retry-after": "2"})
    events = _counted(answers.job, server, caller.tenant, body.stream)
    if not body.stream:
        whole = await _unless_left(request, lambda: _whole(answers, events))
        return Response(status_code=CLIENT_LEFT) if whole is None else whole
    chunks = _chunks(answers, events, told_usage=body.include_usage)
    # what the engine refuses is an answer with a status, not a stream
    first = await _unless_left(request, lambda: anext(chunks))
    if first is None:
        return Response(status_code=CLIENT_LEFT)
    return EventSourceResponse(_lines(first, chunks), sep="\n")


Events = AsyncGenerator[tuple[int, int]]
Chunks = AsyncGenerator[dict[str, Any]]


async def _counted(job: Job, server: Server, tenant: str, stream: bool) -> Events:
    """The job's events, within the tenant's limits, and noted when they are over. Raises ApiError 429."""
    most = job.prompt_tokens + sum(draw.most_tokens for draw in job.draws)
    server.limiter.begin_samples(tenant, job.count, most)
    try:
        async with contextlib.aclosing(together(job.draws)) as events:
            async for event in events:
                yield event
    finally:
        server.limiter.end_samples(tenant, job.count)
        done = Result("text/event-stream" if stream else "application/json")
        server.dispatcher.rt.finished("completion", done, job.prompt_tokens + job.drawn_tokens, tenant)


async def _whole(answers: Answers, events: Events) -> dict[str, Any]:
    async with contextlib.aclosing(events):
        async for _ in events:
            pass
    writers = [writer for draw in answers.job.draws for writer in draw.writers]
    return answers.whole([answers.choice(index, writer.take()) for index, writer in enumerate(writers)])


async def _chunks(answers: Answers, events: Events, *, told_usage: bool) -> Chunks:
    """Chunks of all samples as their text becomes certain."""
    job, begun, over = answers.job, set[int](), set[int]()
    async with contextlib.aclosing(events):
        async for number, sample in events:
            index = number * job.n + sample
            part = job.draws[number].writers[sample].take()
            if index in over or not (part.text or part.tokens or part.reason):
                continue
            for choice in answers.delta(index, part, first=index not in begun):
                yield answers.piece([choice], told_usage=told_usage)
            begun.add(index)
            if part.reason is not None:
                over.add(index)
    if told_usage:
        yield answers.piece([], told_usage=True, last=True)


async def _lines(first: dict[str, Any], chunks: Chunks) -> AsyncIterator[dict[str, str]]:
    """Chunks as events. A failure in between is told as one, and then the stream ends."""
    yield {"data": json.dumps(first, ensure_ascii=False)}
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield {"data": json.dumps(chunk, ensure_ascii=False)}
    except Exception as error:
        yield {"data": json.dumps(explain(error)[1])}
        return
    yield {"data": "[DONE]"}


async def _unless_left(request: Request, work: Callable[[], Awaitable[T]]) -> T | None:
    """The result, or None when the client went away first; then the work is cancelled."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work()), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
