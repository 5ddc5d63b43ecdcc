"""`lorica papers`: the index of published results, one of them with what was seen, and the command that checks it.

In: a name, a scale, seeds, overrides. Out: a table, a page, or an experiment that saves its page, picture and record.
Refuses to know any paper by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorica.cli.output import duration, emit, json_option, say, shell, table

if TYPE_CHECKING:
    from lorica.papers import PaperCheck
    from lorica.papers.kit.record import Record

PAGES = "docs/papers"
TRIALS = "runs/papers"
SEEN = {True: "yes", False: "no", None: "undecided"}

results_option = click.option(
    "--results", default=PAGES, show_default=True, metavar="DIR", help="Folder of the stored results."
)


@click.group("papers")
def command() -> None:
    """Published results: list them, read one, run the experiment that checks it."""


@command.command("list")
@results_option
@json_option
def list_papers(results: str, as_json: bool) -> None:
    """List the papers, their methods, and whether their claim showed where they were run."""
    from lorica.papers import all_papers

    found = [_described(paper, _stored(paper, results)) for paper in all_papers().values()]
    cells = [
        (p["name"], p["title"], f"{p['venue']}", p["where"], ", ".join(p["methods"]) or "-", _seen(p)) for p in found
    ]
    emit(found, table(("name", "title", "venue", "paper", "methods", "shows"), cells), as_json=as_json)


@command.command()
@click.argument("name")
@results_option
@json_option
def show(name: str, results: str, as_json: bool) -> None:
    """Show one paper: claim, published figures, settings at every scale, and what was seen here."""
    from lorica.papers import get_paper

    paper = get_paper(name)
    record = _stored(paper, results)
    emit(_described(paper, record), _page(paper, record), as_json=as_json)


@command.command()
@click.argument("name")
@click.option(
    "--scale",
    default="small",
    show_default=True,
    help="small: minutes on a CPU. full: the paper's models and data. reduced: seconds, to see that it works.",
)
@click.option("--seeds", type=int, help="Run with so many seeds (0, 1, …) and average; the paper's number by default.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting; can be repeated.")
@click.option(
    "--out",
    metavar="DIR",
    help=f"Where NAME.md, NAME.png and NAME.json go: {PAGES} for small settings as they are, else {TRIALS}.",
)
@click.option("--stored", is_flag=True, help="Judge, draw and write the stored rows again; nothing is computed anew.")
@json_option
def run(
    name: str,
    scale: str,
    seeds: int | None,
    settings: tuple[str, ...],
    out: str | None,
    stored: bool,
    as_json: bool,
) -> None:
    """Run a paper's experiment, judge its claim, and save page, picture and record.

    Data sets are read from ../shared/data, or from where LORICA_PAPERS_DATA points.
    """
    from lorica.papers import get_paper
    from lorica.papers.kit import page, running
    from lorica.papers.kit.record import read_record

    paper = get_paper(name)
    running.settings_of(paper, scale, settings)  # a wrong setting is told before anything is computed
    seeds = paper.seeds if seeds is None else seeds
    published = scale == "small" and seeds >= running.SEEDS and not settings
    folder = Path(out or (PAGES if published else TRIALS))
    talk = (lambda text: None) if as_json else say
    if stored:
        record = running.judged_again(paper, read_record(paper, folder))
    else:
        record = running.run_paper(paper, scale, talk, seeds=seeds, overrides=settings)
    path = running.save(paper, record, folder)
    headers, rows = page.cells(paper.listed(record.table(paper)))
    text = f"{page.headline(record)}. {record.sentence}\n\n{table(headers, rows)}"
    emit({**_described(paper, record), "page": str(path)}, text, as_json=as_json)
    talk(f"{duration(record.seconds)} for {len(record.seeds)} seeds; saved {shell(path)}")


def _stored(paper: PaperCheck[Any], results: str) -> Record | None:
    """The stored record, if there is one."""
    from lorica.core.errors import MissingError
    from lorica.papers.kit.record import read_record

    try:
        return read_record(paper, Path(results))
    except MissingError:
        return None


def _described(paper: PaperCheck[Any], record: Record | None) -> dict[str, Any]:
    from dataclasses import asdict

    from lorica.papers.base import SCALES

    kept = ("name", "title", "authors", "venue", "year", "arxiv", "methods", "claim", "limits")
    return {
        **{key: getattr(paper, key) for key in kept},
        "where": paper.cited()[0],
        "figures": [asdict(figure) for figure in paper.figures],
        "settings": {scale: paper.settings(scale).model_dump(mode="json") for scale in SCALES},
        "columns": dict(paper.columns),
        "result": None if record is None else {**asdict(record), "means": _means(paper, record)},
    }


def _means(paper: PaperCheck[Any], record: Record) -> list[dict[str, Any]]:
    """The table's lines: key, and mean and spread of each column."""
    return [
        {**line.key, **{name: {"mean": cell.mean, "spread": cell.spread} for name, cell in line.cells.items()}}
        for line in record.table(paper)
    ]


def _seen(found: dict[str, Any]) -> str:
    return "not run" if found["result"] is None else SEEN[found["result"]["shows"]]


def _page(paper: PaperCheck[Any], record: Record | None) -> str:
    import inspect

    from lorica.papers.base import SCALES
    from lorica.papers.kit import page, running

    fields = type(paper.small).model_fields
    scales = {scale: paper.settings(scale).model_dump(mode="json") for scale in SCALES}
    settings = [(name, *(str(scales[s][name]) for s in SCALES), info.description) for name, info in fields.items()]
    parts = [
        f"{paper.name}: {paper.title}",
        f"{paper.authors}, {paper.venue}, {paper.cited()[0]}; methods: {', '.join(paper.methods) or 'none'}",
        paper.claim,
        table(("published", "value", "read in"), [(f.what, f.value, f.source or "the paper") for f in paper.figures])
        if paper.figures
        else "",
        inspect.cleandoc(type(paper).__doc__ or ""),
        table(("setting", *SCALES, "meaning"), settings),
    ]
    if record is None:
        parts.append(f"It was not run here yet: `{running.command_line(paper, 'small', paper.seeds)}`.")
    else:
        headers, rows = page.cells(paper.listed(record.table(paper)))
        stale = running.why_stale(paper, record)
        parts += [
            f"{page.headline(record)}. {record.sentence}",
            table(headers, rows),
            f"Seeds {len(record.seeds)}, {duration(record.seconds)}, `{record.command}`.",
            "" if stale is None else str(stale),
        ]
    parts.append(f"What this cannot say: {paper.limits}" if paper.limits else "")
    return "\n\n".join(part for part in parts if part)
