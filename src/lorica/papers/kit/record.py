"""A finished experiment as JSON: settings, every seed's rows, the verdict, versions, command and duration.

In: a paper and what was measured. Out: a `Record`, its file, and whether it still is what the paper would measure.
Refuses to know pages and terminals.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorica.core.config import Config
from lorica.core.errors import FormatError, MissingError
from lorica.papers.base import PaperCheck, Verdict
from lorica.papers.kit.table import Row, Table


@dataclass(frozen=True, slots=True)
class Record:
    """What `lorica papers run` measured. `rows[i]` are those of `seeds[i]`; `verdict` was given on all of them."""

    paper: str
    scale: str
    settings: Mapping[str, Any]
    digest: str
    seeds: tuple[int, ...]
    rows: tuple[tuple[Row, ...], ...]
    shows: bool | None
    sentence: str
    seconds: float
    cpu_seconds: float
    command: str
    versions: Mapping[str, str]

    def table(self, paper: PaperCheck[Any]) -> Table:
        """The rows of all seeds as one table."""
        return Table.of(self.rows, paper.keys, tuple(paper.columns))

    def verdict(self) -> Verdict:
        return Verdict(self.shows, self.sentence)

    def to_json(self) -> str:
        """One seed's rows a line each, so that a diff can be read. Numbers that are not finite are texts."""
        values = _plain(asdict(self))
        rows = values.pop("rows")
        head = json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False).removesuffix("\n}")
        lines = [
            "  [\n" + ",\n".join(f"   {json.dumps(row, ensure_ascii=False, allow_nan=False)}" for row in seed) + "\n  ]"
            for seed in rows
        ]
        return head + ',\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str, columns: Sequence[str], where: str) -> Record:
        """Read it back. Raises FormatError when the text is not such a record."""
        try:
            values = json.loads(text)
            values["rows"] = tuple(
                tuple({k: float(v) if k in columns else v for k, v in row.items()} for row in seed)
                for seed in values["rows"]
            )
            values["seeds"] = tuple(values["seeds"])
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{where} is not the record of a paper's experiment: {error}.") from None


def read_record(paper: PaperCheck[Any], folder: Path) -> Record:
    """The stored record of a paper. Raises MissingError where there is none, FormatError for a broken one."""
    path = folder / f"{paper.name}.json"
    if not path.is_file():
        raise MissingError(
            f"{paper.name!r} has no stored results: there is no {path}.", hint=f"Run `lorica papers run {paper.name}`."
        )
    return Record.from_json(path.read_text(encoding="utf-8"), tuple(paper.columns), str(path))


def digest(paper: PaperCheck[Any], settings: Config) -> str:
    """Sixteen hex digits over everything declared that decides what is measured."""
    said = {
        "paper": paper.name,
        "revision": paper.revision,
        "keys": paper.keys,
        "columns": list(paper.columns),
        "settings": settings.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf, nan: float() reads them back
    return value


def rounded(row: Row) -> Row:
    """A row as it is kept: seven digits, more than any experiment can repeat. What is judged is what is stored."""
    return {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in row.items()}
