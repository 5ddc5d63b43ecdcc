"""One run's requests: in strict order to the engine, results to the journal, and the same again after a death.

In: entries of the journal as they arrive, early ones too. Out: commands in order; results, which wake whoever waits.
After an engine's death: the snapshot, what came after it, then what is open. Refuses to know HTTP and other runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from lorica.core.errors import DataError, LoricaError
from lorica.engine.commands import Saved, Snapshot
from lorica.engine.link import EngineError, EngineGone
from lorica.server import curves, work
from lorica.server.futures import Result
from lorica.server.items import GAP, Item, Since, engine_failure
from lorica.server.naming import request_id
from lorica.server.runlife import RunLife
from lorica.store import journal, runs
from lorica.store.journal import Entry

log = logging.getLogger("lorica.server.runs")


class RunQueue(RunLife):
    """Made for a run that is known to the database; `submit` what was committed to the journal."""

    # -- what others ask ----------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Requests that are not done."""
        return len(self._early) + len(self._flight.items)

    @property
    def idle(self) -> bool:
        return not self.pending and self._pumping is None and not self._flight.tasks

    @property
    def dirty(self) -> bool:
        """Whether a snapshot would shorten the journal."""
        return self.created and self._since.requests > 0 and self.run.closed is None and self._broken is None

    def position(self, seq: int) -> tuple[str, str]:
        """The SDK's queue state of a request that is not done, and why it waits."""
        if self._waits_for_tokens:
            return "paused_rate_limit", "this key's tokens per minute are used up; the request waits its turn"
        if not self.backbone.ready.is_set():
            return "paused_capacity", "the engine is starting"
        if seq in self._flight.items:
            before = sum(1 for other in self._flight.items if other < seq)
            return "active", f"with the engine, behind {before} of this run's requests"
        if seq > self._next and self._next not in self._early:
            return "paused_capacity", f"waits for request {self._next} of this run, which has not arrived"
        return "active", f"behind {sum(1 for other in self._early if other < seq)} of this run's requests"

    @property
    def highest(self) -> int:
        """The highest place that was taken."""
        return max(self._next - 1, *self._early, *self._flight.items, self.run.snapshot_seq)

    def needs(self, artifact: str) -> bool:
        """Whether the run was loaded from it and has no snapshot since."""
        return artifact in self._loaded_from

    async def resume(self) -> None:
        """Take up what the journal holds open."""
        async with self._reading:
            if not self._loaded:
                await self._read_journal()
        self.kick()

    # -- arrival ------------------------------------------------------------------------------------------------------

    def submit(self, item: Item) -> None:
        """A request that the journal holds."""
        if self._loaded and (item.seq < self._next or item.seq in self._done):
            if item.seq in self._flight.items or item.seq in self._done:
                return
            late = DataError(f"Request {item.seq} arrived after later ones had been given up for want of it.")
            self._task(self._finish(item, work.failure(late)))
            return
        self._early[item.seq] = item
        self.kick()

    def kick(self) -> None:
        """Go on, if there is something to do."""
        if self._pumping is None and self._early:
            self._pumping = asyncio.create_task(self._pump(), name=f"run {self.run.id}")

    # -- the order ----------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        try:
            while True:
                if not await self._prepared():
                    continue
                item = self._take()
                if item is None:
                    return
                await self._dispatch(item)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("run %s", self.run.id)
            await asyncio.sleep(1)  # a bug must not spin
        finally:
            self._pumping = None
            if self._next in self._early:
                self.kick()

    async def _prepared(self) -> bool:
        """Whether engine and run are ready; False to look again."""
        await self.backbone.ready.wait()
        if not self._loaded:
            await self.resume()
        if self.created and self._engine != self.backbone.life:
            try:
                await self._reopen()
            except EngineGone:
                return False
            except LoricaError as error:  # a snapshot or a checkpoint is gone
                await self._break(f"The run could not be rebuilt: {error.message}")
                self._engine = self.backbone.life
            if self._damaged:  # what is left must not come after the damage in the journal
                self._skip()
                self._snapshot()
        return True

    def _skip(self) -> None:
        """On to the first place that is not done."""
        while self._next in self._done:
            self._next += 1

    def _take(self) -> Item | None:
        self._skip()
        item = self._early.pop(self._next, None)
        if item is None and self._early and self._gap is None:
            loop = asyncio.get_running_loop()
            self._gap = loop.call_later(self._rt.settings.missing_seq_seconds, self._give_up, self._next)
        return item

    async def _dispatch(self, item: Item) -> None:
        life = self.backbone.life
        self._read = None
        self._flight.items[item.seq] = item
        self._next = item.seq + 1
        if item.kind == work.CREATE:
            await self._create(item)
            return
        if self._broken is not None or not self.created or self.run.closed is not None:
            await self._finish(item, self._refused())
            return
        await self._afford(item)
        try:
            prepared = await self._rt.work.prepare(self.run, item.kind, item.body)
        except Exception as error:
            await self._finish(item, _failed(item, error))
            return
        if life != self.backbone.life or self._engine != life:  # it died while we prepared
            self._return(item)
            return
        settled = self._task(self._settle(item, prepared, self.backbone.send(prepared.command), self._recording))
        if prepared.record is not None:
            self._recording = settled
        self._rt.observer.sent(item.kind, time.monotonic() - item.at)
        self._count(item)
        self._loaded_from.update(prepared.reads)
        if prepared.snapshot or self._due():
            self._snapshot()

    def _refused(self) -> Result:
        if self._broken is not None:
            hint = "A new run can begin with its last checkpoint."
            return Result.failed("server", "corrupted", f"{self._broken} {hint}")
        reason = "is closed" if self.created else "could not be created"
        return Result.failed("user", "run", f"Run {self.run.id} {reason}.")

    async def _afford(self, item: Item) -> None:
        """Wait until the tenant may spend the request's tokens."""
        while (seconds := self._rt.limiter.wait(self.run.tenant, item.tokens)) > 0:
            self._waits_for_tokens = True
            await asyncio.sleep(seconds)
        self._waits_for_tokens = False

    async def _settle(self, item: Item, prepared: work.Prepared, sent: Any, earlier: asyncio.Task[None] | None) -> None:
        """Finish a request. What is recorded is recorded in the run's order: of two saves of one name the first has it,
        or, where they overwrite, the last.
        """
        try:
            reply = await sent
            if prepared.before is not None:
                await prepared.before(reply)
            if prepared.record is not None and earlier is not None:
                await asyncio.wait({earlier})
            result = prepared.tell(reply)
            record = prepared.record(reply) if prepared.record else None
            did = curves.did(prepared.command, reply)
        except EngineGone:
            self._return(item)
            return
        except Exception as error:
            await self._finish(item, _failed(item, error))
            return
        await self._finish(item, result, record, did)
        for artifact in prepared.after:
            await self._rt.retire(artifact)

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def _count(self, item: Item) -> None:
        self._since.requests += 1
        self._since.bytes += len(item.body)

    def _due(self) -> bool:
        policy = self._rt.settings.snapshots
        return self._since.requests >= policy.every_requests or self._since.bytes >= policy.every_bytes

    def _snapshot(self) -> asyncio.Task[None] | None:
        """Ask for the state after all that the engine has of this run."""
        if self._snapshotting or self._engine != self.backbone.life or self._broken is not None:
            return None
        self._snapshotting = True
        upto, before = self._next - 1, set(self._flight.tasks)
        since, self._since = self._since, Since()
        artifact = self._rt.places.new(self.run.id, f"snapshot-{upto}")
        command = Snapshot(id=self._rt.next_id(), run=self.run.id, path=str(self._rt.places.target(artifact)))
        return self._task(self._snapshot_taken(self.backbone.send(command), upto, before, artifact, since))

    async def _snapshot_taken(
        self, sent: Any, upto: int, before: set[asyncio.Task[None]], artifact: str, since: Since
    ) -> None:
        try:
            reply = await sent
            assert isinstance(reply, Saved)
            await self._rt.places.publish(artifact)
            before.discard(asyncio.current_task())
            if before:
                await asyncio.wait(before)
            if any(seq <= upto for seq in (*self._flight.items, *self._early)):
                raise EngineGone("A request before the snapshot is not done.")
            earlier = await self._rt.database.write(lambda c: runs.set_snapshot(c, self.run.id, artifact, upto))
            await self._refresh()
            self._done = {seq for seq in self._done if seq > upto}
            self._loaded_from.clear()
            self._damaged = False
            if earlier is not None:
                await self._rt.places.delete(earlier)
        except (EngineGone, EngineError, LoricaError) as error:
            self._since.requests += since.requests
            self._since.bytes += since.bytes
            if not isinstance(error, EngineGone):
                log.warning("snapshot of %s: %s", self.run.id, error)
        finally:
            self._snapshotting = False

    async def drain(self) -> None:
        """Finish what the engine has, then write a snapshot."""
        while self._flight.items or self._flight.tasks:
            await asyncio.wait(self._flight.tasks or {asyncio.ensure_future(asyncio.sleep(0.01))})
        if self.dirty and self._engine == self.backbone.life and (task := self._snapshot()) is not None:
            await asyncio.wait({task})

    # -- what never comes ---------------------------------------------------------------------------------------------

    def _give_up(self, seq: int) -> None:
        """The request at `seq` did not arrive in time: those that wait for it fail, and its place is over."""
        self._gap = None
        if self._next != seq or seq in self._early or not self._early:
            self.kick()
            return
        waiting = sorted(self._early)
        sentence = (
            f"Request {seq} of this run did not arrive within {self._rt.settings.missing_seq_seconds:.0f} s, and "
            "requests run in their order."
        )
        absent = [n for n in range(seq, waiting[-1]) if n not in self._early][:GAP]
        for n in waiting:
            self._task(self._finish(self._early.pop(n), Result.failed("user", "order", sentence)))
        self._next = waiting[-1] + 1
        self._task(self._consume(absent))

    async def _consume(self, seqs: list[int]) -> None:
        def write(c: Any) -> None:
            for seq in seqs:
                name = request_id(self.run.id, seq)
                entry = Entry(self.run.tenant, self.run.id, work.MISSING, b"-", seq, id=name)
                found, new = journal.append(c, entry)
                if new:
                    failure = Result.failed("user", "order", "This request never arrived.").outcome
                    journal.finish(c, found, "error", failure)

        await self._rt.database.write(write)


def _failed(item: Item, error: Exception) -> Result:
    """The result of a request that an error ended: what was wrong with it, or that the server was."""
    if isinstance(error, EngineError):
        return engine_failure(error)
    if isinstance(error, LoricaError):
        return work.failure(error)
    log.error("request %s", item.id, exc_info=error)
    return Result.failed("server", "server", "The server met an error of its own.")
