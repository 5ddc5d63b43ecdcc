"""Requests of a run that are not done, and what becomes of them.

In: nothing. Out: plain records, and results as they are written down. Refuses to know queues.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorica.engine.link import EngineError
from lorica.server.futures import Result
from lorica.store import journal, points, runs
from lorica.store.points import Did, Point

Record = Callable[[Any], None]
"""Writes on a connection of the database, in the transaction of a result."""

DEATHS = 8
"""How often a request may be the oldest one that an engine died with before it is given up."""
AHEAD = 100_000
"""How far ahead of its run a request's place may be."""
GAP = 10_000
"""How many places that never came are written down one by one."""


@dataclass(slots=True)
class Item:
    """A request that is not done."""

    id: str
    seq: int
    kind: str
    body: bytes
    tokens: int = 0
    deaths: int = 0
    at: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Since:
    """What the journal has grown by since the last snapshot."""

    requests: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Flight:
    """Requests that the engine has, by seq, and the tasks that wait for it."""

    items: dict[int, Item] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


def engine_failure(error: EngineError) -> Result:
    """What the engine refused, as a failed future."""
    return Result.failed(error.category, error.code, error.message)


def finishing(
    run_id: str, item: Item, result: Result, record: Record | None, did: Did | None = None
) -> Callable[[Any], Point | None]:
    """Writes a result and, the first time, what the request did to its run's curve: the new point, if it made one."""

    def write(c: Any) -> Point | None:
        if record is not None:
            record(c)
        first = journal.finish(c, item.id, result.media, result.outcome)
        return points.add(c, run_id, item.seq, did) if first and did is not None else None

    return write


def closing(c: Any, run_id: str) -> None:
    runs.close_run(c, run_id)
