"""Rows of several seeds as one table: mean, spread and the single values of every cell.

In: for each seed a list of rows, plain mappings. Out: a `Table` to ask by key. Refuses to know papers, files and how a
number is shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorica.core.errors import MethodError, did_you_mean
from lorica.papers.kit.plot import Series

Value = str | int | float | bool
Row = dict[str, Value]
"""One line of one seed: keys (`method`, `rank`, …) and measured numbers."""
Key = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured quantity: a value a seed, in the order of the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds; not finite as soon as one value is not."""
        return math.fsum(self.values) / len(self.values) if all(map(math.isfinite, self.values)) else self._wrong()

    @property
    def spread(self) -> float:
        """The sample standard deviation over seeds; 0 for one seed, NaN where a value is not finite."""
        if not all(map(math.isfinite, self.values)):
            return math.nan
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.spread / math.sqrt(len(self.values))

    def __sub__(self, other: Cell) -> Cell:
        """Seed by seed, so that what seeds have in common falls out."""
        return Cell(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def __truediv__(self, other: Cell) -> Cell:
        """Seed by seed; x / 0 is infinite."""
        pairs = zip(self.values, other.values, strict=True)
        return Cell(tuple(a / b if b else math.copysign(math.inf, a) for a, b in pairs))

    def _wrong(self) -> float:
        return math.nan if any(map(math.isnan, self.values)) else math.inf


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table: what names it, and its cells by column."""

    key: Key
    cells: Mapping[str, Cell]


class Table:
    """Lines in the order of the first seed's rows. `keys` is the order in which their keys are shown."""

    def __init__(self, lines: Sequence[Line], keys: Sequence[str]) -> None:
        self.lines = tuple(lines)
        self.keys = tuple(keys)

    @classmethod
    def of(cls, seeds: Sequence[Sequence[Row]], keys: Sequence[str], columns: Sequence[str]) -> Table:
        """Aggregate the rows of every seed. Raises MethodError for undeclared columns, rows that are there twice, and
        seeds whose rows or columns differ.
        """
        if not seeds or not seeds[0]:
            raise MethodError("An experiment gave no rows.")
        split = [dict(_split(row, keys, columns) for row in rows) for rows in seeds]
        for rows, found in zip(seeds, split, strict=True):
            if len(found) != len(rows):
                raise MethodError(f"Two rows of a seed have the same key; the keys are {', '.join(keys)}.")
            if {k: set(v) for k, v in found.items()} != {k: set(v) for k, v in split[0].items()}:
                raise MethodError("The seeds of an experiment gave different rows or columns, so no mean can be taken.")
        return cls(
            [
                Line(dict(key), {name: Cell(tuple(found[key][name] for found in split)) for name in first})
                for key, first in split[0].items()
            ],
            keys,
        )

    def where(self, **key: Value) -> Table:
        """The lines whose key has these values."""
        return Table([line for line in self.lines if all(line.key.get(k) == v for k, v in key.items())], self.keys)

    def line(self, **key: Value) -> Line:
        """The one line with these values. Raises MethodError when there is none, or more than one."""
        found = self.where(**key).lines
        if len(found) != 1:
            said = ", ".join(f"{k}={v}" for k, v in key.items()) or "no key"
            raise MethodError(f"The table has {len(found)} lines with {said}; one was asked for.")
        return found[0]

    def cell(self, column: str, **key: Value) -> Cell:
        """The cell of a column in the one line with these values. Raises MethodError."""
        cells = self.line(**key).cells
        if column not in cells:
            raise MethodError(f"The line has no column {column!r}.{did_you_mean(column, cells)}")
        return cells[column]

    def mean(self, column: str, **key: Value) -> float:
        """`cell(…).mean`."""
        return self.cell(column, **key).mean

    def values(self, key: str) -> list[Value]:
        """The different values of one key, in order of appearance."""
        return list(dict.fromkeys(line.key[key] for line in self.lines if key in line.key))

    def best(self, column: str, *, largest: bool = False, **key: Value) -> Line:
        """The line with the smallest (largest) finite mean of a column: the tuned learning rate, say. Raises
        MethodError when no mean is finite.
        """
        found = [line for line in self.where(**key) if column in line.cells and math.isfinite(line.cells[column].mean)]
        if not found:
            raise MethodError(f"No line has a finite {column!r}.")
        return (max if largest else min)(found, key=lambda line: line.cells[column].mean)

    def tuned(self, column: str, *, over: str, largest: bool = False) -> Table:
        """For each key without `over` (the learning rate), the line with the best mean of a column; lines that lack
        `over` are kept. Where no mean is finite, the first line stands for all.
        """
        groups: dict[tuple[tuple[str, Value], ...], list[Line]] = {}
        for line in self.lines:
            groups.setdefault(tuple((k, v) for k, v in line.key.items() if k != over), []).append(line)
        kept = []
        for lines in groups.values():
            usable = [line for line in lines if column in line.cells and math.isfinite(line.cells[column].mean)]
            best = Table(usable, self.keys).best(column, largest=largest) if usable else lines[0]
            kept += [best] if over in lines[0].key else lines
        return Table(kept, self.keys)

    def series(self, label: str, x: str, y: str, **key: Value) -> Series:
        """A curve with its spread: x is a key or a column, y a column, over the lines with these values."""
        lines = [line for line in self.where(**key) if y in line.cells]
        places = [_number(line.key[x] if x in line.key else line.cells[x].mean) for line in lines]
        cells = [line.cells[y] for line in lines]
        return Series(label, tuple(places), tuple(c.mean for c in cells), tuple(c.spread for c in cells))

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)


def _number(value: Value) -> float | str:
    return value if isinstance(value, str) else float(value)


def _split(
    row: Row, keys: Sequence[str], columns: Sequence[str]
) -> tuple[tuple[tuple[str, Value], ...], dict[str, float]]:
    """(what names a row, what was measured in it)."""
    cells: dict[str, float] = {}
    for name, value in row.items():
        if name in keys:
            continue
        if name not in columns:
            raise MethodError(f"A row has the column {name!r}, which is not declared.{did_you_mean(name, columns)}")
        if isinstance(value, str):
            raise MethodError(f"Column {name!r} holds the text {value!r}; measured columns hold numbers.")
        cells[name] = float(value)
    return tuple((name, row[name]) for name in keys if name in row), cells
