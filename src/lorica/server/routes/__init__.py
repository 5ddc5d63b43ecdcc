"""Routes, one file for each resource. Each has a `router`; `ROUTERS` is all of them, in the order of the documentation.

In: nothing. Out: routers. Refuses to know applications. A new resource is a file here and a line below.
"""

from __future__ import annotations

from fastapi import APIRouter

from lorica.server.routes import (
    account,
    checkpoints,
    client,
    combine,
    dashboard,
    docs,
    external,
    futures,
    health,
    metrics,
    models,
    openai,
    runs,
    sampling,
    sessions,
    training,
    uploads,
    weights,
)

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    client.router,
    sessions.router,
    models.router,
    training.router,
    weights.router,
    sampling.router,
    futures.router,
    runs.router,
    checkpoints.router,
    external.router,
    uploads.router,
    combine.router,
    account.router,
    openai.router,
    metrics.router,
    dashboard.router,
    docs.router,
)
