"""The journal: every request is here before it is acknowledged, and its result stays here until it expires.

In: entries and outcomes, on a connection of the database. Out: ids, results, and after a crash what must run again, in
order and verified. Bodies leave when a snapshot makes them needless. Refuses to know what a request means.
"""

from __future__ import annotations

import datetime as dt
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from lorica.core.errors import DataError
from lorica.store.tables import new_id, now, requests, runs


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no result, as the wire tells it."""

    category: Literal["user", "server"]
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A request as it came. `scope` orders and deduplicates: a run's id, or whatever else counts `seq`. Without `seq`
    it is neither ordered nor deduplicated.
    """

    tenant: str
    scope: str
    kind: str
    body: bytes
    seq: int | None = None
    tokens: int = 0
    id: str = field(default_factory=new_id)


@dataclass(frozen=True, slots=True)
class Pending(Entry):
    """An entry after a crash. `done`: its result is stored, and it runs only to rebuild the state; `failed`: it changed
    no state and need not run.
    """

    done: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a request: not done, done with `result_type` and `result`, or done with `error`."""

    id: str
    tenant: str
    scope: str
    seq: int | None
    kind: str
    created: dt.datetime
    done_at: dt.datetime | None
    result_type: str | None
    result: bytes | None
    error: Failure | None

    @property
    def done(self) -> bool:
        return self.done_at is not None


def append(connection: sa.Connection, entry: Entry) -> tuple[str, bool]:
    """Put an entry in; its id, and whether it is new. A second one with the same scope and seq is not kept: the first
    one's id comes back, done or not.

    Raises DataError where that first one was done so long ago that it has left the journal.
    """
    if entry.seq is not None:
        first, behind = connection.execute(_SEEN, {"of_scope": entry.scope, "of_seq": entry.seq}).one()
        if first is not None:
            return str(first), False
        if behind is not None and entry.seq <= behind:
            raise DataError(
                f"Request {entry.seq} of {entry.scope} was done before (the run is at {behind}) and its result is no "
                "longer kept."
            )
    row = {
        **{name: getattr(entry, name) for name in ("id", "tenant", "scope", "seq", "kind", "body", "tokens")},
        "body_size": len(entry.body),
        "crc": checksum(entry),
        "created": now(),
    }
    connection.execute(_INSERT, row)
    return entry.id, True


def checksum(entry: Entry) -> int:
    """CRC-32 of all that makes a request: id, scope, seq, kind and body."""
    head = "\0".join((entry.id, entry.scope, str(entry.seq), entry.kind, ""))
    return zlib.crc32(entry.body, zlib.crc32(head.encode()))


def finish(
    connection: sa.Connection,
    request_id: str,
    result_type: str,
    outcome: bytes | Failure,
    *,
    drop_body: bool = False,
) -> bool:
    """Store what came of a request; False, and nothing changes, where something is stored already or the request is
    gone. With `drop_body` the body leaves at once: for requests that no later one builds on (samples).
    """
    failed = isinstance(outcome, Failure)
    values: dict[str, Any] = {
        "of_id": request_id,
        "new_done_at": now(),
        "new_result_type": result_type,
        "new_error": asdict(outcome) if isinstance(outcome, Failure) else None,
        "new_result": None if failed else outcome,
    }
    return connection.execute(_FINISH_AND_DROP if drop_body else _FINISH, values).rowcount == 1


def drop_body(connection: sa.Connection, request_id: str) -> None:
    """A request that will never run again keeps its place and result alone."""
    connection.execute(requests.update().where(requests.c.id == request_id).values(_WITHOUT_BODY))


_WITHOUT_BODY: dict[str, Any] = {"body": None, "body_size": 0}
_OF_ID = requests.c.id == sa.bindparam("of_id")
# statements of every request are made once: to make one is no small part of what it costs
_INSERT = requests.insert()
_SEEN = sa.select(
    sa.select(requests.c.id)
    .where(requests.c.scope == sa.bindparam("of_scope"), requests.c.seq == sa.bindparam("of_seq"))
    .scalar_subquery(),
    sa.select(runs.c.snapshot_seq).where(runs.c.id == sa.bindparam("of_scope")).scalar_subquery(),
)
_FINISH = (
    requests.update()
    .where(_OF_ID, requests.c.done_at.is_(None))
    .values({name: sa.bindparam(f"new_{name}") for name in ("done_at", "result_type", "error", "result")})
)
_FINISH_AND_DROP = _FINISH.values(_WITHOUT_BODY)
_OUTCOME = [requests.c[name] for name in Outcome.__dataclass_fields__]


def result(connection: sa.Connection, request_id: str, tenant: str) -> Outcome | None:
    """A tenant's request, or None."""
    mine = (requests.c.id == request_id) & (requests.c.tenant == tenant)
    row = connection.execute(sa.select(*_OUTCOME).where(mine)).first()
    return None if row is None else _outcome(row)


def outcomes(connection: sa.Connection, request_ids: Sequence[str], tenant: str) -> list[Outcome]:
    """Those of the requests that the tenant has, in no order."""
    mine = requests.c.id.in_(request_ids) & (requests.c.tenant == tenant)
    return [_outcome(row) for row in connection.execute(sa.select(*_OUTCOME).where(mine))]


def _outcome(row: sa.Row[Any]) -> Outcome:
    values = dict(row._mapping)
    error = values.pop("error")
    return Outcome(**values, error=None if error is None else Failure(**error))


def open_scopes(connection: sa.Connection) -> list[str]:
    """Scopes with requests that are not done: where a start after a crash has work."""
    select = sa.select(requests.c.scope).where(requests.c.done_at.is_(None)).distinct().order_by(requests.c.scope)
    return list(connection.scalars(select))


def highest_seq(connection: sa.Connection, scope: str) -> int:
    """The highest seq that the scope has seen, in its journal or its snapshot; −1 for none."""
    journal = connection.scalar(sa.select(sa.func.max(requests.c.seq)).where(requests.c.scope == scope))
    snapshot = connection.scalar(sa.select(runs.c.snapshot_seq).where(runs.c.id == scope))
    return max(-1 if journal is None else int(journal), -1 if snapshot is None else int(snapshot))


def bytes_pending(connection: sa.Connection) -> int:
    """Bytes of the bodies that the journal holds."""
    held = sa.select(sa.func.coalesce(sa.func.sum(requests.c.body_size), 0)).where(requests.c.body_size > 0)
    return int(connection.scalar(held) or 0)


def trim(connection: sa.Connection, scope: str, upto_seq: int) -> int:
    """Let the bodies of done requests up to `upto_seq` go; results stay. How many went."""
    gone = (
        (requests.c.scope == scope)
        & (requests.c.seq <= upto_seq)
        & requests.c.done_at.is_not(None)
        & requests.c.body.is_not(None)
    )
    return connection.execute(requests.update().where(gone).values(_WITHOUT_BODY)).rowcount


def expire(connection: sa.Connection, before: dt.datetime) -> int:
    """Forget requests that were done before a time and that no replay needs. How many went."""
    old = (requests.c.done_at < before) & requests.c.body.is_(None)
    return connection.execute(requests.delete().where(old)).rowcount
