"""How a run comes to an engine: made anew, or rebuilt after a death from its snapshot and what came after it.

In: the run's record and its journal. Out: commands in order; results, stored and told. Refuses to know in which order
requests arrive, and when snapshots are taken.
"""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from lorica.core.errors import DataError, LoricaError
from lorica.engine.commands import Close, Command, Load, Open, Opened, RunSpec
from lorica.engine.link import EngineError, EngineGone
from lorica.server import work
from lorica.server.backbones import Backbone
from lorica.server.futures import Result
from lorica.server.items import DEATHS, Flight, Item, Record, Since, closing, engine_failure, finishing
from lorica.server.runtime import Runtime
from lorica.store import journal, replay, runs
from lorica.store.journal import Pending
from lorica.store.points import Did
from lorica.store.runs import Run

log = logging.getLogger("lorica.server.runs")


class RunLife(abc.ABC):
    """What a run's queue stands on."""

    def __init__(self, runtime: Runtime, backbone: Backbone, run: Run) -> None:
        self.run = run
        self.backbone = backbone
        self._rt = runtime
        self._early: dict[int, Item] = {}
        self._flight = Flight()
        self._done: set[int] = set()
        self._since = Since()
        self._next = 0
        self._loaded = False
        self._reading = asyncio.Lock()
        self._engine = -1  # the engine's life in which it knows the run
        self._pumping: asyncio.Task[None] | None = None
        self._recording: asyncio.Task[None] | None = None  # of the last request that writes more than its result
        self._snapshotting = False
        self._gap: asyncio.TimerHandle | None = None
        self._waits_for_tokens = False
        self._loaded_from: set[str] = set()
        self._read: list[Pending] | None = None
        self._damaged = False
        self._broken: str | None = None

    @property
    def created(self) -> bool:
        return "opened" in self.run.info

    @abc.abstractmethod
    def submit(self, item: Item) -> None:
        """A request that the journal holds."""

    @abc.abstractmethod
    def kick(self) -> None:
        """Go on, if there is something to do."""

    @abc.abstractmethod
    def _snapshot(self) -> asyncio.Task[None] | None:
        """Ask for the state after all that the engine has of this run."""

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._flight.tasks.add(task)
        task.add_done_callback(self._flight.tasks.discard)
        return task

    def _return(self, item: Item) -> None:
        """The engine died with it: it goes back to its place."""
        self._flight.items.pop(item.seq, None)
        if item.seq == min(self._flight.items, default=item.seq):
            item.deaths += 1
        self._early[item.seq] = item
        self._next = min(self._next, item.seq)
        self._engine = -1
        if item.deaths >= DEATHS:
            del self._early[item.seq]
            sentence = f"The engine died {item.deaths} times while this request was the first it had to do."
            self._task(self._finish(item, Result.failed("server", "engine", sentence)))
        self.kick()

    async def _finish(self, item: Item, result: Result, record: Record | None = None, did: Did | None = None) -> None:
        """Store a result and wake its waiters. What a crash would repeat is told before it is on the disk."""
        self._flight.items.pop(item.seq, None)
        self._done.add(item.seq)
        told_first = record is None and result.failure is None
        if told_first:
            self._rt.futures.resolve(item.id, self.run.tenant, result)
        try:
            point = await self._rt.database.write(finishing(self.run.id, item, result, record, did))
            if point is not None:
                self._rt.observer.stepped(point, self.run.tenant)
            if record is not None:
                await self._refresh()
        except LoricaError as error:
            log.error("result of %s: %s", item.id, error.message)
            result = work.failure(error)
            if isinstance(error, DataError):
                await self._rt.database.write(finishing(self.run.id, item, result, None))
        if not told_first:
            self._rt.futures.resolve(item.id, self.run.tenant, result)
        self._rt.finished(item.kind, result, item.tokens, self.run.tenant)

    async def _refresh(self) -> None:
        found = await self._rt.database.aread(lambda c: runs.get_run(c, self.run.id, self.run.tenant))
        if found is not None:
            self.run = found

    # -- beginning, and beginning again -------------------------------------------------------------------------------

    async def _begin(self, snapshot: str | None = None) -> list[Command]:
        """The commands that make the run: from a snapshot, from a checkpoint (perhaps its optimiser too), or new."""
        spec, artifact = self.run.spec, self.run.spec.get("parent")
        # a snapshot holds all that the parent gave
        parent = await self._rt.places.read(artifact) if artifact and snapshot is None else None
        came = str(self.run.info.get("loaded_from") or "")
        wanted = RunSpec(
            method=spec["method"],
            config=spec["config"],
            targets=spec["targets"],
            seed=spec["seed"],
            parent=parent,
            parent_name=came,
        )
        commands: list[Command] = [
            Open(id=self._rt.next_id(), run=self.run.id, spec=wanted, tenant=self.run.tenant, snapshot=snapshot)
        ]
        if parent is not None and self.run.info.get("load_optimizer"):
            commands.append(Load(id=self._rt.next_id(), run=self.run.id, path=parent, optimizer=True, name=came))
        return commands

    async def _create(self, item: Item) -> None:
        """The first request: the engine makes the run."""
        try:
            reply = await self._open_or_refuse()
        except EngineGone:
            self._return(item)
            return
        except (EngineError, LoricaError) as error:
            self.backbone.send_quietly(Close(id=self._rt.next_id(), run=self.run.id))
            result = engine_failure(error) if isinstance(error, EngineError) else work.failure(error)
            await self._finish(item, result, lambda c: closing(c, self.run.id))
            return
        info = {**self.run.info, "opened": work.opened(reply)}
        rank, run_id, came = reply.rank, self.run.id, self.run.info.get("loaded_from")
        told: dict[str, Any] = {"type": "create_model", "model_id": run_id}
        if came:
            told = {"type": "load_weights", "model_id": run_id, "path": came}
        await self._finish(item, Result.of(told), lambda c: runs.set_run(c, run_id, rank=rank, info=info))
        if came:  # what it came from may be deleted from now on
            self._since.requests += 1
            self._snapshot()

    async def _open_or_refuse(self) -> Opened:
        """The engine's answer about a new run."""
        self._engine = self.backbone.life
        for command in await self._begin():
            reply = await self.backbone.send(command)
        assert isinstance(reply, Opened)
        return reply

    async def _read_journal(self) -> None:
        """What the journal holds: open requests wait again, done ones are known to be done."""
        after = self.run.snapshot_seq if self.created else -1
        self._read = await self._entries(after)
        for entry in self._read:
            assert entry.seq is not None
            if entry.done:
                self._done.add(entry.seq)
                self._since.requests += 1
                self._since.bytes += len(entry.body)
            elif entry.seq not in self._early:
                self._early[entry.seq] = Item(entry.id, entry.seq, entry.kind, entry.body, entry.tokens)
                self._rt.futures.open(entry.id, self.run.tenant)
        self._next = after + 1
        self._loaded = True
        for late in [self._early.pop(seq) for seq in list(self._early) if seq <= after or seq in self._done]:
            self.submit(late)

    async def _entries(self, after: int) -> list[Pending]:
        """What must run again. What a damaged record took with it is over: its places are not waited for."""

        def read(c: Any) -> tuple[list[Pending], int]:
            return replay.pending(c, self.run.id, after), journal.highest_seq(c, self.run.id)

        entries, highest = await self._rt.database.write(read)
        await self._refresh()
        lost = set(range(after + 1, highest + 1)) - {entry.seq for entry in entries}
        if self.run.corrupted is not None and lost:
            log.error("run %s: %s", self.run.id, self.run.corrupted)
            self._done |= lost
            self._damaged = True
            for item in [self._early.pop(seq) for seq in sorted(lost & set(self._early))]:
                told = Result.failed("server", "corrupted", self.run.corrupted)  # as the journal says already
                self._rt.futures.resolve(item.id, self.run.tenant, told)
        return entries

    async def _reopen(self) -> None:
        """Make the run known to a new engine, as it was: the snapshot, then all that was done since, in order."""
        while self._flight.tasks:  # what the last engine left is put back first
            await asyncio.wait(self._flight.tasks)
        await self.backbone.ready.wait()
        life, after = self.backbone.life, self.run.snapshot_seq
        snapshot = self.run.snapshot_path
        path = None if snapshot is None else await self._rt.places.read(snapshot)
        # read again, but for the first time: what came since has no place among what must run again
        entries, self._read = self._read if self._read is not None else await self._entries(after), None
        begin = await self._begin(path)
        again = [entry for entry in entries if entry.done and not entry.failed]
        commands = [await self._rt.work.again(self.run, entry.kind, entry.body) for entry in again]
        if life != self.backbone.life:
            raise EngineGone("The engine died while a run was prepared for it.")
        sent = [self.backbone.send(command) for command in (*begin, *commands) if command is not None]
        self._engine = life
        for reply in sent:
            self._task(self._replayed(reply))

    async def _replayed(self, sent: Any) -> None:
        """What was done once must be done again; anything else is damage, and is said."""
        try:
            await sent
        except EngineGone:
            self._engine = -1
            self.kick()
        except EngineError as error:
            await self._break(f"The run could not be rebuilt: {error.message}")

    async def _break(self, sentence: str) -> None:
        """The run is not what it was: its requests fail from now on and say so, until the server starts again."""
        if self._broken is None:
            self._broken = sentence
            log.error("run %s: %s", self.run.id, sentence)
            await self._rt.database.write(lambda c: runs.mark_corrupted(c, self.run.id, sentence))
            await self._refresh()
