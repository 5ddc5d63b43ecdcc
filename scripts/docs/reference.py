"""Writes the generated parts of the documentation from the code, or checks that they are what the code says.

In: the click tree, the config classes, the errors, the public API, the registries. Out: docs/reference, the tables
between markers in the method pages, the index of papers and the README, and the papers' pages; with `--check`, exit
code 1 and the names of stale pages.
Run from the repository: `python -m scripts.docs.reference [--check]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lorica.methods import all_methods
from lorica.papers import all_papers
from scripts.docs import cli_page, config_page, errors_page, losses_page, python_page
from scripts.docs.method_tables import with_methods, with_settings
from scripts.docs.paper_tables import paper_page, with_papers

DOCS = Path(__file__).resolve().parents[2] / "docs"


def pages() -> dict[Path, Callable[[], str]]:
    """Every page that is generated, wholly or between markers, with what it should hold."""
    found: dict[Path, Callable[[], str]] = {
        DOCS / "reference" / "cli.md": cli_page.page,
        DOCS / "reference" / "config.md": config_page.page,
        DOCS / "reference" / "errors.md": errors_page.page,
        DOCS / "reference" / "losses.md": losses_page.page,
        DOCS / "reference" / "python.md": python_page.page,
    }
    for name in all_methods():
        page = DOCS / "methods" / f"{name}.md"
        found[page] = partial(lambda page, name: with_settings(read(page), name), page, name)
    papers = DOCS / "papers"
    found[papers / "index.md"] = lambda: with_papers(read(papers / "index.md"), papers)
    for name in all_papers():
        page = papers / f"{name}.md"
        found[page] = partial(lambda page, name: paper_page(name, papers, read(page)), page, name)
    for page, prefix in ((DOCS / "methods" / "index.md", ""), (DOCS.parent / "README.md", "docs/methods/")):
        found[page] = partial(lambda page, prefix: with_methods(read(page), prefix), page, prefix)
    return found


def stale() -> list[str]:
    """Names of the pages that differ from what the code says now."""
    return [relative(page) for page, make in pages().items() if read(page) != make()]


def relative(page: Path) -> str:
    return page.relative_to(DOCS.parent).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8") if page.is_file() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a file is stale")
    if parser.parse_args().check:
        found = stale()
        for name in found:
            print(f"{name} is stale; run `python -m scripts.docs.reference`.", file=sys.stderr)
        return 1 if found else 0
    for page, make in pages().items():
        if read(page) != (text := make()):
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
            print(relative(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
