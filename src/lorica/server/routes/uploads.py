"""Adapters that were trained elsewhere: a PEFT folder's files, checked, become a checkpoint.

In: files one by one, then a word that they are all there. Out: a path to continue, stack and sample. No archive is
unpacked, and a file's name is one of a few. Refuses to know methods: the engine judges them when the path is used.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import shutil
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import Field

from lorica.core.errors import FormatError
from lorica.core.storage import replacing_file, storage
from lorica.server.bodies import NAME, Body
from lorica.server.errors import ApiError
from lorica.server.naming import TinkerPath
from lorica.server.routes.models import backbone_of
from lorica.server.state import CallerDep, Server, ServerDep
from lorica.server.uploads import FILES, check_folder
from lorica.store import checkpoints
from lorica.store.checkpoints import Checkpoint

router = APIRouter(prefix="/api/v1", tags=["uploads"])

UploadName = Annotated[str, Path(pattern=rf"^{NAME}$")]


class RegisterBody(Body):
    base_model: str
    user_metadata: Annotated[dict[str, str] | None, Field(max_length=100)] = None
    overwrite: bool = False


def _folder(server: Server, tenant: str, name: str) -> FilePath:
    return server.settings.data_dir / "staging" / "uploads" / tenant / name


@router.put("/adapters/{name}/files/{file}", status_code=200)
async def put_file(
    name: UploadName, file: str, request: Request, server: ServerDep, caller: CallerDep
) -> dict[str, Any]:
    """One file of an adapter, as it is."""
    if file not in FILES:
        raise FormatError(f"An adapter has no file {file!r}; it has {', '.join(FILES)}.")
    most, size = server.settings.limits.upload_bytes, 0
    folder = _folder(server, caller.tenant, name)
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(folder / file) as target:
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise ApiError(413, "too_large", f"The file is larger than {most:,} bytes.")
                target.write(part)
    return {"file": file, "size_bytes": size}


@router.post("/adapters/{name}")
async def register(name: UploadName, body: RegisterBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """Check the files of an adapter and give it a path."""
    backbone_of(server, body.base_model)
    folder = _folder(server, caller.tenant, name)
    found = await asyncio.to_thread(check_folder, folder)
    path = TinkerPath(f"upload:{caller.tenant}", "training", name)
    artifact = server.places.new(path.run, "upload")
    await asyncio.to_thread(server.places.artifacts.put_folder, folder, artifact)
    checkpoint = Checkpoint(
        path=str(path),
        run_id=path.run,
        tenant=caller.tenant,
        kind=path.kind,
        name=name,
        artifact=artifact,
        size=found.size,
        created=dt.datetime.now(dt.UTC),
        user_metadata=body.user_metadata,
        info={"base_model": body.base_model, "state": False, "opened": found.opened, "uploaded": True},
    )
    earlier = await server.database.write(lambda c: checkpoints.add_checkpoint(c, checkpoint, overwrite=body.overwrite))
    if earlier is not None:
        await server.dispatcher.retire(earlier.artifact)
    shutil.rmtree(folder, ignore_errors=True)
    return {"tinker_path": str(path), "size_bytes": found.size, "tensors": found.tensors}
