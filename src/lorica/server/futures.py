"""Futures: who waits for a request, and results that were not fetched yet.

In: requests that were acknowledged, results as they come. Out: a result, at once or when it comes, without polling.
Results are kept here in a bounded number of bytes; older ones are in the journal. Refuses to know what a result says.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from lorica.store.journal import Failure, Outcome

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
FAILED = "error"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a request: bytes of a media type, or a failure."""

    media: str
    data: bytes = b""
    failure: Failure | None = None

    @property
    def outcome(self) -> bytes | Failure:
        return self.data if self.failure is None else self.failure

    @classmethod
    def of(cls, value: dict[str, Any]) -> Result:
        return cls(JSON, dump(value))

    @classmethod
    def failed(cls, category: str, code: str, message: str) -> Result:
        return cls(FAILED, failure=Failure("user" if category == "user" else "server", code, message))

    @classmethod
    def stored(cls, outcome: Outcome) -> Result:
        return cls(outcome.result_type or JSON, outcome.result or b"", outcome.error)


def dump(value: Any) -> bytes:
    """JSON, with numbers that JSON lacks as the words that the SDK reads back as floats."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        return json.dumps(_words(value), allow_nan=False, separators=(",", ":")).encode()


def _words(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _words(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_words(inner) for inner in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value


def _size(result: Result) -> int:
    """Bytes that a kept result takes, about."""
    return len(result.data) + 1024


@dataclass(slots=True)
class _Entry:
    tenant: str
    future: asyncio.Future[Result]


class Futures:
    """All requests that this process knows to be unfinished, and the latest results."""

    def __init__(self, keep_bytes: int = 64 * 2**20) -> None:
        self._open: dict[str, _Entry] = {}
        self._done: OrderedDict[str, tuple[str, Result]] = OrderedDict()
        self._bytes = 0
        self._keep = keep_bytes
        self._stopping: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """How many are unfinished."""
        return len(self._open)

    def open(self, request_id: str, tenant: str) -> None:
        """Note a request that will have a result."""
        if request_id not in self._open and request_id not in self._done:
            self._open[request_id] = _Entry(tenant, asyncio.get_running_loop().create_future())

    def is_open(self, request_id: str) -> bool:
        return request_id in self._open

    def resolve(self, request_id: str, tenant: str, result: Result) -> None:
        """Wake whoever waits. The first result of a request stays."""
        entry = self._open.pop(request_id, None)
        if entry is not None and not entry.future.done():
            entry.future.set_result(result)
        if request_id in self._done:
            return
        self._done[request_id] = (tenant, result)
        self._bytes += _size(result)
        while self._bytes > self._keep and len(self._done) > 1:
            _, (_, old) = self._done.popitem(last=False)
            self._bytes -= _size(old)

    def drop(self, request_id: str) -> None:
        """Forget a result: its client has it."""
        kept = self._done.pop(request_id, None)
        if kept is not None:
            self._bytes -= _size(kept[1])

    def known(self, request_id: str, tenant: str) -> bool:
        """Whether the tenant has such a request here, finished or not."""
        entry = self._open.get(request_id)
        if entry is not None:
            return entry.tenant == tenant
        done = self._done.get(request_id)
        return done is not None and done[0] == tenant

    async def wait(self, request_id: str, seconds: float) -> Result | None:
        """The result of a known request; None where the time passed first."""
        done = self._done.get(request_id)
        if done is not None:
            return done[1]
        entry = self._open.get(request_id)
        if entry is None:
            return None
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_future()
        waited: list[asyncio.Future[Any]] = [entry.future, self._stopping]
        await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return entry.future.result() if entry.future.done() else None

    def release(self) -> None:
        """Let go of everybody who waits, with or without a result: the server stops."""
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_future()
        if not self._stopping.done():
            self._stopping.set_result(None)
