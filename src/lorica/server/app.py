"""The application: routes, errors and the server's life.

In: settings, and perhaps a server that runs already. Out: a FastAPI app. Its documentation is `/openapi.json`, and
`/docs` for people; nothing of it is loaded from elsewhere. Refuses to know what routes do.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable

from fastapi import APIRouter, FastAPI

from lorica import __version__
from lorica.server import errors
from lorica.server.bodylimit import BodyLimit
from lorica.server.routes import ROUTERS
from lorica.server.routes.metrics import Timed
from lorica.server.settings import Settings
from lorica.server.state import Server, running


def create_app(settings: Settings, *, server: Server | None = None, routers: Iterable[APIRouter] = ROUTERS) -> FastAPI:
    """The app of one server; without `server` it starts one, and stops it when it ends."""

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        if server is not None:
            yield
            return
        async with running(settings) as own:
            app.state.server = own
            yield

    app = FastAPI(
        title="Lorica",
        version=__version__,
        description="Train and sample adapters over shared backbones: the Tinker protocol, and more.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    app.add_middleware(BodyLimit, most=settings.limits.body_bytes)
    errors.install(app)
    app.add_middleware(Timed)
    for router in routers:
        app.include_router(router)
    return app
