"""What a rule of merging is: parameters, and how the changes of several adapters at one site become one.

In: a site, each parent's change there, a weight for each. Out: one change. Where a rule needs numbers of the whole
model (a threshold), it first reads a stream of all sites, which can be read again. Refuses to know adapters, files and
how the result is kept. Rules for layers see `site.layer`; rules for columns take what they need as fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lorica.adapters.merging.change import Change
from lorica.core.config import Config
from lorica.core.errors import MergeError
from lorica.core.site import Site
from lorica.methods.base import Paper


@dataclass(frozen=True, slots=True)
class SiteChanges:
    """One site, the change of every parent there (of rank 0 where a parent does not act), and their weights."""

    site: Site
    changes: tuple[Change, ...]
    weights: tuple[float, ...]


class Merging(Config, ABC):
    """A rule that makes one change out of several. Subclasses are final: fields are the rule's parameters."""

    name: ClassVar[str]
    """Registered name, used by `--how` and in files."""
    summary: ClassVar[str]
    """One line for tables."""
    paper: ClassVar[Paper | None] = None
    """Where it was published; None for what is older than papers about adapters."""
    default_weight: ClassVar[Literal["one", "mean"]] = "one"
    """What a parent weighs when nobody says: 1, or 1/N."""
    weighted: ClassVar[bool] = True
    """Whether parents may have weights other than 1."""

    @property
    def ordered(self) -> bool:
        """Whether the order of the parents changes the result by more than rounding."""
        return False

    def survey(self, sites: Iterable[SiteChanges]) -> Any:
        """Read all sites, as often as needed, before the first `merge`; what it returns is handed to each."""
        return None

    @abstractmethod
    def merge(self, site: Site, changes: Sequence[Change], weights: Sequence[float], survey: Any = None) -> Change:
        """The combined change of one site. Raises MergeError where the rule cannot combine these changes."""


def weighted_bias(changes: Sequence[Change], weights: Sequence[float]) -> Tensor | None:
    """`Σ w_n Δb_n` [O]; None where no parent changes the bias."""
    parts = [w * change.bias_O for change, w in zip(changes, weights, strict=True) if change.bias_O is not None]
    return sum(parts[1:], parts[0]) if parts else None


def need_factors(rule: Merging, site: Site, changes: Sequence[Change], *, equal: bool = False) -> int:
    """The largest rank of the parents' factors. Raises MergeError where one is dense, or, with `equal`, where ranks
    differ; a parent that does not act at the site (rank 0) fits any.
    """
    dense = next((change for change in changes if not change.factored), None)
    if dense is not None:
        raise MergeError(
            f"{rule.name!r} combines factors, and {dense.source or 'a parent'} changes site {site.name!r} densely.",
            hint="`task_arithmetic` adds changes of any kind; `lorica export --rank` makes factors of a dense change.",
        )
    ranks = sorted({change.rank for change in changes if change.rank})
    if equal and len(ranks) > 1:
        told = ", ".join(f"{change.rank} of {change.source or 'a parent'}" for change in changes if change.rank)
        raise MergeError(
            f"{rule.name!r} adds factors entry by entry, and at site {site.name!r} ranks differ: {told}.",
            hint="`cat`, `svd` and `task_arithmetic` take any ranks.",
        )
    return ranks[-1] if ranks else 0
