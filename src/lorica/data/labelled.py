"""Records with some further columns of their rows, as texts: classes and domains of a data file.

In: a path, names of columns. Out: each record with its labels. Refuses to know what a label means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorica.core.errors import DataError, did_you_mean
from lorica.data.everyday import resolve
from lorica.data.reading import read_rows
from lorica.data.records import Record, recognise, to_record

Labels = dict[str, str]


def load_labelled(path: str | Path, columns: Sequence[str]) -> list[tuple[Record, Labels]]:
    """Every record of a file with the values of these columns (numbers and truth values as JSON writes them).

    Raises MissingError, and DataError for rows that cannot be used or that lack a column.
    """
    path = resolve(path)
    rows = read_rows(path)
    shape = recognise(rows, path)
    found = []
    for index, row in enumerate(rows):
        where = rows.where(index)
        absent = next((name for name in columns if row.get(name) is None), None)
        if absent is not None:
            raise DataError(f"{where} has no column {absent!r}.{did_you_mean(absent, row)}")
        found.append((to_record(row, shape, where), {name: _text(row[name], name, where) for name in columns}))
    return found


def _text(value: object, name: str, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(f"{where}: {name!r} must be a text, a number or a truth value to be a label.")
