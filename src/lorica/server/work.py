"""What each kind of request of a run asks of the engine, and what its answer becomes.

In: a request as it stands in the journal. Out: a command and how its reply is told and recorded; or a failure. The same
request gives the same command when it runs again after a crash. Refuses to know order, journals and engines' lives.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from lorica.core.errors import DataError, LoricaError, MissingError, StorageError
from lorica.engine.commands import Adam, Command, Load, Opened, Save, Saved, Step, Stepped, Train, Trained
from lorica.server import bodies
from lorica.server.errors import explain_validation, told_of
from lorica.server.futures import PROTOBUF, Result
from lorica.server.limits import Limiter
from lorica.server.naming import Kind, TinkerPath, sampler_id
from lorica.server.places import Places
from lorica.server.wire import train
from lorica.store import checkpoints, runs, sessions
from lorica.store.checkpoints import Checkpoint
from lorica.store.database import Database
from lorica.store.runs import Run
from lorica.store.sessions import Sampler

CREATE = "create"
FORWARD_BACKWARD = "forward_backward"
OPTIM_STEP = "optim_step"
LOAD = "load_weights"
SAVE = "save_weights"
SAVE_SAMPLER = "save_weights_for_sampler"
SAVE_EXTERNAL = "save_weights_external"
MISSING = "missing"
"""A place in the order whose request never came."""

EPHEMERAL = dt.timedelta(days=7)
"""How long the weights of a sampling client live that were never given a name."""

Record = Callable[[Any], None]


@dataclass(slots=True)
class Prepared:
    """A command, how its reply is told, and what is recorded with it (in the same transaction as the result).

    `before` is done first when the reply is there; `after` are artifacts that the record made needless; `reads` are
    those that the run needs until its next snapshot, which comes at once with `snapshot`.
    """

    command: Command
    tell: Callable[[Any], Result]
    record: Callable[[Any], Record] | None = None
    before: Callable[[Any], Awaitable[None]] | None = None
    after: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    snapshot: bool = False


class Work:
    """Prepares requests. `next_id` numbers commands."""

    def __init__(self, database: Database, places: Places, limiter: Limiter, next_id: Callable[[], int]) -> None:
        self._database = database
        self._places = places
        self._limiter = limiter
        self._id = next_id

    async def prepare(self, run: Run, kind: str, body: bytes) -> Prepared:
        """Raises LoricaError where the request is wrong."""
        if kind == FORWARD_BACKWARD:
            return self._train(run, body)
        if kind == OPTIM_STEP:
            return self._step(run, body)
        if kind == LOAD:
            return await self._load(run, body)
        if kind in (SAVE, SAVE_SAMPLER, SAVE_EXTERNAL):
            return await self._save(run, kind, body)
        raise DataError(f"There is no kind of request {kind!r}.")

    async def again(self, run: Run, kind: str, body: bytes) -> Command | None:
        """The command that rebuilds what a finished request did to the run; None where it changed nothing."""
        if kind == FORWARD_BACKWARD:
            command = train.command(train.parse(body), id=self._id(), run=run.id)
            return command if command.backward else None
        if kind in (OPTIM_STEP, LOAD):
            return (await self.prepare(run, kind, body)).command
        return None

    # -- training -----------------------------------------------------------------------------------------------------

    def _train(self, run: Run, body: bytes) -> Prepared:
        command: Train = train.command(train.parse(body), id=self._id(), run=run.id)

        def tell(reply: Trained) -> Result:
            return Result(PROTOBUF, train.answer(reply))

        return Prepared(command, tell)

    def _step(self, run: Run, body: bytes) -> Prepared:
        asked = _parse(bodies.OptimStepBody, body).adam_params
        for name, value in asked.model_dump(exclude={"type"}).items():
            if not math.isfinite(value):
                raise DataError(f"adam_params.{name} is {value}: a finite number is right.")
        if asked.grad_clip_norm < 0:
            raise DataError(
                f"adam_params.grad_clip_norm is {asked.grad_clip_norm}: a positive number is right, or 0 for none."
            )
        adam = Adam(
            lr=asked.learning_rate,
            beta1=asked.beta1,
            beta2=asked.beta2,
            eps=asked.eps,
            weight_decay=asked.weight_decay,
            clip=asked.grad_clip_norm,
        )

        def tell(reply: Stepped) -> Result:
            return Result.of({"type": "optim_step", "metrics": reply.metrics})

        return Prepared(Step(id=self._id(), run=run.id, adam=adam), tell)

    # -- weights ------------------------------------------------------------------------------------------------------

    async def _load(self, run: Run, body: bytes) -> Prepared:
        asked = _parse(bodies.LoadWeightsBody, body)
        check_token(asked.weights_access_token)
        found = await self.checkpoint(asked.path, run.tenant)
        check_loadable(found, run.base_model, optimizer=asked.optimizer)
        path = await self._places.read(found.artifact)
        told = {"type": "load_weights", "path": asked.path, "model_id": run.id}

        def tell(reply: Opened) -> Result:
            return Result.of(told)

        def record(reply: Opened) -> Record:
            return lambda c: runs.set_run(c, run.id, rank=reply.rank, info={**run.info, "opened": opened(reply)})

        command = Load(id=self._id(), run=run.id, path=path, optimizer=asked.optimizer, name=asked.path)
        return Prepared(command, tell, record, reads=[found.artifact], snapshot=True)

    async def checkpoint(self, path: str, tenant: str) -> Checkpoint:
        """A checkpoint that the tenant may read. Raises MissingError, the same for another tenant's."""
        parsed = TinkerPath.parse(path)
        found = await self._database.aread(lambda c: checkpoints.get_checkpoint(c, str(parsed), tenant))
        if found is None:
            raise MissingError(f"There is no checkpoint {path}.")
        return found

    async def _save(self, run: Run, kind: str, body: bytes) -> Prepared:
        if kind == SAVE:
            asked: bodies.SaveWeightsBody = _parse(bodies.SaveWeightsBody, body)
            form: Kind = "training"
        elif kind == SAVE_EXTERNAL:
            external = _parse(bodies.SaveExternalBody, body)
            if external.age_encryption_recipients:
                raise DataError("This server does not encrypt exports; leave age_encryption_recipients out.")
            asked, form = external, "external"
        else:
            asked, form = _parse(bodies.SaveForSamplerBody, body), "sampler"
        sampler = asked if isinstance(asked, bodies.SaveForSamplerBody) and asked.path is None else None
        if asked.path is None and (sampler is None or sampler.sampling_session_seq_id is None):
            raise DataError("A checkpoint needs a name; give 'path'.")
        await self.room(run.tenant)
        if asked.path is not None and not asked.overwrite:
            await self.free(str(TinkerPath(run.id, form, asked.path)), run.tenant)
        artifact = self._places.new(run.id, form)
        name = asked.path or artifact.rpartition("/")[2]
        command = Save(id=self._id(), run=run.id, path=str(self._places.target(artifact)), state=form == "training")
        path = str(TinkerPath(run.id, form, name))
        prepared = Prepared(command, lambda reply: Result.of(_told(kind, path, reply, sampler, run)))

        async def before(reply: Saved) -> None:
            await self._places.publish(artifact)

        def record(reply: Saved) -> Record:
            checkpoint = _checkpoint(run, path, form, name, artifact, reply, asked, ephemeral=sampler is not None)

            def write(c: Any) -> None:
                earlier = checkpoints.add_checkpoint(c, checkpoint, overwrite=asked.overwrite)
                if earlier is not None:
                    prepared.after.append(earlier.artifact)
                if sampler is not None:
                    _add_sampler(c, run, sampler, checkpoint)

            return write

        prepared.before, prepared.record = before, record
        return prepared

    async def free(self, path: str, tenant: str) -> None:
        """Raises DataError where the path is taken."""
        if await self._database.aread(lambda c: checkpoints.get_checkpoint(c, path, tenant)) is not None:
            raise DataError(f"{path} exists already: choose another name, or save with overwrite.")

    async def room(self, tenant: str) -> None:
        """Raises DataError where the tenant's checkpoints take all the place that they may."""
        most = self._limiter.storage(tenant)
        if most:
            taken = await self._database.aread(lambda c: checkpoints.storage_bytes(c, tenant))
            if taken >= most:
                raise DataError(f"This key's checkpoints take {taken:,} of {most:,} bytes; delete some first.")


def _parse(model: type[Any], body: bytes) -> Any:
    """A JSON body; raises DataError for what does not fit."""
    try:
        return model.model_validate(json.loads(body))
    except ValidationError as error:
        raise DataError(explain_validation(error.errors())) from None
    except ValueError:
        raise DataError("The body is not JSON.") from None


def opened(reply: Opened) -> dict[str, Any]:
    """What is kept of an engine's answer about a run."""
    return {
        "method": reply.method,
        "config": reply.config,
        "targets": reply.targets,
        "rank": reply.rank,
        "parameters": reply.parameters,
        "sites": reply.sites,
    }


def check_token(token: str | None) -> None:
    """Raises DataError: there are no tokens for another's weights here."""
    if token is not None:
        raise DataError("This server knows no weights_access_token; its owner can publish the checkpoint instead.")


def check_loadable(found: Checkpoint, base_model: str, *, optimizer: bool) -> None:
    """Raises DataError where a run on `base_model` cannot continue from a checkpoint."""
    base = found.info.get("base_model", base_model)
    if base != base_model:
        raise DataError(f"{found.path} was trained on {base!r}; this run is on {base_model!r}.")
    if optimizer and not found.info.get("state", found.kind == "training"):
        raise DataError(f"{found.path} holds an adapter without optimiser state; load it without the optimizer.")


def _checkpoint(
    run: Run,
    path: str,
    form: Kind,
    name: str,
    artifact: str,
    reply: Saved,
    asked: bodies.SaveWeightsBody,
    *,
    ephemeral: bool,
) -> Checkpoint:
    now = dt.datetime.now(dt.UTC)
    ttl = dt.timedelta(seconds=asked.ttl_seconds) if asked.ttl_seconds else EPHEMERAL if ephemeral else None
    info = {
        "base_model": run.base_model,
        "state": form == "training",
        "spec": run.spec,
        "opened": run.info.get("opened"),
        "flags": run.info.get("flags"),
        "saved": reply.info,
    }
    return Checkpoint(
        path=path,
        run_id=run.id,
        tenant=run.tenant,
        kind=form,
        name=name,
        artifact=artifact,
        size=reply.size,
        created=now,
        expires=now + ttl if ttl else None,
        ephemeral=ephemeral,
        user_metadata=asked.user_metadata,
        info=info,
    )


def _add_sampler(c: Any, run: Run, asked: bodies.SaveForSamplerBody, checkpoint: Checkpoint) -> None:
    """A sampling session over weights that were just saved. An inflight one follows the run's newest such weights."""
    info: dict[str, Any] = {"artifacts": [checkpoint.artifact]}
    if asked.kind == "inflight":
        info = {"inflight": run.id}
        current = runs.get_run(c, run.id, run.tenant)
        runs.set_run(c, run.id, info={**(current.info if current else run.info), "inflight": checkpoint.artifact})
    sampler = Sampler(_sampler_id(run, asked), run.tenant, run.session_id, run.base_model, None, info=info)
    if not sessions.add_sampler(c, sampler):
        raise DataError(f"Sampling session {sampler.id} exists already.")


def _sampler_id(run: Run, asked: bodies.SaveForSamplerBody) -> str:
    return sampler_id(run.session_id or run.id, asked.sampling_session_seq_id or 0)


def _told(kind: str, path: str, reply: Saved, sampler: bodies.SaveForSamplerBody | None, run: Run) -> dict[str, Any]:
    told: dict[str, Any] = {"type": kind, "path": path}
    if sampler is not None:
        told |= {"path": None, "sampling_session_id": _sampler_id(run, sampler)}
    if kind == SAVE_EXTERNAL:
        told["size_bytes"] = reply.size
    return told


def failure(error: LoricaError) -> Result:
    """A refusal as a failed future."""
    category = "server" if isinstance(error, StorageError) else "user"
    return Result.failed(category, error.code, told_of(error))
