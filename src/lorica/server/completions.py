"""Which requests of a sampling client are done: a log that the client reads on from where it was.

In: requests as they are done. Out: those after a cursor, at once or when there is one. The log is this process's alone:
a client that polls across a restart asks for each open request by itself. Refuses to know results.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lorica.server.futures import Result
from lorica.server.naming import CLONE

KEPT = 10_000
"""Completions of one client that are kept."""


@dataclass(slots=True)
class _Log:
    entries: deque[tuple[int, dict[str, Any]]] = field(default_factory=lambda: deque(maxlen=KEPT))
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Completions:
    """One log for each sampling session and clone of its client."""

    def __init__(self) -> None:
        self._logs: dict[tuple[str, int], _Log] = {}
        self._cursor = time.time_ns() // 1000  # later than any of an earlier process

    def add(self, sampler: str, seq: int, request_id: str, result: Result) -> None:
        log = self._logs.setdefault((sampler, seq // CLONE), _Log())
        self._cursor += 1
        told: dict[str, Any] = {"state": "failed", "request_id": request_id}
        if result.failure is None:
            size = len(result.data)
            told = {"state": "finished", "request_id": request_id, "response_payload_uncompressed_size": size}
        log.entries.append((self._cursor, told))
        log.changed.set()

    async def after(self, sampler: str, clone: int, cursor: int, seconds: float) -> tuple[list[dict[str, Any]], int]:
        """Completions after a cursor, and the next cursor; waits for one. What the client has seen is forgotten."""
        log = self._logs.setdefault((sampler, clone), _Log())
        while log.entries and log.entries[0][0] <= cursor:
            log.entries.popleft()
        if not log.entries and seconds > 0:
            log.changed.clear()
            try:
                await asyncio.wait_for(log.changed.wait(), seconds)
            except TimeoutError:
                return [], cursor
        found = [told for _, told in log.entries]
        return found, log.entries[-1][0] if log.entries else cursor
