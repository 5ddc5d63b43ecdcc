"""A paper's page: Markdown from its declaration and a record.

In: a paper and a record. Out: the whole page; the index's table; how a mean with its spread is printed. The same input
gives the same text. Refuses to know files and terminals.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorica.papers.base import PaperCheck
from lorica.papers.kit.record import Record
from lorica.papers.kit.table import Cell, Line, Table, Value

GENERATED = "<!-- Written by `{command}`; do not edit. -->"
SEEN = {True: "The claim shows", False: "The claim does not show", None: "Undecided"}


def render(paper: PaperCheck[Any], record: Record) -> str:
    """The page of a paper, as `lorica papers run` writes it."""
    parts = [
        GENERATED.format(command=record.command),
        f"# {paper.title}",
        f"{citation(paper)}{_methods(paper)}",
        "## Claim",
        paper.claim,
        _figures(paper),
        "## Experiment",
        inspect.cleandoc(type(paper).__doc__ or ""),
        _settings(paper, record),
        "## What was seen",
        f"**{headline(record)}.** {record.sentence}",
        results(paper, record),
        _legend(paper, record),
        f"![{paper.name}]({paper.name}.png)" if paper.plots(record.table(paper)) else "",
        f"What this cannot say: {paper.limits}" if paper.limits else "",
        "## Run it again",
        f"```sh\n{record.command}\n```",
        _origin(paper, record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(record: Record) -> str:
    """`The claim does not show at small scale`."""
    return f"{SEEN[record.shows]} at {record.scale} scale"


def citation(paper: PaperCheck[Any]) -> str:
    """Authors, venue, arXiv number or address."""
    venue = paper.venue if str(paper.year) in paper.venue else f"{paper.venue} {paper.year}"
    words, address = paper.cited()
    return f"{paper.authors}, {venue}, [{words}]({address})."


def _methods(paper: PaperCheck[Any]) -> str:
    links = ", ".join(f"[`{name}`](../methods/{name}.md)" for name in paper.methods)
    return f" Methods: {links}." if links else ""


def _figures(paper: PaperCheck[Any]) -> str:
    if not paper.figures:
        return ""
    rows = [(f.what, f.value, f.source or "the paper") for f in paper.figures]
    return "Published:\n\n" + markdown(("what", "value", "read in"), rows)


def _settings(paper: PaperCheck[Any], record: Record) -> str:
    """Every setting at the record's scale, beside the full scale's where they differ."""
    fields = type(paper.small).model_fields
    full = paper.full.model_dump(mode="json")
    rows = [
        (f"`{name}`", _code(record.settings[name]), _code(full[name]), info.description or "")
        for name, info in fields.items()
    ]
    return markdown(("setting", record.scale, "full", "meaning"), rows)


def results(paper: PaperCheck[Any], record: Record) -> str:
    """The listed lines as a Markdown table, mean ± spread."""
    headers, rows = cells(paper.listed(record.table(paper)))
    return markdown(headers, rows)


def _legend(paper: PaperCheck[Any], record: Record) -> str:
    shown = {name for line in paper.listed(record.table(paper)) for name in line.cells}
    said = "; ".join(f"*{name}*: {text}" for name, text in paper.columns.items() if name in shown)
    count = len(record.seeds)
    spread = f"Mean ± standard deviation over {count} seeds." if count > 1 else "One seed."
    return f"{spread} {said}."


def _origin(paper: PaperCheck[Any], record: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    spent = record.cpu_seconds
    minutes = f"{spent / 60:.1f} minutes" if spent >= 90 else f"{spent:.0f} seconds"
    raw = f"every seed's rows are in [{paper.name}.json]({paper.name}.json)"
    return f"It took {minutes} of CPU time ({versions}); {raw}."


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headers and printed rows. A column that no line has is left out; what a line lacks is blank."""
    keys = [name for name in table.keys if any(name in line.key for line in table)]
    fullest = sorted(table, key=lambda line: -len(line.cells))  # its order counts, then that of lines with fewer cells
    columns = list(dict.fromkeys(name for line in fullest for name in line.cells))
    rows = [
        [*(shown(line.key[k]) if k in line.key else "" for k in keys), *(_cell(line, name) for name in columns)]
        for line in table
    ]
    return [*keys, *columns], rows


def _cell(line: Line, name: str) -> str:
    return number(line.cells[name]) if name in line.cells else ""


def number(cell: Cell) -> str:
    """Mean and spread to two digits of the spread: `0.961 ± 0.012`. Values that are not finite are counted."""
    wrong = [value for value in cell.values if not math.isfinite(value)]
    if wrong:
        what = "diverged" if any(map(math.isnan, wrong)) else "never"
        return what if len(wrong) == len(cell.values) else f"{what} in {len(wrong)} of {len(cell.values)}"
    mean, spread = cell.mean, cell.spread
    if spread == 0:
        return shown(mean)
    digits = 1 - math.floor(math.log10(spread))
    if digits > 6:
        return f"{mean:.3g} ± {spread:.1g}"
    return f"{mean:,.{max(0, digits)}f} ± {spread:,.{max(0, digits)}f}"


def shown(value: Value) -> str:
    """One value without a spread: whole numbers in full, others to four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e12 else f"{value:.4g}"


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in line) + " |" for line in lines)


def _code(value: Any) -> str:
    if isinstance(value, Mapping):
        return "`{" + ", ".join(f"{k}: {_bare(v)}" for k, v in value.items()) + "}`"
    return f"`{_bare(value)}`"


def _bare(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_bare, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
