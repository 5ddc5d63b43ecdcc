"""What the server does, as it does it: counted for Prometheus, written as curves and usage, told to whoever looks on.

In: engine traffic, finished requests, engines' reports. Out: metrics, changes, points of curves, tokens by tenant and
day. Nothing waits for it, and what it fails to write it says in the log. Refuses to know HTTP and SQL.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeVar

from lorica.core.errors import LoricaError
from lorica.engine.commands import (
    Close,
    Command,
    Open,
    Progress,
    Reply,
    Sample,
    Sampled,
    Saved,
    Snapshot,
    Train,
    Trained,
)
from lorica.engine.settings import EngineSettings
from lorica.server import curves, work
from lorica.server.events import Changes
from lorica.server.futures import Result
from lorica.server.metrics import Metrics
from lorica.store import usage
from lorica.store.database import Database
from lorica.store.points import Point

log = logging.getLogger("lorica.server")

HISTORY = 600
"""Reports of an engine that are kept: ten minutes of work."""
FLUSH_SECONDS = 5.0
"""How often counted tokens are written; what a kill may lose of the count."""
SAVES = (work.SAVE, work.SAVE_SAMPLER, work.SAVE_EXTERNAL)
T = TypeVar("T")


class Observer:
    """One for the server. `budget` is the most tokens of an engine's micro-batch."""

    def __init__(self, database: Database, budget: int | None = None) -> None:
        self.metrics = Metrics()
        self.changes = Changes()
        self.history: dict[str, deque[dict[str, float]]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self._database = database
        self._budget = budget or int(EngineSettings.model_fields["token_budget"].default)
        self._tenants: dict[str, str] = {}
        self._usage: dict[tuple[str, str], int] = defaultdict(int)
        self._flush: asyncio.TimerHandle | None = None
        self._writes: set[asyncio.Future[Any]] = set()

    # -- engines ------------------------------------------------------------------------------------------------------

    def replied(self, model: str, command: Command, reply: Reply, seconds: float) -> None:
        """A command was answered well; replays after a restart count too, for they are computed too."""
        self.metrics.engine_seconds.labels(model, type(command).__name__.lower()).observe(seconds)
        if isinstance(command, Open):
            self._tenants[command.run] = command.tenant
        elif isinstance(command, Close):
            self._tenants.pop(command.run, None)
        elif isinstance(command, Train) and isinstance(reply, Trained):
            kind = "train" if command.backward else "forward"
            self._tokens(kind, self._tenants.get(command.run, ""), sum(map(curves.token_count, command.datums)))
        elif isinstance(command, Sample) and isinstance(reply, Sampled):
            self._tokens("prefill", command.tenant, command.prompt.shape[0] - reply.cached)
            if not command.stream:  # else they were counted as they came
                self._tokens("sample", command.tenant, sum(one.tokens.shape[0] for one in reply.sequences))
        elif isinstance(command, Snapshot) and isinstance(reply, Saved):
            self.metrics.snapshots.labels(model).inc()
            self.metrics.snapshot_bytes.labels(model).inc(reply.size)

    def progressed(self, command: Command, reply: Reply) -> None:
        """A streamed sample grew."""
        if isinstance(command, Sample) and isinstance(reply, Progress):
            self._tokens("sample", command.tenant, len(reply.tokens))

    def reported(self, model: str, values: dict[str, float]) -> None:
        """An engine's numbers."""
        occupancy = self.metrics.report(model, values, self._budget)
        shown = {**values, "at": time.time(), "batch_occupancy": occupancy or 0.0}
        self.history[model].append(shown)
        self.changes.publish("stats", {"model": model, "values": shown})

    def turned(self, model: str, *, ready: bool) -> None:
        """An engine began to work, or died."""
        if not ready:
            self.metrics.gone(model)
        self.changes.publish("engine", {"model": model, "ready": ready})

    # -- requests -----------------------------------------------------------------------------------------------------

    def sent(self, kind: str, waited: float) -> None:
        """The engine has a request that was acknowledged so many seconds ago."""
        self.metrics.wait.labels(kind).observe(waited)

    def finished(self, kind: str, result: Result, tokens: int, tenant: str) -> None:
        """A request has its result."""
        failure = result.failure
        self.metrics.requests.labels(kind, "done" if failure is None else "failed").inc()
        if failure is not None:
            self.metrics.errors.labels(failure.category, failure.code).inc()
        if kind in (work.CREATE, work.LOAD) or failure is not None:
            self.changes.publish("runs", {}, tenant)
        if kind in SAVES:
            self.changes.publish("checkpoints", {}, tenant)

    def stepped(self, point: Point, tenant: str) -> None:
        """A curve has a new point, which is on the disk."""
        self.changes.publish("point", point_json(point), tenant)

    # -- usage --------------------------------------------------------------------------------------------------------

    def _tokens(self, kind: str, tenant: str, count: int) -> None:
        if count <= 0:
            return
        self.metrics.count_tokens(kind, tenant, count)
        self._usage[tenant, kind] += count
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._write_usage)

    def _write_usage(self) -> None:
        self._flush = None
        counted, self._usage = self._usage, defaultdict(int)
        if not counted:
            return

        def write(c: Any) -> None:
            for (tenant, kind), tokens in counted.items():
                usage.add_usage(c, tenant, kind, tokens)

        task = asyncio.ensure_future(self._written(write))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _written(self, fn: Callable[[Any], T]) -> None:
        try:
            await self._database.write(fn)
        except LoricaError as error:
            log.error("usage: %s", error.message)

    async def close(self) -> None:
        """Let followers go, and write what was counted."""
        self.changes.close()
        if self._flush is not None:
            self._flush.cancel()
        self._write_usage()
        if self._writes:
            await asyncio.wait(self._writes)


def point_json(point: Point) -> dict[str, Any]:
    """A step of a curve; `loss` is that of one token."""
    return {
        "run": point.run_id,
        "step": point.step,
        "loss": None if point.mean is None or not math.isfinite(point.mean) else point.mean,
        "tokens": point.tokens,
        "grad_norm": point.grad_norm,
        "lr": point.lr,
        "at": point.at.timestamp(),
    }
