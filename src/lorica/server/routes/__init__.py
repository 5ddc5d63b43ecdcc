"""Routes, one file for each resource. Each has a `router`; `ROUTERS` is all of them, those asked most often first: a
request is matched against one route after the other.

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
    futures.router,
    sampling.router,
    training.router,
    sessions.router,
    openai.router,
    client.router,
    models.router,
    weights.router,
    runs.router,
    checkpoints.router,
    external.router,
    uploads.router,
    combine.router,
    account.router,
    health.router,
    metrics.router,
    dashboard.router,
    docs.router,
)
