"""The index of papers: every file of this package that defines a `PaperCheck`. No import list exists."""

from __future__ import annotations

from functools import cache
from typing import Any

from lorica.core.errors import MissingError, did_you_mean
from lorica.core.registry import classes_in
from lorica.papers.base import Figure, PaperCheck, Verdict

__all__ = ["Figure", "PaperCheck", "Verdict", "all_papers", "get_paper"]


@cache
def all_papers() -> dict[str, PaperCheck[Any]]:
    """Every paper of the index by name, sorted."""
    found = [item() for item in classes_in(__name__, __path__) if issubclass(item, PaperCheck)]
    return {paper.name: paper for paper in sorted(found, key=lambda paper: paper.name)}


def get_paper(name: str) -> PaperCheck[Any]:
    """The paper called `name`. Raises MissingError with the nearest names."""
    known = all_papers()
    if name not in known:
        raise MissingError(
            f"There is no paper {name!r} in the index.{did_you_mean(name, known)}",
            hint="`lorica papers list` shows them all.",
        )
    return known[name]
