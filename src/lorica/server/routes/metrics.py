"""`/metrics` for Prometheus, and the times of all answers.

In: a key of an operator, unless the settings open the page to everybody. Out: the text format. Refuses to know what
the numbers mean.
"""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorica.server import metrics
from lorica.server.errors import ApiError
from lorica.server.state import Server, ServerDep
from lorica.store import overview

router = APIRouter(tags=["operate"])

UNMATCHED = "(none)"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@router.get("/metrics", response_class=Response)
async def exposed(request: Request, server: ServerDep) -> Response:
    """The server's numbers, as Prometheus reads them."""
    if not server.settings.metrics_open:
        caller = await server.auth.caller(request)
        if caller.tenant not in server.settings.operators:
            raise ApiError(403, "forbidden", "The metrics are for operators' keys.", hint="See settings.operators.")
    await _look(server)
    return Response(server.observer.metrics.render(), media_type=metrics.CONTENT_TYPE)


async def _look(server: Server) -> None:
    """What is only looked up when somebody asks."""
    numbers = server.observer.metrics
    entries, size = await server.database.aread(overview.held)
    numbers.journal_entries.set(entries)
    numbers.journal_bytes.set(size)
    numbers.open.set(len(server.dispatcher.rt.futures))
    for backbone in server.backbones.all():
        numbers.up.labels(backbone.name).set(backbone.ready.is_set())
        numbers.set_restarts(backbone.name, max(0, backbone.life - 1))


class Timed:
    """Middleware: counts every answer and how long it took to begin, under its route's template."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, told = time.perf_counter(), False

        async def timed(message: Message) -> None:
            nonlocal told
            if message["type"] == "http.response.start" and not told:
                told = True
                _count(scope, int(message["status"]), time.perf_counter() - begun)
            await send(message)

        await self._app(scope, receive, timed)


def _count(scope: Scope, status: int, seconds: float) -> None:
    server: Server | None = scope["app"].state.server
    if server is None:
        return
    numbers = server.observer.metrics
    method = scope["method"] if scope["method"] in METHODS else UNMATCHED
    route = getattr(scope.get("route"), "path", UNMATCHED)
    numbers.http_seconds.labels(method, route).observe(seconds)
    numbers.http.labels(method, route, str(status)).inc()
