"""What every queue of the server works with.

In: settings, the store and the engines. Out: one record that is handed around. Refuses to know what its users do.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from lorica.server.futures import Futures, Result
from lorica.server.limits import Limiter
from lorica.server.observer import Observer
from lorica.server.places import Places
from lorica.server.settings import Settings
from lorica.server.work import Work
from lorica.store.database import Database

Finished = Callable[[str, Result, int, str], None]
"""Told of every request that is done: its kind, result, tokens and tenant."""

_ids = itertools.count(1)


def next_id() -> int:
    """A number that no other command of this process has."""
    return next(_ids)


async def _keep(artifact: str) -> None:
    """What becomes of an artifact that nobody names any more, until the dispatcher decides."""


@dataclass(slots=True)
class Runtime:
    """`listeners` hear of every request that is done; metrics and usage are counted there."""

    settings: Settings
    database: Database
    places: Places
    limiter: Limiter
    work: Work
    futures: Futures
    observer: Observer
    listeners: list[Finished] = field(default_factory=list)
    retire: Callable[[str], Awaitable[None]] = field(default=_keep)

    def next_id(self) -> int:
        return next_id()

    def finished(self, kind: str, result: Result, tokens: int, tenant: str) -> None:
        for listener in self.listeners:
            listener(kind, result, tokens, tenant)
