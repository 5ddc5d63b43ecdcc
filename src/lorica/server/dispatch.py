"""The dispatcher: a request is in the journal before it is acknowledged, and then goes its run's way.

In: requests of callers. Out: ids of futures. A copy of a request that is known finds the first one. At a start,
everything that the journal holds open is taken up again. Refuses to know HTTP and wire formats.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from functools import partial
from typing import Any

from lorica.core.errors import DataError
from lorica.server import work
from lorica.server.backbones import Backbone, Backbones
from lorica.server.bodies import SampleBody
from lorica.server.errors import ApiError, not_found
from lorica.server.futures import Result
from lorica.server.items import AHEAD, Item
from lorica.server.naming import request_id
from lorica.server.runqueue import RunQueue
from lorica.server.runtime import Runtime
from lorica.server.samples import SAMPLE, Draw, Samples
from lorica.store import journal, replay, runs, sessions
from lorica.store.journal import Entry
from lorica.store.runs import Run
from lorica.store.sessions import Sampler

log = logging.getLogger("lorica.server.dispatch")


class Dispatcher:
    """One for the server. `start` before anything is submitted; `drain` before it ends."""

    def __init__(self, runtime: Runtime, backbones: Backbones) -> None:
        self.rt = runtime
        self.backbones = backbones
        self.samples = Samples(runtime)
        self.draining = False
        self._queues: dict[str, RunQueue] = {}
        runtime.retire = self.retire

    # -- beginning and end --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what the last process left open."""
        scopes = await self.rt.database.aread(journal.open_scopes)
        if not scopes:
            return
        living = {run.id: run for run in await self.rt.database.aread(runs.living_runs)}
        for scope in scopes:
            if scope in living:
                await self._resume_run(living[scope])
            else:
                await self._resume_samples(scope)
        log.info("taken up again", extra={"fields": {"scopes": len(scopes), "requests": len(self.rt.futures)}})

    async def _resume_run(self, run: Run) -> None:
        backbone = self.backbones.find(run.base_model)
        if backbone is None:
            log.warning("run %s is on %r, which is not served; its requests wait", run.id, run.base_model)
            return
        queue = self._queues[run.id] = RunQueue(self.rt, backbone, run)
        await queue.resume()

    async def _resume_samples(self, scope: str) -> None:
        entries = await self.rt.database.write(lambda c: replay.pending(c, scope, -1, ordered=False))
        for entry in entries:
            sampler = await self.rt.database.aread(partial(sessions.get_sampler, sampler_id=scope, tenant=entry.tenant))
            backbone = self.backbones.find(sampler.base_model) if sampler else None
            if sampler is None or backbone is None or entry.kind != SAMPLE:
                gone = Result.failed("server", "missing", "What this request needs is not there after a restart.")
                await self.rt.database.write(
                    partial(journal.finish, request_id=entry.id, result_type="error", outcome=gone.outcome)
                )
                continue
            count = _count(entry.body)
            self.rt.futures.open(entry.id, entry.tenant)
            self.rt.limiter.note_samples(entry.tenant, count)
            draw = Draw(entry.id, entry.seq or 0, sampler, entry.body, entry.tokens, count)
            self.samples.submit(draw, backbone)

    async def drain(self) -> None:
        """Take nothing new; finish what the engines have, for a while; write a snapshot of every run that needs one."""
        self.draining = True
        work_left = [asyncio.ensure_future(queue.drain()) for queue in self._queues.values()]
        work_left.append(asyncio.ensure_future(self.samples.drain()))
        _, left = await asyncio.wait(work_left, timeout=self.rt.settings.drain_seconds)
        for task in left:
            task.cancel()
        log.info("drained", extra={"fields": {"left": len(self.rt.futures)}})

    # -- runs ---------------------------------------------------------------------------------------------------------

    async def queue(self, run_id: str, tenant: str) -> RunQueue:
        """The queue of a tenant's run. Raises ApiError 404, the same for another tenant's."""
        known = self._queues.get(run_id)
        if known is not None:
            if known.run.tenant != tenant:
                raise not_found("run", run_id)
            await known.resume()
            return known
        run = await self.rt.database.aread(lambda c: runs.get_run(c, run_id, tenant))
        backbone = self.backbones.find(run.base_model) if run else None
        if run is None or backbone is None:
            raise not_found("run", run_id)
        queue = self._queues.setdefault(run_id, RunQueue(self.rt, backbone, run))
        await queue.resume()  # before anything new is in its journal
        return queue

    def queues(self) -> list[RunQueue]:
        """All runs that this process has seen."""
        return list(self._queues.values())

    async def create(self, run: Run, backbone: Backbone, body: bytes) -> str:
        """A new run; the id of its future, which a second request for the same run gets too."""
        self._check_open()
        future = request_id(run.id, 0)
        entry = Entry(run.tenant, run.id, work.CREATE, body or b"-", 0, id=future)

        def write(c: Any) -> bool:
            _, new = journal.append(c, entry)
            return new and runs.add_run(c, run)

        if not self.rt.futures.known(future, run.tenant) and await self.rt.database.write(write):
            self.rt.futures.open(future, run.tenant)
            queue = self._queues[run.id] = RunQueue(self.rt, backbone, run)
            queue.submit(Item(future, 0, work.CREATE, entry.body))
        return future

    async def submit(self, tenant: str, run_id: str, seq: int | None, kind: str, body: bytes, tokens: int = 0) -> str:
        """A request of a run; the id of its future. What is wrong with it fails the future, so that the client's count
        and ours stay the same. Raises ApiError for a run that is not there, and while the server stops.
        """
        self._check_open()
        queue = await self.queue(run_id, tenant)
        if not seq:
            return self.refuse(tenant, run_id, "The request has no seq_id; requests of a run are numbered from 1.")
        future = request_id(run_id, seq)
        if self.rt.futures.known(future, tenant):
            return future
        if seq > queue.highest + AHEAD:
            return self.refuse(tenant, run_id, f"seq_id {seq} is more than {AHEAD:,} ahead of this run.")
        entry = Entry(tenant, run_id, kind, body or b"-", seq, tokens, future)

        def write(c: Any) -> bool:
            _, new = journal.append(c, entry)
            if new:
                runs.touch_run(c, run_id)
            return new

        try:
            new = await self.rt.database.write(write)
        except DataError as error:
            return self.refuse(tenant, run_id, error.message)
        if new:
            self.rt.futures.open(future, tenant)
            queue.submit(Item(future, seq, kind, entry.body, tokens))
        return future

    def refuse(self, tenant: str, scope: str, sentence: str, code: str = "data") -> str:
        """A future that has failed and takes no place in any order; only this process knows it."""
        future = f"{scope}:refused:{uuid.uuid4().hex}"
        self.rt.futures.resolve(future, tenant, Result.failed("user", code, sentence))
        return future

    async def retire(self, artifact: str) -> None:
        """Delete an artifact that no checkpoint names any more, unless a run would need it after a crash."""
        for run in await self.rt.database.aread(runs.living_runs):
            if run.snapshot_path is None and run.spec.get("parent") == artifact:
                log.info("kept for run %s until its first snapshot: %s", run.id, artifact)
                return
        if not any(queue.needs(artifact) for queue in self._queues.values()):
            await self.rt.places.delete(artifact)

    # -- samples ------------------------------------------------------------------------------------------------------

    async def sample(
        self, sampler: Sampler, backbone: Backbone, seq: int | None, body: SampleBody, *, tokens: int, count: int
    ) -> str:
        """A request for samples; the id of its future. Raises ApiError 429 for a tenant that draws too many."""
        self._check_open()
        future = request_id(sampler.id, seq) if seq is not None else f"{sampler.id}:once:{uuid.uuid4().hex}"
        if self.rt.futures.known(future, sampler.tenant):
            return future
        self.rt.limiter.begin_samples(sampler.tenant, count, tokens)
        content = body.model_dump_json(exclude_none=True).encode()
        entry = Entry(sampler.tenant, sampler.id, SAMPLE, content, seq, tokens, future)
        new = False
        try:
            _, new = await self.rt.database.write(lambda c: journal.append(c, entry))
        finally:
            if not new:
                self.rt.limiter.end_samples(sampler.tenant, count)
        if new:
            self.rt.futures.open(future, sampler.tenant)
            self.samples.submit(Draw(future, seq or 0, sampler, body, tokens, count), backbone)
        return future

    # -- futures ------------------------------------------------------------------------------------------------------

    async def result(self, future: str, tenant: str, seconds: float) -> Result | None:
        """A request's result; None where it is not there yet. Raises ApiError 404 for what the tenant never asked."""
        futures = self.rt.futures
        if futures.known(future, tenant):
            return await futures.wait(future, seconds)
        outcome = await self.rt.database.aread(lambda c: journal.result(c, future, tenant))
        if outcome is None:
            if futures.known(future, tenant):  # it arrived while we looked
                return await futures.wait(future, seconds)
            raise ApiError(404, "missing", f"There is no request {future!r}, or its result has expired.")
        if outcome.done:
            return Result.stored(outcome)
        if futures.known(future, tenant):
            return await futures.wait(future, seconds)
        await asyncio.sleep(min(seconds, 1.0))  # its model is not served at present
        return None

    def position(self, future: str) -> tuple[str, str]:
        """The SDK's queue state of an unfinished request, and why it waits."""
        scope, _, seq = future.rpartition(":req:")
        queue = self._queues.get(scope)
        if queue is not None:
            return queue.position(int(seq))
        return self.samples.position(future)

    def _check_open(self) -> None:
        if self.draining:
            raise ApiError(503, "stopping", "The server is stopping; send it again.", headers={"retry-after": "2"})


def _count(body: bytes) -> int:
    """How many samples a journalled request asks for."""
    try:
        return int(json.loads(body).get("num_samples", 1))
    except (ValueError, AttributeError):
        return 1
