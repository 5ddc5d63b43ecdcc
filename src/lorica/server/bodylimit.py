"""No request is larger than the limit: what is too large is refused before it is held in memory.

In: an ASGI application. Out: the same, where bodies end at a number of bytes. Routes that read their body by parts and
count for themselves are left alone. Refuses to know what bodies mean.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorica.server.errors import body

OWN_LIMIT = "/api/v1/adapters/"


class _TooLargeError(Exception):
    """The body went over the limit while it was read."""


class BodyLimit:
    """Answers 413 where a body has more than `most` bytes, whatever its Content-Length says."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN_LIMIT):
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self._most:
            await self._refuse(scope, receive, send)
            return
        seen, answered = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLargeError:
            if answered:
                raise
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = body("too_large", f"The body is larger than {self._most:,} bytes.")
        await JSONResponse(told, 413, {"connection": "close"})(scope, receive, send)
