"""A table of a rank-1 adapter's scalars: one line a token, one column a site, and labels of the token's row.

In: scalars with their tokens, or a .json or .csv file of such a table. Out: the file, or arrays for a probe. Nothing in
it is HTML. Refuses to know models and tokenizers.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorica.core.errors import DataError, FormatError, MissingError, did_you_mean
from lorica.core.storage import storage, write_file

SUFFIXES = (".csv", ".json")
COLUMNS = ("row", "position", "token", "text", "part")
LABEL, SITE = "label.", "c."
"""What the names of the other columns begin with in a CSV file."""


@dataclass(frozen=True, slots=True)
class TokenLine:
    """One token: its row, its place there, its id and text, its part (`question`, `header`, `answer`, `rest`), the
    labels of its row, and `c` at each site.
    """

    row: int
    position: int
    token: int
    text: str
    part: str
    labels: Mapping[str, str]
    scalars: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ScalarTable:
    """Lines, the sites of their scalars in order, and in `about` how they were recorded (kept in .json alone)."""

    sites: tuple[str, ...]
    lines: tuple[TokenLine, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def of_parts(self, parts: Collection[str]) -> ScalarTable:
        """The tokens of these parts alone. Raises DataError where there are none."""
        kept = tuple(line for line in self.lines if line.part in parts)
        if not kept:
            raise DataError(f"The table has no token of {' or '.join(sorted(parts))}.")
        return ScalarTable(self.sites, kept, self.about)

    def label(self, name: str) -> list[str]:
        """A label of every line. Raises DataError where a line lacks it."""
        found = [line.labels.get(name) for line in self.lines]
        absent = next((line for line, value in zip(self.lines, found, strict=True) if value is None), None)
        if absent is not None:
            known = sorted({key for line in self.lines for key in line.labels})
            raise DataError(
                f"Row {absent.row} of the table has no label {name!r}; its labels are {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
        return [str(value) for value in found]

    def means(self) -> dict[str, dict[str, float]]:
        """Part → site → the mean scalar of its tokens."""
        parts: dict[str, list[TokenLine]] = {}
        for line in self.lines:
            parts.setdefault(line.part, []).append(line)
        return {
            part: {s: math.fsum(one.scalars[k] for one in own) / len(own) for k, s in enumerate(self.sites)}
            for part, own in parts.items()
        }


def save_scalars(table: ScalarTable, path: Path) -> Path:
    """Write .json (one token a line) or .csv. Raises DataError for another suffix, StorageError."""
    content = _csv(table) if _suffix(path) == ".csv" else _json(table)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content.encode())
    return path


def load_scalars(path: Path) -> ScalarTable:
    """Read such a file. Raises MissingError, DataError for another suffix, FormatError for other content."""
    suffix = _suffix(path)
    if not path.is_file():
        raise MissingError(f"There is no table of scalars {path}.", hint="`lorica directions scalars` writes one.")
    text = path.read_text(encoding="utf-8")
    try:
        return _from_csv(text) if suffix == ".csv" else _from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path} is no table of scalars: {type(error).__name__} {error}.".replace(" .", ".")
        ) from None


def _suffix(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} must end in {' or '.join(SUFFIXES)}, which says how the table is written.")
    return path.suffix.lower()


def _json(table: ScalarTable) -> str:
    """One document, one token a line."""
    head = json.dumps({"sites": table.sites, "about": dict(table.about)}, ensure_ascii=False)
    lines = ",\n".join(json.dumps(asdict(line), ensure_ascii=False) for line in table.lines)
    return f'{head[:-1]}, "tokens": [\n{lines}\n]}}\n'


def _from_json(text: str) -> ScalarTable:
    found = json.loads(text)
    made = [TokenLine(**{**one, "scalars": tuple(map(float, one["scalars"]))}) for one in found["tokens"]]
    return _checked(tuple(found["sites"]), made, found["about"])


def _csv(table: ScalarTable) -> str:
    labels = list(dict.fromkeys(name for line in table.lines for name in line.labels))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *(LABEL + name for name in labels), *(SITE + site for site in table.sites)])
    for line in table.lines:
        told = [line.row, line.position, line.token, line.text, line.part, *(line.labels.get(n, "") for n in labels)]
        writer.writerow([*told, *map(repr, line.scalars)])
    return out.getvalue()


def _from_csv(text: str) -> ScalarTable:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = list(reader.fieldnames or ())
    if tuple(names[: len(COLUMNS)]) != COLUMNS:
        raise ValueError(f"its columns do not begin with {', '.join(COLUMNS)}")
    sites = [name for name in names if name.startswith(SITE)]
    labels = [name for name in names if name.startswith(LABEL)]
    lines = [
        TokenLine(
            int(one["row"]),
            int(one["position"]),
            int(one["token"]),
            one["text"],
            one["part"],
            {name.removeprefix(LABEL): one[name] for name in labels if one[name]},
            tuple(float(one[name]) for name in sites),
        )
        for one in reader
    ]
    return _checked(tuple(name.removeprefix(SITE) for name in sites), lines, {})


def _checked(sites: tuple[str, ...], lines: Sequence[TokenLine], about: Mapping[str, Any]) -> ScalarTable:
    if not sites or any(len(line.scalars) != len(sites) for line in lines):
        raise ValueError("a line has another number of scalars than there are sites")
    return ScalarTable(sites, tuple(lines), about)
