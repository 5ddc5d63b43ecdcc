"""Judging a table: which column is quality, who is better by how much, and whether that is more than chance.

In: tables and cells. Out: differences seed by seed, and True, False or None for a comparison. Refuses to know papers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorica.core.errors import MethodError
from lorica.papers.kit.table import Cell, Table, Value

STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""One-sided 95 % quantiles of Student's t for 2, 3, … 10 seeds; more seeds use the last."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The column that says how good a result is, and which way is better."""

    column: str
    largest: bool

    def gain(self, table: Table, better: Mapping[str, Value], than: Mapping[str, Value]) -> Cell:
        """By how much one line is better than another, seed by seed: positive is better, whichever way is up."""
        first, second = table.cell(self.column, **better), table.cell(self.column, **than)
        return first - second if self.largest else second - first


def quality(table: Table) -> Quality:
    """Accuracy where the task has it, else exact match, else the test loss. Raises MethodError where there is none."""
    for column, largest in (("test accuracy", True), ("exact match", True), ("test loss", False)):
        if all(column in line.cells for line in table):
            return Quality(column, largest)
    raise MethodError("The table has no column that says how good a line is.")


def above(difference: Cell, bound: float = 0.0) -> bool | None:
    """Whether a mean lies above a bound (True) or below it (False) by a one-sided t-test at 95 %; in between, and for
    one seed or a mean that is not finite, None.
    """
    count = len(difference.values)
    if count < 2:
        return None
    least = STUDENT[min(count, len(STUDENT) + 1) - 2] * difference.error
    distance = difference.mean - bound
    if distance > 0 and distance >= least:
        return True
    return False if distance < 0 and -distance >= least else None


def together(parts: Iterable[bool | None]) -> bool | None:
    """Whether a claim with several parts shows: True when all do, False when one clearly does not, else None."""
    found = list(parts)
    return False if False in found else (True if all(found) else None)


def average(cells: list[Cell]) -> Cell:
    """The mean of several cells, seed by seed."""
    return Cell(tuple(sum(values) / len(values) for values in zip(*(cell.values for cell in cells), strict=True)))
