"""Records as the dashboard shows them.

In: records and the state of the server. Out: JSON. Refuses to know the database, and who may see what.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lorica import __version__
from lorica.server.observer import point_json
from lorica.server.records import checkpoint_json as sdk_checkpoint
from lorica.server.state import Server
from lorica.store.checkpoints import Checkpoint
from lorica.store.overview import Tenant
from lorica.store.points import Point
from lorica.store.runs import Run


def server_json(server: Server, held: tuple[int, int]) -> dict[str, Any]:
    """The server and its engines, with their reports of the last minutes."""
    return {
        "version": __version__,
        "started": server.started,
        "draining": server.dispatcher.draining,
        "journal": {"entries": held[0], "bytes": held[1]},
        "engines": [
            {
                "model": backbone.name,
                "ready": backbone.ready.is_set(),
                "restarts": max(0, backbone.life - 1),
                "info": {key: value for key, value in backbone.info.items() if key != "tokenizer"},
                "reports": list(server.observer.history[backbone.name]),
            }
            for backbone in server.backbones.all()
        ],
    }


def queue_json(server: Server, tenant: str | None) -> dict[str, Any]:
    """What waits: runs with requests that are not done, and requests for samples."""
    waiting = []
    for queue in server.dispatcher.queues():
        if queue.pending and tenant in (None, queue.run.tenant):
            state, reason = queue.position(queue.highest)
            waiting.append(
                {
                    "run": queue.run.id,
                    "tenant": queue.run.tenant,
                    "model": queue.run.base_model,
                    "pending": queue.pending,
                    "state": state,
                    "reason": reason,
                }
            )
    return {
        "runs": sorted(waiting, key=lambda one: -int(str(one["pending"]))),
        "open": len(server.dispatcher.rt.futures),
    }


def run_json(server: Server, run: Run, last: Point | None) -> dict[str, Any]:
    opened = run.info.get("opened") or {}
    queue = next((one for one in server.dispatcher.queues() if one.run.id == run.id), None)
    pending = queue.pending if queue is not None else 0
    state = (
        "corrupted" if run.corrupted
        else "closed" if run.closed
        else "working" if pending
        else "idle" if "opened" in run.info
        else "new"
    )  # fmt: skip
    return {
        "id": run.id,
        "tenant": run.tenant,
        "base_model": run.base_model,
        "method": opened.get("method") or run.spec.get("method"),
        "config": opened.get("config") or run.spec.get("config"),
        "targets": opened.get("targets") or run.spec.get("targets"),
        "rank": opened.get("rank"),
        "parameters": opened.get("parameters"),
        "user_metadata": run.user_metadata,
        "created": run.created.timestamp(),
        "last_request": run.last_request.timestamp(),
        "state": state,
        "corruption": run.corrupted,
        "pending": pending,
        "last": None if last is None else point_json(last),
    }


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    opened = checkpoint.info.get("opened") or {}
    return {
        **sdk_checkpoint(checkpoint),
        "run": checkpoint.run_id,
        "tenant": checkpoint.tenant,
        "name": checkpoint.name,
        "method": opened.get("method"),
        "config": opened.get("config"),
        "base_model": checkpoint.info.get("base_model"),
    }


def tenant_json(server: Server, tenant: Tenant) -> dict[str, Any]:
    """A tenant with the limits that hold for it: its own quotas, else the server's."""
    limits = server.settings.limits
    defaults = {
        "tokens_per_minute": limits.tokens_per_minute,
        "storage_bytes": limits.storage_bytes,
        "concurrent_samples": limits.concurrent_samples,
        "max_rank": limits.rank,
    }
    own = tenant.quotas.model_dump(exclude_none=True)
    return {
        **{field.name: getattr(tenant, field.name) for field in dataclasses.fields(tenant) if field.name != "quotas"},
        "limits": {**defaults, **own},
        "own_limits": sorted(own),
        "samples": server.limiter.samples(tenant.name),
    }
