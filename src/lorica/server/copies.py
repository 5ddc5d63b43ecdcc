"""Copies of checkpoints: an artifact of its own, so that neither end of the pair can change the other.

In: a checkpoint and the run that the copy shall belong to. Out: the copy's path. Refuses to know HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import hashlib
import tempfile
from pathlib import Path

from lorica.server.naming import TinkerPath
from lorica.server.state import Server
from lorica.store import checkpoints
from lorica.store.checkpoints import Checkpoint


async def copy(
    server: Server, source: Checkpoint, run: str, tenant: str, ttl_seconds: int | None, key: str | None
) -> str:
    """Copy a checkpoint; with a `key` that was used before, the earlier copy's path."""
    mark = hashlib.sha256(f"{key}\n{source.path}".encode()).hexdigest()[:8] if key else None
    path = TinkerPath(run, source.kind, source.name if mark is None else f"{source.name[:180]}-{mark}")
    known = await server.database.aread(lambda c: checkpoints.get_checkpoint(c, str(path), tenant))
    if known is not None and mark is not None:
        return str(path)
    artifact = server.places.new(run, source.kind)
    await asyncio.to_thread(_copy, server, source.artifact, artifact)
    now = dt.datetime.now(dt.UTC)
    made = dataclasses.replace(
        source,
        path=str(path),
        run_id=run,
        tenant=tenant,
        name=path.name,
        artifact=artifact,
        created=now,
        expires=None if ttl_seconds is None else now + dt.timedelta(seconds=ttl_seconds),
        public=False,
        ephemeral=False,
        info={**source.info, "copied_from": source.path},
    )
    await server.database.write(lambda c: checkpoints.add_checkpoint(c, made))
    return str(path)


def _copy(server: Server, source: str, target: str) -> None:
    artifacts = server.places.artifacts
    with tempfile.TemporaryDirectory(prefix="lorica-copy-") as folder:
        local = Path(folder) / "copy"
        artifacts.get_folder(source, local)
        artifacts.put_folder(local, target)
