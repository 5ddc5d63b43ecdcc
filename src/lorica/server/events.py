"""Changes as they happen, for whoever looks on: each follower hears what its tenant may.

In: changes. Out: streams of them. A follower that is too slow loses its backlog and is told to look anew, so nothing is
missed in silence and nothing grows without bound. Refuses to know what a change means and who draws it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

BACKLOG = 1000
"""Changes that may wait for one follower."""
RELOAD = "reload"
"""The change that says: look at everything anew."""


@dataclass(frozen=True, slots=True)
class Change:
    """`tenant` is who may hear of it; None is everybody."""

    kind: str
    data: dict[str, Any]
    tenant: str | None = None


@dataclass(slots=True, eq=False)
class _Follower:
    tenant: str
    everything: bool
    waiting: asyncio.Queue[Change | None] = field(default_factory=lambda: asyncio.Queue(BACKLOG))


class Changes:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._followers: set[_Follower] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._followers)

    def publish(self, kind: str, data: dict[str, Any], tenant: str | None = None) -> None:
        """Tell every follower that may hear of it."""
        change = Change(kind, data, tenant)
        for follower in self._followers:
            if tenant is None or follower.everything or follower.tenant == tenant:
                self._put(follower, change)

    def _put(self, follower: _Follower, change: Change | None) -> None:
        if follower.waiting.full():
            while not follower.waiting.empty():
                follower.waiting.get_nowait()
            follower.waiting.put_nowait(Change(RELOAD, {}))
        follower.waiting.put_nowait(change)

    async def follow(self, tenant: str, *, everything: bool) -> AsyncIterator[Change]:
        """Changes from now on, until the server stops. The first is `reload`: whoever begins knows nothing yet."""
        follower = _Follower(tenant, everything)
        follower.waiting.put_nowait(Change(RELOAD, {}))
        self._followers.add(follower)
        try:
            while not self._closed and (change := await follower.waiting.get()) is not None:
                yield change
        finally:
            self._followers.discard(follower)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        for follower in self._followers:
            self._put(follower, None)
