"""The index of papers: every file of this package that defines a `PaperCheck`. No import list exists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from lorica.core.errors import MissingError, did_you_mean
from lorica.papers.base import Figure, PaperCheck, Verdict

__all__ = ["Figure", "PaperCheck", "Verdict", "all_papers", "get_paper"]


@cache
def all_papers() -> dict[str, PaperCheck[Any]]:
    """Every paper of the index by name, sorted."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += [
            item()
            for item in vars(module).values()
            if inspect.isclass(item)
            and item.__module__ == module.__name__
            and issubclass(item, PaperCheck)
            and not inspect.isabstract(item)
        ]
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
