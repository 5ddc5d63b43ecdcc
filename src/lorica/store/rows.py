"""Rows as typed records: a dataclass whose fields are the columns of its table.

In: a statement. Out: records. Refuses to know which.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Page(Generic[R]):
    """Some records of a list, newest first, and how many it has in all."""

    items: list[R]
    total: int


def one(connection: sa.Connection, table: sa.Table, where: sa.ColumnElement[bool], record: type[R]) -> R | None:
    """The record that satisfies `where`, or None."""
    row = connection.execute(sa.select(table).where(where)).first()
    return None if row is None else record(**row._mapping)


def many(connection: sa.Connection, table: sa.Table, where: sa.ColumnElement[bool], record: type[R]) -> list[R]:
    """All that satisfy `where`, oldest first."""
    select = sa.select(table).where(where).order_by(table.c.created, *table.primary_key)
    return [record(**row._mapping) for row in connection.execute(select)]


def page(
    connection: sa.Connection,
    table: sa.Table,
    where: sa.ColumnElement[bool],
    record: type[R],
    limit: int,
    offset: int,
) -> Page[R]:
    """`limit` records after the newest `offset`."""
    key = [column.desc() for column in (table.c.created, *table.primary_key)]
    select = sa.select(table).where(where).order_by(*key).limit(limit).offset(offset)
    total = connection.scalar(sa.select(sa.func.count()).select_from(table).where(where))
    return Page([record(**row._mapping) for row in connection.execute(select)], int(total or 0))


def insert(connection: sa.Connection, table: sa.Table, record: Any) -> None:
    """Add a record."""
    connection.execute(table.insert(), {field.name: getattr(record, field.name) for field in fields(record)})
