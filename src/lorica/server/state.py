"""The server's state, made when it starts: the store, the engines, the dispatcher and who may ask.

In: settings. Out: one object that every route finds at `request.app.state.server`. Refuses to know routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, cast

from fastapi import Depends, Request

from lorica.core.errors import LoricaError
from lorica.core.storage import storage
from lorica.server.auth import Auth, Caller
from lorica.server.backbones import Backbones
from lorica.server.dispatch import Dispatcher
from lorica.server.futures import Futures
from lorica.server.limits import Limiter
from lorica.server.observer import Observer
from lorica.server.places import Places
from lorica.server.runtime import Runtime, next_id
from lorica.server.settings import Settings
from lorica.server.signing import Signer, load_secret
from lorica.server.work import Work
from lorica.store import checkpoints, journal, keys
from lorica.store.artifacts import Artifacts
from lorica.store.database import Database
from lorica.store.sessions import Sampler

log = logging.getLogger("lorica.server")

SWEEP_SECONDS = 300.0
"""How often what has expired is removed."""


@dataclass(slots=True)
class Server:
    """All that routes need."""

    settings: Settings
    database: Database
    places: Places
    auth: Auth
    limiter: Limiter
    backbones: Backbones
    dispatcher: Dispatcher
    signer: Signer
    observer: Observer
    first_key: str | None = None
    samplers: dict[str, Sampler] = field(default_factory=dict)
    started: float = field(default_factory=time.time)


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Server]:
    """A server from its first breath to its last: open, take up what was left, and in the end drain and close."""
    with storage(settings.data_dir):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = await asyncio.to_thread(Database.open, settings.database_url)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(database.close)
        artifacts = Artifacts(settings.artifacts_url, cache=settings.data_dir / "cache")
        stack.callback(artifacts.close)
        places = Places(artifacts, settings.data_dir / "staging")
        limiter = Limiter(settings.limits)
        work = Work(database, places, limiter, next_id)
        observer = Observer(database, settings.engine.get("token_budget"))
        stack.push_async_callback(observer.close)
        runtime = Runtime(settings, database, places, limiter, work, Futures(), observer, [observer.finished])
        backbones = Backbones(settings, observer)
        stack.push_async_callback(backbones.stop)
        await backbones.start()
        dispatcher = Dispatcher(runtime, backbones)
        await dispatcher.start()
        stack.push_async_callback(dispatcher.drain)
        server = Server(
            settings,
            database,
            places,
            Auth(database, limiter),
            limiter,
            backbones,
            dispatcher,
            Signer(load_secret(settings.data_dir / "secret")),
            observer,
            await _first_key(database),
        )
        sweeper = asyncio.create_task(_sweep(server))
        stack.callback(sweeper.cancel)
        yield server


async def _first_key(database: Database) -> str | None:
    """A key for a database that has none; told once."""
    if await database.aread(lambda c: bool(keys.list_keys(c))):
        return None
    _, secret = await database.write(lambda c: keys.create_key(c, "default", "made at the first start"))
    return secret


async def _sweep(server: Server) -> None:
    """Remove what has expired: results, and checkpoints with their artifacts."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            now = dt.datetime.now(dt.UTC)
            kept = dt.timedelta(seconds=server.settings.result_seconds)
            await server.database.write(partial(journal.expire, before=now - kept))
            for old in await server.database.aread(partial(checkpoints.expired_checkpoints, at=now)):
                if await server.database.write(partial(checkpoints.drop_expired, path=old.path, at=now)):
                    await server.dispatcher.retire(old.artifact)
        except LoricaError as error:
            log.warning("sweeping: %s", error.message)


async def get_server(request: Request) -> Server:
    """The server of this app. A coroutine, as what is none costs a request a thread."""
    return cast(Server, request.app.state.server)


ServerDep = Annotated[Server, Depends(get_server)]


async def get_caller(request: Request) -> Caller:
    """Who asks. Raises ApiError 401."""
    return await (await get_server(request)).auth.caller(request)


CallerDep = Annotated[Caller, Depends(get_caller)]
