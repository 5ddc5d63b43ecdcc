"""Loss curves: one point for each optimiser step of a run, kept for as long as the run.

In: what a request of a run did, in the transaction that stores its result. Out: a run's curve, thinned where it is
long, and where each of many runs stands. Refuses to know what a loss means and how it is drawn.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from lorica.store.tables import now, points


@dataclass(frozen=True, slots=True)
class Passed:
    """A forward and backward pass: its summed loss, the weight of the tokens that it sums over, and all its tokens."""

    loss: float
    weight: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """An optimiser step on all that passed since the last one."""

    grad_norm: float | None = None
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """The accumulated gradient was thrown away: other weights were loaded."""


Did = Passed | Stepped | Dropped


@dataclass(frozen=True, slots=True)
class Point:
    """One step. `loss` is the sum over the step's passes, None where it was not finite; `weight` belongs to it;
    `tokens` are all that the run has trained on so far.
    """

    run_id: str
    seq: int
    step: int | None
    loss: float | None
    weight: float
    tokens: int
    grad_norm: float | None = None
    lr: float | None = None
    at: dt.datetime = field(default_factory=now)

    @property
    def mean(self) -> float | None:
        """The loss of one token."""
        return None if self.loss is None or self.weight <= 0 else self.loss / self.weight


def add(connection: sa.Connection, run_id: str, seq: int, did: Did) -> Point | None:
    """Note what request `seq` of a run did; the new point where it was a step."""
    if isinstance(did, Dropped):
        connection.execute(points.delete().where(_waiting(run_id)))
        return None
    if isinstance(did, Passed):
        _insert(connection, Point(run_id, seq, None, _finite(did.loss), did.weight, did.tokens))
        return None
    passes = [_point(row) for row in connection.execute(sa.select(points).where(_waiting(run_id)))]
    connection.execute(points.delete().where(_waiting(run_id)))
    before = _last(connection, [run_id]).get(run_id)
    losses = [one.loss for one in passes]
    point = Point(
        run_id,
        seq,
        1 if before is None or before.step is None else before.step + 1,
        None if None in losses or not losses else math.fsum(loss for loss in losses if loss is not None),
        math.fsum(one.weight for one in passes),
        (before.tokens if before else 0) + sum(one.tokens for one in passes),
        _finite(did.grad_norm),
        _finite(did.lr),
    )
    _insert(connection, point)
    return point


def curve(connection: sa.Connection, run_id: str, most: int = 2000) -> tuple[list[Point], int]:
    """A run's steps in order, and the distance between them: every step where there are at most `most`, else every
    n-th, and the last one.
    """
    last = _last(connection, [run_id]).get(run_id)
    if last is None or last.step is None:
        return [], 1
    stride = -(-last.step // most)
    chosen = (points.c.run_id == run_id) & ((points.c.step % stride == 0) | (points.c.step == last.step))
    select = sa.select(points).where(chosen).order_by(points.c.seq)
    return [_point(row) for row in connection.execute(select)], stride


def last_points(connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, Point]:
    """The last step of each run that has one."""
    return _last(connection, run_ids)


def _last(connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, Point]:
    newest = (
        sa.select(points.c.run_id, sa.func.max(points.c.seq).label("seq"))
        .where(points.c.run_id.in_(run_ids) & points.c.step.is_not(None))
        .group_by(points.c.run_id)
        .subquery()
    )
    at = (points.c.run_id == newest.c.run_id) & (points.c.seq == newest.c.seq)
    return {row.run_id: _point(row) for row in connection.execute(sa.select(points).join(newest, at))}


def _waiting(run_id: str) -> sa.ColumnElement[bool]:
    """Passes that no step has used."""
    return (points.c.run_id == run_id) & points.c.step.is_(None)


def _insert(connection: sa.Connection, point: Point) -> None:
    names = ("run_id", "seq", "step", "loss", "weight", "tokens", "grad_norm", "lr", "at")
    connection.execute(points.insert(), {name: getattr(point, name) for name in names})


def _point(row: sa.Row[Any]) -> Point:
    return Point(**row._mapping)


def _finite(value: float | None) -> float | None:
    """SQLite has no NaN and JSON no infinity: a number that is none is absent, and the curve has a gap."""
    return value if value is not None and math.isfinite(value) else None
