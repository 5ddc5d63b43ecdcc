"""Replay: what of the journal must run again after a crash, each record verified before it is believed.

In: a scope and what its snapshot contains. Out: entries in order. A damaged record is found by its checksum: it fails,
and in an ordered scope so does all that came after it; what came before is kept. Refuses to know what a request means.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from lorica.store import journal
from lorica.store.journal import Failure, Pending
from lorica.store.tables import requests, runs


def pending(connection: sa.Connection, scope: str, after_seq: int, *, ordered: bool = True) -> list[Pending]:
    """What the scope holds after `after_seq`, in order of seq. Must be run as a write: damage is settled at once.

    An ordered scope (a run) gives done entries too, whose state must be rebuilt; its first damaged record marks the run
    as corrupted, fails, and takes all later ones with it: those that are done keep their result and never run again.
    In another scope every entry stands alone: only those not done come back, and a damaged one fails alone.
    """
    good: list[Pending] = []
    damaged: Pending | None = None
    for entry, intact in _rows(connection, scope, after_seq, ordered):
        if damaged is not None and ordered:
            _fail(connection, entry, f"Request {_name(entry)} came after a damaged record of the journal.")
        elif intact:
            good.append(entry)
        else:
            damaged = entry
            _fail(connection, entry, f"Request {_name(entry)} was damaged in the journal (its checksum is wrong).")
    if damaged is not None and ordered:
        _mark(connection, scope, damaged, good[-1].seq if good else after_seq)
    return good


def _rows(connection: sa.Connection, scope: str, after_seq: int, ordered: bool) -> list[tuple[Pending, bool]]:
    status = [requests.c.done_at.is_not(None).label("done"), requests.c.error.is_not(None).label("failed")]
    wanted = (requests.c.scope == scope) & (sa.func.coalesce(requests.c.seq, after_seq + 1) > after_seq)
    wanted &= requests.c.done_at.is_(None) | (requests.c.body.is_not(None) if ordered else sa.false())
    select = sa.select(*_RECORD, *status).where(wanted).order_by(requests.c.seq, requests.c.created)
    return [_entry(row) for row in connection.execute(select)]


_RECORD = [requests.c[name] for name in ("id", "tenant", "scope", "seq", "kind", "tokens", "body", "crc")]


def _entry(row: sa.Row[Any]) -> tuple[Pending, bool]:
    """A record, and whether it is as it was written."""
    values = dict(row._mapping)
    crc, body = values.pop("crc"), values.pop("body")
    entry = Pending(**values, body=body or b"")
    return entry, body is not None and journal.checksum(entry) == crc


def damaged_records(connection: sa.Connection) -> list[Pending]:
    """All records whose body is not what was written; changes nothing."""
    select = sa.select(*_RECORD).where(requests.c.body.is_not(None)).execution_options(yield_per=100)
    return [entry for entry, intact in map(_entry, connection.execute(select)) if not intact]


def _fail(connection: sa.Connection, entry: Pending, message: str) -> None:
    if not journal.finish(connection, entry.id, "error", Failure("server", "corrupted", message), drop_body=True):
        journal.drop_body(connection, entry.id)


def _mark(connection: sa.Connection, run_id: str, damaged: Pending, last_good: int | None) -> None:
    sentence = (
        f"Request {damaged.seq} was damaged in the journal; the run was recovered to the last good record, "
        f"request {last_good}."
    )
    unmarked = (runs.c.id == run_id) & runs.c.corrupted.is_(None)
    connection.execute(runs.update().where(unmarked).values(corrupted=sentence))


def _name(entry: Pending) -> str:
    return entry.id if entry.seq is None else str(entry.seq)
