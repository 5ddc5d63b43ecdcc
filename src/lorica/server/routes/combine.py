"""Checkpoints combined and explained, on the engine that holds their base.

In: paths, a rule and its parameters. Out: a path that can be sampled and continued at once, or a report. The answer
comes when it is done: until then nothing was promised. Refuses to know rules and spectra: the engine judges them.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from lorica.core.errors import DataError, LoricaError
from lorica.engine.commands import Combine, Inspect
from lorica.engine.link import EngineError, EngineGone
from lorica.server.backbones import Backbone
from lorica.server.bodies import Body, Name, Ttl
from lorica.server.errors import ApiError
from lorica.server.naming import TinkerPath
from lorica.server.routes.models import backbone_of, check_rank
from lorica.server.state import CallerDep, Server, ServerDep
from lorica.store import checkpoints
from lorica.store.checkpoints import Checkpoint

router = APIRouter(prefix="/api/v1", tags=["combining"])

Path = Annotated[str, Field(min_length=1, max_length=600)]
MOST = 256
"""Parents of one merge."""


class MergeBody(Body):
    """`how` is a rule of `lorica merge`, `parameters` are its fields."""

    paths: Annotated[list[Path], Field(min_length=1, max_length=MOST)]
    name: Name
    how: Annotated[str, Field(max_length=100)]
    parameters: Annotated[dict[str, Any], Field(default_factory=dict)]
    weights: Annotated[list[float] | None, Field(max_length=MOST)] = None
    rank: Annotated[int | None, Field(ge=1)] = None
    overwrite: bool = False
    ttl_seconds: Ttl | None = None
    user_metadata: Annotated[dict[str, str] | None, Field(max_length=100)] = None


class InspectBody(Body):
    path: Path
    against: Annotated[list[Path], Field(max_length=MOST, default_factory=list)]
    intruders: bool = False
    top: Annotated[int, Field(ge=1)] = 10
    threshold: float = 0.5


@router.post("/merge")
async def merge(body: MergeBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """One adapter out of several by a rule: a path to sample, continue and stack."""
    found, backbone = await _read(server, body.paths, caller.tenant)
    check_rank(server, caller.tenant, body.rank)
    path = TinkerPath(f"merged:{caller.tenant}", "training", body.name)
    await server.dispatcher.rt.work.room(caller.tenant)
    if not body.overwrite:
        await server.dispatcher.rt.work.free(str(path), caller.tenant)
    artifact = server.places.new(path.run, "merge")
    command = Combine(
        id=server.dispatcher.rt.next_id(),
        adapters=[await server.places.read(one.artifact) for one in found],
        names=[one.path for one in found],
        how=body.how,
        path=str(server.places.target(artifact)),
        settings=body.parameters,
        weights=body.weights,
        rank=body.rank,
    )
    reply = await _asked(backbone, command)
    await server.places.publish(artifact)
    now = dt.datetime.now(dt.UTC)
    opened = {key: reply.info[key] for key in ("method", "config", "targets", "rank", "parameters", "sites")}
    checkpoint = Checkpoint(
        path=str(path),
        run_id=path.run,
        tenant=caller.tenant,
        kind=path.kind,
        name=body.name,
        artifact=artifact,
        size=reply.size,
        created=now,
        expires=None if body.ttl_seconds is None else now + dt.timedelta(seconds=body.ttl_seconds),
        user_metadata=body.user_metadata,
        info={"base_model": backbone.name, "state": False, "opened": opened, "merged_from": [o.path for o in found]},
    )
    try:
        earlier = await server.database.write(
            lambda c: checkpoints.add_checkpoint(c, checkpoint, overwrite=body.overwrite)
        )
    except LoricaError:  # its name was taken meanwhile
        await server.places.delete(artifact)
        raise
    if earlier is not None:
        await server.dispatcher.retire(earlier.artifact)
    return {"tinker_path": str(path), "size_bytes": reply.size, "report": reply.info["report"], **opened}


@router.post("/inspect")
async def inspect(body: InspectBody, server: ServerDep, caller: CallerDep) -> dict[str, Any]:
    """What `lorica inspect --json` says of a checkpoint, beside others."""
    found, backbone = await _read(server, [body.path, *body.against], caller.tenant)
    folders = [await server.places.read(one.artifact) for one in found]
    command = Inspect(
        id=server.dispatcher.rt.next_id(),
        adapter=folders[0],
        name=found[0].path,
        against=folders[1:],
        against_names=[one.path for one in found[1:]],
        intruders=body.intruders,
        top=body.top,
        threshold=body.threshold,
    )
    return dict((await _asked(backbone, command)).report)


async def _read(server: Server, paths: list[str], tenant: str) -> tuple[list[Checkpoint], Backbone]:
    """Checkpoints of one base that the tenant may read, and that base. Raises MissingError, DataError, ApiError."""
    found = [await server.dispatcher.rt.work.checkpoint(path, tenant) for path in paths]
    bases = {str(one.info.get("base_model", "")): one.path for one in found}
    if len(bases) > 1:
        (one, at), (other, there) = list(bases.items())[:2]
        raise DataError(f"{at} is of {one!r}, and {there} of {other!r}; only adapters of one base fit together.")
    return found, backbone_of(server, next(iter(bases)))


async def _asked(backbone: Backbone, command: Combine | Inspect) -> Any:
    """The engine's answer. Raises ApiError."""
    try:
        return await backbone.send(command)
    except EngineGone:
        text = f"The engine of {backbone.name!r} ended before this was done; send it again."
        raise ApiError(503, "engine_gone", text, headers={"retry-after": "2"}) from None
    except EngineError as error:
        raise ApiError(422 if error.category == "user" else 500, error.code, error.message) from None
