"""Rules of merging: every file of this package and every `lorica.mergings` entry point. No import list exists."""

from __future__ import annotations

from functools import cache
from typing import Any

from lorica.adapters.merging.base import Merging, SiteChanges
from lorica.adapters.merging.change import Change, change_of
from lorica.core.errors import MergeError, did_you_mean
from lorica.core.registry import classes_in

__all__ = ["Change", "Merging", "SiteChanges", "all_mergings", "change_of", "get_merging", "make_merging"]


@cache
def all_mergings() -> dict[str, type[Merging]]:
    """Every registered rule by name, sorted."""
    found = [item for item in classes_in(__name__, __path__, "lorica.mergings") if issubclass(item, Merging)]
    return {item.name: item for item in sorted(found, key=lambda item: item.name)}


def get_merging(name: str) -> type[Merging]:
    """The rule called `name`. Raises MergeError with the nearest names."""
    known = all_mergings()
    if name not in known:
        raise MergeError(
            f"There is no rule of merging {name!r}.{did_you_mean(name, known)}",
            hint="`lorica merge --list` shows them all.",
        )
    return known[name]


def make_merging(name: str, **parameters: Any) -> Merging:
    """A rule with its parameters: `make_merging("ties", density=0.3)`. Raises MergeError or ConfigError."""
    return get_merging(name)(**parameters)
