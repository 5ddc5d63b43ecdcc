"""Files of a checkpoint by signed links, which need no key and expire.

In: a checkpoint's path, then a link. Out: links, then files. Any kind of checkpoint can be fetched. Refuses to know
what the files hold.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator
from typing import IO, Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from lorica.core.errors import LoricaError
from lorica.server.errors import ApiError
from lorica.server.routes.checkpoints import ONE, path_of
from lorica.server.state import CallerDep, ServerDep

router = APIRouter(tags=["checkpoints"])

LIFE = 3600
"""Seconds for which a link is good."""
CHUNK = 2**20


@router.get("/api/v1" + ONE + "/external_weights_urls")
async def urls(
    run_id: str, kind: str, name: str, request: Request, server: ServerDep, caller: CallerDep
) -> dict[str, Any]:
    """One link for each file of a checkpoint."""
    found = await server.dispatcher.rt.work.checkpoint(path_of(run_id, kind, name), caller.tenant)
    files = await asyncio.to_thread(server.places.artifacts.list, found.artifact)
    expires = int(time.time()) + LIFE
    base = (server.settings.public_url or str(request.base_url)).rstrip("/")
    links = {}
    for file in files:
        subject = f"{found.artifact}/{file}"
        links[file] = f"{base}/files/{quote(subject)}?{server.signer.query(subject, expires)}"
    return {"urls": links, "expires": dt.datetime.fromtimestamp(expires, dt.UTC).isoformat()}


@router.get("/files/{subject:path}")
async def file(
    subject: str,
    server: ServerDep,
    expires: Annotated[int, Query(ge=0, lt=2**40)],
    signature: Annotated[str, Query(max_length=100)],
) -> StreamingResponse:
    """A file, for whoever has its link."""
    if not server.signer.valid(subject, expires, signature):
        raise ApiError(403, "forbidden", "This link is not genuine, or its time has passed.")
    try:
        opened = await asyncio.to_thread(server.places.artifacts.open, subject)
    except LoricaError:
        raise ApiError(404, "missing", "This file is not there any more.") from None
    size = await asyncio.to_thread(_size, opened)
    return StreamingResponse(
        _chunks(opened), media_type="application/octet-stream", headers={"content-length": str(size)}
    )


def _size(file: IO[bytes]) -> int:
    size = file.seek(0, 2)
    file.seek(0)
    return size


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    try:
        while chunk := await asyncio.to_thread(file.read, CHUNK):
            yield chunk
    finally:
        file.close()
