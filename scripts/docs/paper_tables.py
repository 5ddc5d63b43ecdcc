"""The generated parts of docs/papers: the index's table, and each page again from its stored record.

In: the registry of papers and docs/papers/NAME.json. Out: Markdown. Refuses to measure anything.
"""

from __future__ import annotations

from pathlib import Path

from lorica.core.errors import MissingError
from lorica.papers import all_papers, get_paper
from lorica.papers.kit.page import SEEN, render
from lorica.papers.kit.record import Record, read_record
from scripts.docs.markdown import put, table


def with_papers(page: str, folder: Path) -> str:
    """The index page with one line for each paper."""
    rows = []
    for name, paper in all_papers().items():
        record = stored(name, folder)
        methods = ", ".join(f"[`{method}`](../methods/{method}.md)" for method in paper.methods)
        seen = "not run yet" if record is None else SEEN[record.shows]
        title = f"[{paper.title}]({name}.md)" if record is not None else paper.title
        venue = f"[{paper.venue}]({paper.cited()[1]})"
        rows.append((f"`{name}`", title, venue, methods, paper.claim, seen))
    return put(page, "papers", table(("name", "title", "paper", "methods", "claim", "at small scale"), rows))


def paper_page(name: str, folder: Path, present: str) -> str:
    """A paper's page from its stored record; what is there where nothing is stored."""
    record = stored(name, folder)
    return present if record is None else render(get_paper(name), record)


def stored(name: str, folder: Path) -> Record | None:
    """The stored record, if there is one."""
    try:
        return read_record(get_paper(name), folder)
    except MissingError:
        return None
